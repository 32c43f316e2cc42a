"""metrics.jsonl and the line on the terminal; MFU against FLOPs counted by hand."""

import dataclasses
import json
import math

import jax
import pytest

from spiral_jax.data.pipeline import WindowOrder
from spiral_jax.errors import SpiralError
from spiral_jax.model.config import ModelConfig
from spiral_jax.run.config import RunConfig
from spiral_jax.run.metrics import LoggingConfig, MetricsWriter, check_extras, read_rows
from spiral_jax.run.record import Record, complete_row
from spiral_jax.training.config import TrainConfig


def row_of(step: int, **values) -> dict:
    return {"step": step, "loss": 4 / step, "learning_rate": 1e-3, "tokens_per_second": 1e6, "step_time": 2.0, **values}


def write(workdir, steps, last_step=0):
    writer = MetricsWriter(workdir, LoggingConfig(), last_step=last_step)
    for step in steps:
        writer.write(row_of(step))
    writer.close()
    return workdir / "metrics.jsonl"


def test_rows_come_back_as_written(tmp_path):
    path = write(tmp_path, [1, 2, 3])
    assert read_rows(path) == [row_of(1), row_of(2), row_of(3)]
    assert [json.loads(line) for line in path.read_text().splitlines()] == read_rows(path)


def test_a_row_can_be_read_as_soon_as_it_is_written(tmp_path):
    writer = MetricsWriter(tmp_path, LoggingConfig())
    writer.write(row_of(1))
    assert read_rows(tmp_path / "metrics.jsonl") == [row_of(1)]
    writer.close()


@pytest.mark.parametrize("tail", ["", '{"step": 6, "lo', '{"step": 6}', "\n", '{"st\n'], ids=repr)
def test_resume_drops_rows_past_its_step(tmp_path, tail):
    """Also a last line that a kill cut short; the rows before keep every bit."""
    path = write(tmp_path, [1, 2, 3, 4, 5])
    before = path.read_text().splitlines(keepends=True)
    path.write_text("".join(before) + tail)
    write(tmp_path, [4, 5, 6], last_step=3)
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3, 4, 5, 6]
    assert path.read_text().splitlines(keepends=True)[:3] == before[:3]
    is_broken = tail.strip() and tail.endswith("\n")  # else it was cut short by a kill
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", *(["damaged"] if is_broken else [])}


BROKEN = [b"\xff\x00\n", b"[1]\n", b'{"loss": 1.0}\n', b'{"step": 21, "lo\n', b'{"step": true}\n', b"[" * 99999 + b"\n"]


@pytest.mark.parametrize("broken", BROKEN, ids=lambda line: repr(line[:12]))
def test_a_broken_line_is_set_aside_and_every_other_row_kept(tmp_path, capsys, broken):
    """Line 21 of 55, after which the run is resumed at step 50."""
    path = write(tmp_path, range(1, 56))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:20], broken, *lines[21:]]))
    assert len(read_rows(path)) == 54
    write(tmp_path, [51, 52], last_step=50)
    assert path.read_bytes().splitlines(keepends=True) == [*lines[:20], *lines[21:52]]
    assert (tmp_path / "damaged/metrics.jsonl.lines").read_bytes() == broken
    assert capsys.readouterr().err == (
        f"note: {path}: line 21 is damaged and now in {tmp_path}/damaged/metrics.jsonl.lines; 49 rows are kept\n"
    )


def test_a_half_written_line_is_dropped_even_where_nothing_else_is(tmp_path):
    path = write(tmp_path, [1, 2])
    path.write_text(path.read_text() + '{"step": 3, "loss": 0.')
    write(tmp_path, [3], last_step=2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_starting_over_drops_everything(tmp_path):
    """A run killed before its first checkpoint starts at step 1 again."""
    path = write(tmp_path, [1, 2, 3])
    write(tmp_path, [1], last_step=0)
    assert [row["step"] for row in read_rows(path)] == [1]


def test_rows_read_up_to_a_line_cut_short(tmp_path):
    path = write(tmp_path, [1, 2])
    path.write_text(path.read_text() + '{"step"')
    assert [row["step"] for row in read_rows(path)] == [1, 2]


def test_tensorboard_gets_the_same_scalars(tmp_path):
    pytest.importorskip("tensorboardX")
    writer = MetricsWriter(tmp_path, LoggingConfig(tensorboard=True))
    writer.write(row_of(1, router_entropy=[[1.0, 2.0]]))
    writer.close()
    assert any((tmp_path / "tensorboard").iterdir())


@pytest.mark.parametrize("field, value", [("tensorboard", True), ("wandb", "project")])
def test_a_missing_extra_is_one_line(monkeypatch, field, value):
    def absent(module):
        raise ImportError(module)

    monkeypatch.setattr("spiral_jax.run.metrics.importlib.import_module", absent)
    with pytest.raises(SpiralError, match=rf"^logging\.{field} needs .*pip install 'spiral_jax\[{field}\]'$"):
        check_extras(LoggingConfig(**{field: value}))


# Rows are completed with what follows from step and time.

CONFIG = RunConfig(
    model=ModelConfig(vocab_size=64, d_model=32, num_heads=4, prelude_layers=1, core_layers=3, coda_layers=1,
                      chunks=(2, 1), dtype="float32"),
    train=TrainConfig(steps=10, batch_size=8, sequence_length=16),
)  # fmt: skip
ORDER = WindowOrder([40], batch_size=8, seed=0)


def completed(peak=None, order=ORDER, **values) -> dict:
    config = RunConfig(model=CONFIG.model, train=CONFIG.train, logging=LoggingConfig(peak_flops=peak))
    return complete_row(config, order, {"step": 5, "step_time": 0.25, "loss": 1.0, **values})


def test_mfu_against_flops_counted_by_hand():
    """Prelude, coda and the second iteration at 16 positions, the first at (16 + 1) // 2 = 8; three times forward."""
    d, V, peak = 32, 64, 1e9
    weights = 5 * 16 * 24 * d**2 + 3 * 8 * 24 * d**2 + 16 * 2 * V * d
    full = 5 * 4 * 16 * 16 * d + 3 * 4 * 8 * 8 * d
    # A causal mask keeps n (n + 1) / 2 of n^2 pairs.
    causal = 5 * 4 * (16 * 17 // 2) * d + 3 * 4 * (8 * 9 // 2) * d
    sequences_per_second = 8 / 0.25
    row = completed(peak)
    per_device = peak * jax.device_count()
    assert row["mfu"] == pytest.approx(3 * (weights + causal) * sequences_per_second / per_device, rel=1e-12)
    assert row["mfu_full_attention"] == pytest.approx(3 * (weights + full) * sequences_per_second / per_device)


def test_no_mfu_where_the_peak_is_unknown():
    row = completed()
    assert "mfu" not in row and "mfu_full_attention" not in row


def test_tokens_and_speed():
    row = completed()
    assert row["tokens"] == 5 * 8 * 16
    assert row["tokens_per_second"] == 8 * 16 / 0.25
    assert row["epoch"] == 5 * 8 / 40 and "epochs_of_stores" not in row


def test_epochs_of_each_store_of_a_mixture():
    order = WindowOrder([40, 5], batch_size=8, seed=0, weights=((0.75, 0.25),))
    row = completed(order=order)
    assert row["epoch"] == 5 * 8 / 45 and row["epochs_of_stores"] == [30 / 40, 10 / 5]


# The line on the terminal.


def test_a_line_is_printed_now_and_then(tmp_path, monkeypatch, capsys):
    """Every ten seconds; whenever something was evaluated; first and last."""
    now = 0.0
    monkeypatch.setattr("spiral_jax.progress.time.monotonic", lambda: now)
    config = RunConfig(
        model=CONFIG.model,
        train=dataclasses.replace(CONFIG.train, steps=100),
        logging=LoggingConfig(seconds=10, peak_flops=1e9),
    )
    record = Record(MetricsWriter(tmp_path, config.logging), config, ORDER, 0, [])
    for step in range(1, 101):
        now += 2.0
        values = {"validation_loss": 1.5, "validation_bits_per_byte": 2.25} if step == 33 else {}
        record({"step": step, "loss": 4 / step, "learning_rate": 1e-3, "step_time": 2.0, **values})
    record.close()
    lines = capsys.readouterr().out.splitlines()
    steps = [int(line.split("/")[0].removeprefix("step ")) for line in lines]
    assert steps == [*range(1, 32, 5), 33, *range(38, 99, 5), 100]
    assert "loss 4.0000" in lines[0] and "lr 1.00e-03" in lines[0] and "64 tokens/s" in lines[0]
    assert "MFU 0." in lines[0] and lines[0].endswith("ETA 3m18s")  # 99 steps of 2 s
    assert "2.2500 bits per byte" in lines[7]
    assert lines[-1].endswith("done")


def test_time_left_of_a_run_that_goes_on(tmp_path, monkeypatch, capsys):
    """The steps of earlier starts say nothing about the speed of this one."""
    now = 0.0
    monkeypatch.setattr("spiral_jax.progress.time.monotonic", lambda: now)
    train = dataclasses.replace(CONFIG.train, steps=100)
    writer = MetricsWriter(tmp_path, LoggingConfig(), last_step=40)
    record = Record(writer, RunConfig(model=CONFIG.model, train=train), ORDER, 40, [])
    now = 3.0
    record({"step": 41, "loss": 1.0, "learning_rate": 1e-3, "step_time": 3.0})
    record.close()
    assert capsys.readouterr().out.endswith("ETA 2m57s\n")  # 59 steps of 3 s


def test_a_loss_that_is_no_number_is_null(tmp_path):
    """JSON has no NaN; a row with one must still be read by any program."""
    writer = MetricsWriter(tmp_path, LoggingConfig())
    writer.write({"step": 1, "loss": math.nan, "router_entropy": [[1.0, math.inf]]})
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": null, "router_entropy": [[1.0, null]]}\n'
