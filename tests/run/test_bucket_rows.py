"""Rows of a run on a bucket: parts, which are read as one and end where a run is resumed."""

import json
import time

import pytest
from etils import epath

from spiral_jax.run import metrics, row_parts
from spiral_jax.run.metrics import LoggingConfig, MetricsWriter, read_rows, rows_of


def row_of(step: int) -> dict:
    return {"step": step, "loss": 4 / step}


def write(place, parts, last_step=0) -> list[str]:
    """Writes lists of steps, each as a part."""
    writer = MetricsWriter(place, LoggingConfig(), last_step=last_step)
    for steps in parts:
        for step in steps:
            writer.write(row_of(step))
        writer.flush()
    writer.close()
    return names(place)


def names(place) -> list[str]:
    return sorted(path.name for path in rows_of(place).iterdir())


def test_rows_come_back_as_written_and_in_order(place):
    assert write(place, [[1, 2], [3], [4, 5, 6], []]) == ["000000001.jsonl", "000000003.jsonl", "000000004.jsonl"]
    assert read_rows(rows_of(place)) == [row_of(step) for step in range(1, 7)]
    assert json.loads((rows_of(place) / "000000003.jsonl").read_text()) == row_of(3)


def test_a_part_is_written_now_and_then(place, monkeypatch):
    monkeypatch.setattr(row_parts, "SECONDS_OF_A_PART", 0.2)
    writer = MetricsWriter(place, LoggingConfig())
    writer.write(row_of(1))
    assert read_rows(rows_of(place)) == []
    time.sleep(0.6)
    assert read_rows(rows_of(place)) == [row_of(1)]
    writer.close()


def test_a_resume_drops_later_parts_and_later_rows_of_a_part(place):
    write(place, [[1, 2], [3, 4, 5], [6], [7, 8]])
    before = (rows_of(place) / "000000001.jsonl").read_bytes()
    assert write(place, [[5, 6]], last_step=4) == ["000000001.jsonl", "000000003.jsonl", "000000005.jsonl"]
    assert [row["step"] for row in read_rows(rows_of(place))] == [1, 2, 3, 4, 5, 6]
    assert (rows_of(place) / "000000001.jsonl").read_bytes() == before


def test_parts_that_end_before_are_not_read_by_a_resume(place, monkeypatch):
    """After weeks they are tens of thousands, and every preemption would wait for them."""
    write(place, [[1, 2], [3, 4, 5], [6], [7, 8]])
    read, read_all = [], metrics.read_all

    def reading(files):
        read.append([file.name for file in files])
        return read_all(files)

    monkeypatch.setattr(metrics, "read_all", reading)
    writer = MetricsWriter(place, LoggingConfig(), last_step=6)
    assert metrics.read_row(rows_of(place), 4) == row_of(4) and metrics.read_row(rows_of(place), 9) is None
    writer.complete(6, {"validation_loss": 2.5})
    writer.close()
    from_6, from_3 = ["000000006.jsonl", "000000007.jsonl"], ["000000003.jsonl", "000000006.jsonl"]
    assert read == [from_6, from_3, from_6[:1], from_6[:1]] and len(read_rows(rows_of(place))) == 6


def test_broken_lines_of_a_part_are_set_aside_and_the_others_kept(place, capsys):
    write(place, [[1, 2], [3, 4, 5], [6]])
    part = rows_of(place) / "000000003.jsonl"
    lines = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(lines[0] + b'{"step": \xff\n' + lines[2])
    assert len(read_rows(rows_of(place))) == 5
    write(place, [], last_step=5)
    assert part.read_bytes() == lines[0] + lines[2]
    assert (place / "damaged/000000003.jsonl.lines").read_bytes() == b'{"step": \xff\n'
    err = capsys.readouterr().err
    assert err == (
        f"note: {part}: line 2 is damaged and now in {place}/damaged/000000003.jsonl.lines; 2 rows are kept\n"
    )


def test_rows_that_the_bucket_refuses_are_kept_and_written_later(place, monkeypatch, capsys):
    writer, refuse, put = MetricsWriter(place, LoggingConfig()), [True], epath.Path.write_bytes

    def write_bytes(self, content):
        if refuse:
            raise OSError("Forbidden")
        return put(self, content)

    kind = type(place)
    monkeypatch.setattr(kind, "write_bytes", write_bytes)
    writer.write(row_of(1))
    writer.flush()
    writer.write(row_of(2))
    refuse.clear()
    writer.write(row_of(3))
    writer.flush()
    writer.write(row_of(4))
    writer.close()
    assert [row["step"] for row in read_rows(rows_of(place))] == [1, 2, 3, 4]
    assert names(place) == ["000000001.jsonl", "000000004.jsonl"]
    first, second = capsys.readouterr().err.splitlines()
    assert "cannot be written (Forbidden); training goes on" in first and "written again" in second


def test_a_writer_that_lost_its_claim_writes_no_part(place):
    class Ended(BaseException):
        pass

    def end():
        raise Ended

    writer = MetricsWriter(place, LoggingConfig(), check=end)
    writer.write(row_of(1))
    with pytest.raises(Ended):
        writer.flush()
    assert not rows_of(place).exists()


def test_rows_of_a_run_that_was_copied_to_a_disk_are_read(place, tmp_path):
    write(place, [[1, 2], [3]])
    (tmp_path / "metrics").mkdir()
    for part in rows_of(place).iterdir():
        (tmp_path / "metrics" / part.name).write_bytes(part.read_bytes())
    assert read_rows(tmp_path / "metrics") == [row_of(1), row_of(2), row_of(3)]


def test_values_that_come_late_go_into_their_row(place):
    write(place, [[1, 2], [3, 4, 5]])
    before = (rows_of(place) / "000000001.jsonl").read_bytes()
    writer = MetricsWriter(place, LoggingConfig(), last_step=4)
    writer.complete(4, {"validation_loss": 2.5, "task/a": float("nan")})
    writer.write(row_of(5))
    writer.close()
    rows = read_rows(rows_of(place))
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[3] == row_of(4) | {"validation_loss": 2.5, "task/a": None} and rows[2] == row_of(3)
    assert (rows_of(place) / "000000001.jsonl").read_bytes() == before
