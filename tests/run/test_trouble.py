"""The real commands on a disk in trouble, and on a run whose files are damaged."""

import json
import shutil
import subprocess
import time

import jax
import numpy as np
import pytest
from cases import slow
from full_disk import small_disk
from verbs import call

import spiral_jax
from spiral_jax import evaluate, export, generate, train
from spiral_jax.errors import SpiralError
from spiral_jax.run.metrics import read_rows
from spiral_jax.run.record import Record

STEPS = 8
CONFIG = """
from spiral_jax.run.config import default_config


def get_config():
    c = default_config()
    c.model.update(dict(vocab_size=264, d_model=16, num_heads=2, prelude_layers=0, core_layers=1, coda_layers=0,
                        chunks=(2, 1), rotary_fraction=0.5, dtype="float32"))
    c.train.update(dict(steps=8, batch_size=8, sequence_length=16))
    c.data.update(dict(paths=("TEXT",), validation_fraction=0.2))
    c.checkpoint.every_steps = 2
    c.evaluation.every_steps = 0
    return c
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A text, a configuration, and the run that met no trouble."""
    folder = tmp_path_factory.mktemp("trouble")
    (folder / "text.txt").write_text(" ".join(f"{n} times {n} is {n * n}." for n in range(100, 215)))
    (folder / "config.py").write_text(CONFIG.replace("TEXT", str(folder / "text.txt")))
    assert run(folder, folder / "straight") == (0, "")
    return folder


def run(folder, workdir, *flags) -> tuple[int, str]:
    return call(train, f"--config={folder}/config.py", f"--workdir={workdir}", *flags)


def at_row(monkeypatch, step, action, saved=None):
    """Does something when the row of a step is recorded, right before its save, and when `saved` is complete."""
    record = Record.__call__

    def record_and_act(self, row):
        record(self, row)
        if row["step"] == step:
            while saved is not None and not saved.is_dir():
                time.sleep(0.01)
            action()

    monkeypatch.setattr(Record, "__call__", record_and_act)


def assert_same_run(folder, workdir, steps=range(1, STEPS + 1)):
    """Same rows, same parameters, bit by bit."""
    ours, theirs = (read_rows(place / "metrics.jsonl") for place in (workdir, folder / "straight"))
    assert [row["step"] for row in ours] == list(steps)
    theirs = [row for row in theirs if row["step"] in steps]
    for name in ("loss", "learning_rate", "gradient_norm"):
        assert [row[name] for row in ours] == [row[name] for row in theirs]
    (_, a), (_, b) = spiral_jax.load(workdir), spiral_jax.load(folder / "straight")
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def errors_of(errors: str) -> list[str]:
    """Lines of stderr but the notes that rows wait for the disk."""
    return [line for line in errors.splitlines() if "metrics.jsonl" not in line]


def fill(disk):
    return lambda: disk.leave(30_000)


def make_read_only(disk):
    folder = str(disk.folder / "run/checkpoints")

    def act():
        subprocess.run(["mount", "--bind", folder, folder], check=True)
        subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)

    return act


def move_away(disk):
    return lambda: (disk.folder / "run").rename(disk.folder / "elsewhere")


TROUBLE = {
    "full": (fill, "cannot be saved (No space left on device)"),
    "read-only": (make_read_only, "cannot be saved (Read-only file system)"),
    "moved": (move_away, "is not there any more"),
}


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind != "full")) for kind in TROUBLE])
def test_trouble_at_a_save_is_one_line_and_the_run_goes_on_once_it_is_over(folder, tmp_path, monkeypatch, kind):
    act, reason = TROUBLE[kind]
    with small_disk(tmp_path / "disk", megabytes=8) as disk:
        workdir = disk.folder / "run"
        with monkeypatch.context() as patch:
            at_row(patch, 4, act(disk), workdir / "checkpoints/2")
            status, errors = run(folder, workdir)
        (line,) = errors_of(errors)
        assert status == 2 and line.startswith(f"error: {workdir}/checkpoints/4 cannot be saved ("), errors
        assert reason in line and line.endswith("; the newest checkpoint is of step 2")
        if kind == "moved":
            assert not workdir.exists()
            (disk.folder / "elsewhere").rename(workdir)
        elif kind == "read-only":
            subprocess.run(["umount", "-l", str(workdir / "checkpoints")], check=True)
        disk.free()
        assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["2"]
        assert run(folder, workdir) == (0, "")
        assert_same_run(folder, workdir)


@pytest.mark.slow
def test_a_run_may_go_on_without_its_checkpoint(folder, tmp_path, monkeypatch):
    """The disk is full for two of its saves; it has the last one, and every row."""
    with small_disk(tmp_path / "disk", megabytes=8) as disk:
        workdir = disk.folder / "run"
        with monkeypatch.context() as patch:
            at_row(patch, 2, lambda: disk.leave(0))
            at_row(patch, 6, disk.free)
            status, errors = run(folder, workdir, "--config.checkpoint.on_failure=go_on")
        assert status == 0, errors
        lines = errors_of(errors)
        assert [line.partition(" cannot be saved")[0] for line in lines] == [
            f"note: {workdir}/checkpoints/{step}" for step in (2, 4)
        ]
        assert all(line.endswith("; training goes on, and saves again when it is due") for line in lines)
        assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["6", "8"]
        assert_same_run(folder, workdir)


@pytest.mark.slow
def test_a_run_whose_last_save_fails_is_not_finished(folder, tmp_path, monkeypatch):
    with small_disk(tmp_path / "disk", megabytes=8) as disk:
        workdir = disk.folder / "run"
        with monkeypatch.context() as patch:
            at_row(patch, 8, fill(disk), workdir / "checkpoints/6")
            status, errors = run(folder, workdir, "--config.checkpoint.on_failure=go_on")
        (line,) = errors_of(errors)
        assert status == 2 and line.startswith(f"error: {workdir}/checkpoints/8 cannot be saved (")
        assert line.endswith("; the newest checkpoint is of step 6")


@pytest.mark.slow
@pytest.mark.parametrize("room", [0, 4096, 20_000, 60_000])
def test_a_start_on_a_full_disk_is_one_line(folder, tmp_path, room):
    with small_disk(tmp_path / "disk", megabytes=8) as disk:
        disk.leave(room)
        status, errors = run(folder, disk.folder / "run")
        assert status == 2 and len(errors_of(errors)) == 1 and "No space left on device" in errors, errors


# What is damaged.


@pytest.fixture
def copy(folder, tmp_path):
    """The finished run, to be damaged."""
    workdir = tmp_path / "run"
    shutil.copytree(folder / "straight", workdir)
    return workdir


def damage_side_files(workdir):
    lines = (workdir / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    lines[2] = b"\xff\x00" + lines[2][:20] + b"\n"
    lines[4] = b"[1]\n"
    (workdir / "metrics.jsonl").write_bytes(b"".join(lines) + b'{"step": 9, "lo')
    for name, content in (
        ("environment.json", b""),
        ("data.json", b"{"),
        ("own_code.json", b"[1]"),
        ("config.json", b"\x00" * 40),
        ("parameters.txt", b""),
        ("wandb_id", b"\xff\xfe"),
        (".lock", b"\xff"),
        ("tokenizer/tokenizer.json", b"{"),
    ):
        (workdir / name).write_bytes(content)


def test_side_files_stop_no_resume_and_lose_no_row(folder, copy, capsys):
    shutil.rmtree(copy / "checkpoints" / str(STEPS))
    damage_side_files(copy)
    capsys.readouterr()
    status, errors = run(folder, copy)
    said = capsys.readouterr().out
    assert status == 0, errors
    assert f"resuming after step 6 of {STEPS}" in said
    for name in ("environment.json", "data.json", "own_code.json", "wandb_id"):
        (line,) = (line for line in said.splitlines() if line.startswith(f"note: {copy}/{name} is damaged ("))
        assert line.endswith(f"; it is now {copy}/damaged/{name}.0, and written anew")
    assert errors == (
        f"note: {copy}/metrics.jsonl: lines 3, 5 are damaged and now in {copy}/damaged/metrics.jsonl.lines; "
        "4 rows are kept\n"
    )
    assert (copy / "damaged/metrics.jsonl.lines").read_bytes().splitlines()[1] == b"[1]"
    assert_same_run(folder, copy, steps=(1, 2, 4, 6, 7, 8))
    assert len(json.loads((copy / "environment.json").read_text())) == 1
    assert json.loads((copy / "config.json").read_text())["train"]["steps"] == STEPS
    assert call(evaluate, f"--workdir={copy}", "--json") == (0, "")


def lose(checkpoint):
    (checkpoint / "training" / "_METADATA").unlink()


def halve(checkpoint):
    path = checkpoint / "params" / "manifest.ocdbt"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def replace_by_another(checkpoint):
    shutil.rmtree(checkpoint)
    shutil.copytree(checkpoint.with_name("6"), checkpoint)


@pytest.mark.slow
@pytest.mark.parametrize("damage", [lose, halve, replace_by_another])
def test_train_falls_back(folder, copy, capsys, damage):
    damage(copy / "checkpoints" / str(STEPS))
    capsys.readouterr()
    assert run(folder, copy) == (0, "")
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "damaged" in line)
    assert line.startswith(f"{copy}/checkpoints/{STEPS} is damaged (")
    assert line.endswith(f"; it is now {copy}/damaged/{STEPS}.0, and the run goes on from step 6")
    assert_same_run(folder, copy)


def readers(workdir, output):
    return {
        "evaluate": lambda *flags: call(evaluate, f"--workdir={workdir}", "--json", *flags),
        "export": lambda *flags: call(export, f"--workdir={workdir}", f"--output={output}", *flags),
        "generate": lambda *flags: call(generate, f"--workdir={workdir}", "--prompt=1", "--max_new_tokens=2", *flags),
        "load": lambda *flags: load(workdir, *flags),
    }


def load(workdir, *flags):
    try:
        spiral_jax.load(workdir, step=int(flags[0].partition("=")[2]) if flags else None)
    except SpiralError as error:
        return 2, f"error: {error}\n"
    return 0, ""


def flip_a_bit(checkpoint, item):
    """In every file with data, as nobody reads all of the others."""
    files = [path for path in (checkpoint / item).rglob("*") if path.is_file()]
    data = [path for path in files if path.parent.name == "d"]
    for path in data or [max(files, key=lambda p: p.stat().st_size)]:
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 16
        path.write_bytes(raw)


@pytest.mark.parametrize("item", ["params", "meta"])
@pytest.mark.parametrize("verb", ["export", *(slow(verb) for verb in ("evaluate", "generate", "load"))])
def test_readers_refuse_what_is_damaged_and_name_what_is_whole(copy, tmp_path, capsys, verb, item):
    """Also where the one before is damaged, too; and then read that."""
    for step in (8, 6):
        flip_a_bit(copy / "checkpoints" / str(step), item)
    read = readers(copy, tmp_path / "out")[verb]
    status, errors = read()
    assert status == 2 and errors.startswith(f"error: {copy}/checkpoints/8 is damaged ("), errors
    assert errors.endswith("; allowed: --step=4\n") and errors.count("\n") == 1
    assert not (tmp_path / "out").exists()
    if item == "meta":
        assert read("--step=4")[0] == 0
    flip_a_bit(copy / "checkpoints/4", item)
    status, errors = read()
    assert status == 2 and errors.endswith("; allowed: another run\n") and errors.count("\n") == 1


@pytest.mark.slow
def test_readers_need_no_config_json(folder, copy, tmp_path, capsys):
    """Nor are they misled by one in which a digit was changed."""
    changed = (copy / "config.json").read_text().replace('"rotary_fraction": 0.5', '"rotary_fraction": 1.0')
    assert changed != (copy / "config.json").read_text()
    for number, content in enumerate((changed, "{")):
        (copy / "config.json").write_text(content)
        for read in readers(copy, tmp_path / f"out{number}").values():
            status, errors = read()
            assert status == 0 and "error" not in errors, errors
    assert spiral_jax.load(copy)[0].config == spiral_jax.load(folder / "straight")[0].config


def test_rows_wait_for_a_full_disk(tmp_path, capsys):
    from spiral_jax.run.metrics import LoggingConfig, MetricsWriter

    with small_disk(tmp_path / "disk", megabytes=1) as disk:
        writer = MetricsWriter(disk.folder, LoggingConfig())
        rows = [{"step": step, "text": "x" * 700} for step in range(1, 21)]
        for row in rows:
            if row["step"] == 5:
                disk.leave(0)
            if row["step"] == 15:
                disk.free()
            writer.write(row)
        writer.close()
        assert read_rows(disk.folder / "metrics.jsonl") == rows
        refused, again = capsys.readouterr().err.splitlines()
        assert "cannot be written (No space left on device); training goes on" in refused
        assert again.endswith("metrics.jsonl: written again, every row of it")


def test_a_mirror_that_fails_is_left_out(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tensorboardX")
    from spiral_jax.run.metrics import LoggingConfig, MetricsWriter

    with small_disk(tmp_path / "disk", megabytes=1) as disk:
        writer = MetricsWriter(disk.folder, LoggingConfig(tensorboard=True))
        writer.write({"step": 1, "loss": 1.0})
        disk.leave(0)
        for step in range(2, 200):
            writer.write({"step": step, "loss": 1.0})
        disk.free()
        writer.write({"step": 200, "loss": 1.0})
        writer.close()
        assert len(read_rows(disk.folder / "metrics.jsonl")) == 200
        mirrors = [line for line in capsys.readouterr().err.splitlines() if "TensorBoard" in line]
        assert len(mirrors) == 1 and "takes no rows any more" in mirrors[0]
