"""Runs of the real command, stopped, killed and resumed: bitwise the run that was left alone.

Real subprocesses (tests/test_punish.py has forks, and more that can happen). The configuration file carries the
sabotage: it makes the process signal itself while it writes the row of a step, so that every run stops at the same
place.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import spiral_jax
from spiral_jax.parallel.xla_flags import quick_flags
from spiral_jax.run.metrics import read_rows

ROOT = Path(__file__).parents[2]
STEPS = 20
COMPARED = ("step", "loss", "learning_rate", "gradient_norm", "tokens", "router_entropy", "epoch")
# 62 windows: the 20 steps of 4 run on into the second epoch.
TEXT = " ".join(f"{n} times {n} is {n * n}." for n in range(100, 215))
CONFIG = """
import os, signal, time
from pathlib import Path
from spiral_jax.run import metrics
from spiral_jax.run.config import default_config


def get_config():
    c = default_config()
    c.model.update(dict(vocab_size=264, d_model=16, num_heads=2, prelude_layers=0, core_layers=1, coda_layers=0,
                        chunks=(2, 1), rotary_fraction=0.5, dtype="float32"))
    c.train.update(dict(steps=20, batch_size=4, sequence_length=32, accumulation=2, loss_block=20))
    c.optimizer.update(dict(peak_learning_rate=1e-2, warmup_steps=3))
    c.data.update(dict(paths=("TEXT",), validation_fraction=0.1))
    c.mesh.fsdp = 2
    c.checkpoint.every_steps = 10
    c.evaluation.every_steps = 10
    return c


def sabotage(kind, step):
    write = metrics.MetricsWriter.write

    def write_and_die(self, row):
        if row["step"] != step:
            return write(self, row)
        if kind == "SIGTERM":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)  # a thread takes it
            return write(self, row)
        while not (self._path.parent / "checkpoints" / "10").is_dir():
            time.sleep(0.01)  # it is being saved meanwhile
        with self._path.open("a") as file:
            file.write('{"step": %d, "loss": 1.' % step)
        os.kill(os.getpid(), signal.SIGKILL)

    metrics.MetricsWriter.write = write_and_die


if "SABOTAGE" in os.environ:
    kind, step = os.environ["SABOTAGE"].split(":")
    sabotage(kind, int(step))
"""


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """(workdir's name, flags, sabotage) to the finished command."""
    folder = tmp_path_factory.mktemp("resume")
    (folder / "text.txt").write_text(TEXT)
    (folder / "config.py").write_text(CONFIG.replace("TEXT", str(folder / "text.txt")))
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=2 {quick_flags()}",
        "PYTHONPATH": str(ROOT),
        "JAX_LOG_COMPILES": "1",
    }
    environment.pop("SABOTAGE", None)

    def run(name, *flags, sabotage=None) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "spiral_jax.train", f"--config={folder / 'config.py'}",
                   f"--workdir={folder / name}", *flags]  # fmt: skip
        extra = {"SABOTAGE": sabotage} if sabotage else {}
        done = subprocess.run(
            command, env=environment | extra, cwd=folder, capture_output=True, text=True, timeout=300, check=False
        )
        done.workdir = folder / name
        return done

    return run


@pytest.fixture(scope="module")
def straight(train):
    """20 steps, left alone."""
    done = train("straight")
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def interrupted(train):
    """Asked to stop at step 4; killed at step 13, in the middle of a line; then run to the end."""
    stopped = train("interrupted", sabotage="SIGTERM:4")
    rows = read_rows(stopped.workdir / "metrics.jsonl")
    killed = train("interrupted", sabotage="SIGKILL:13")
    left = (killed.workdir / "metrics.jsonl").read_text()
    finished = train("interrupted", "--config.evaluation.every_steps=5")
    return stopped, rows, killed, left, finished


def test_the_run_reports_every_step(straight):
    rows = read_rows(straight.workdir / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row in rows:
        assert set(COMPARED) <= row.keys()
        assert row["tokens"] == row["step"] * 4 * 32
        assert row["tokens_per_second"] == pytest.approx(4 * 32 / row["step_time"])
        assert row["input_wait"] >= 0
        assert "mfu" not in row  # no peak is known for a CPU
        # Write and read routers of the transition and of both iterations, in nats of 5 slots.
        entropy_3x2 = np.array(row["router_entropy"])
        assert entropy_3x2.shape == (3, 2)
        assert np.all((entropy_3x2 > 0) & (entropy_3x2 < np.log(5) + 1e-6))
    assert rows[0]["loss"] == pytest.approx(np.log(264), rel=0.05)
    assert rows[-1]["loss"] < rows[0]["loss"] - 1
    assert rows[0]["learning_rate"] == pytest.approx(1e-2 / 3) and rows[-1]["learning_rate"] == pytest.approx(1e-3)
    assert [row["step"] for row in rows if "validation_loss" in row] == [10, 20]


def test_the_run_compiles_each_program_once(straight):
    """From the log of every compilation, evaluations and checkpoints included."""
    # Older versions of jax log every line twice: the same name after the same time is the same compilation.
    lines = set(re.findall(r"Finished XLA compilation of jit\((\w+)\) in ([\d.e-]+) sec", straight.stderr))
    compiled = [name for name, _ in lines]
    assert compiled.count("train_step") == 1
    assert compiled.count("eval_step") == 1


def test_the_run_leaves_what_it_was_made_of(straight):
    files = {path.name for path in straight.workdir.iterdir()}
    assert {"config.json", "parameters.txt", "environment.json", "metrics.jsonl", "checkpoints"} <= files
    (start,) = json.loads((straight.workdir / "environment.json").read_text())
    assert start["mesh"] == {"data": 1, "fsdp": 2, "tensor": 1}
    model, params = spiral_jax.load(straight.workdir)
    total = sum(x.size for x in jax.tree.leaves(params))
    assert total == model.config.total_parameters
    assert f"{total:,}" in (straight.workdir / "parameters.txt").read_text().splitlines()[-1]


@pytest.mark.slow
def test_sigterm_saves_and_says_so(interrupted):
    stopped, rows, *_ = interrupted
    assert stopped.returncode == 42, stopped.stderr
    assert "Traceback" not in stopped.stderr
    # The row of step 4 is written while step 5 runs; the loop then finishes step 5.
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert "stopped after step 5 of 20, saved; the same command resumes" in stopped.stderr


@pytest.mark.slow
def test_the_kill_was_a_kill(interrupted):
    """The premise: rows past the last checkpoint, and a last line cut short."""
    *_, killed, left, _ = interrupted
    assert killed.returncode == -9, killed.stderr
    assert "resuming after step 5 of 20" in killed.stdout
    lines = left.splitlines()
    assert [json.loads(line)["step"] for line in lines[:-1]] == list(range(1, 13))
    assert lines[-1] == '{"step": 13, "loss": 1.'


def assert_same_rows(found, expected):
    """JSON holds the shortest text that reads back as the same float: equal text, equal bits."""
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    for a, b in zip(expected, found, strict=True):
        assert {name: a[name] for name in COMPARED} == {name: b[name] for name in COMPARED}


@pytest.mark.slow
def test_resuming_is_bitwise(straight, interrupted):
    """Same rows, no step twice, same parameters, as if nothing had happened."""
    *_, finished = interrupted
    assert finished.returncode == 0, finished.stderr
    assert "resuming after step 10 of 20" in finished.stdout
    expected, found = (read_rows(run.workdir / "metrics.jsonl") for run in (straight, finished))
    assert_same_rows(found, expected)
    for step in (10, 20):
        assert expected[step - 1]["validation_loss"] == found[step - 1]["validation_loss"]
    # The evaluation may change on resume.
    assert [row["step"] for row in found if "validation_loss" in row] == [10, 15, 20]
    (_, a), (_, b) = (spiral_jax.load(run.workdir) for run in (straight, finished))
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_another_recipe_is_refused(train, straight):
    before = (straight.workdir / "metrics.jsonl").read_bytes(), (straight.workdir / "config.json").read_bytes()
    done = train("straight", "--config.optimizer.peak_learning_rate=0.02")
    assert done.returncode == 2
    (message,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "optimizer.peak_learning_rate" in message and "0.01" in message and "0.02" in message
    assert "train_step" not in done.stderr, "it was compiled before it was refused"
    assert "Traceback" not in done.stderr
    after = (straight.workdir / "metrics.jsonl").read_bytes(), (straight.workdir / "config.json").read_bytes()
    assert after == before


@pytest.mark.slow
def test_a_finished_run_says_so(train, straight):
    before = (straight.workdir / "metrics.jsonl").read_bytes()
    done = train("straight")
    assert done.returncode == 0, done.stderr
    assert "finished: 20 steps" in done.stdout
    assert "train_step" not in done.stderr
    assert (straight.workdir / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_resuming_on_another_mesh_continues_the_run(train, straight):
    """Other devices sum in another order: equal but for rounding."""
    train("moved", sabotage="SIGKILL:13")
    done = train("moved", "--config.mesh.fsdp=1", "--config.mesh.tensor=2", "--config.train.accumulation=1")
    assert done.returncode == 0, done.stderr
    expected, found = (read_rows(run.workdir / "metrics.jsonl") for run in (straight, done))
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    for a, b in zip(expected, found, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert b["learning_rate"] == a["learning_rate"] and b["tokens"] == a["tokens"]


def flip_a_bit(folder: Path) -> None:
    """In the largest file of the parameters."""
    path = max(
        (path for path in (folder / "params").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 16
    path.write_bytes(raw)


@pytest.fixture(scope="module")
def damaged(train, straight):
    """A copy of the finished run whose newest checkpoint is damaged, and what evaluate says of it; then run again."""
    workdir = straight.workdir.with_name("damaged")
    shutil.copytree(straight.workdir, workdir)
    flip_a_bit(workdir / "checkpoints" / "20")
    command = [sys.executable, "-m", "spiral_jax.evaluate", f"--workdir={workdir}"]
    on_cpu = os.environ | {"JAX_PLATFORMS": "cpu"}
    refused = subprocess.run(command, cwd=ROOT, env=on_cpu, capture_output=True, text=True, timeout=300, check=False)
    return refused, train("damaged")


@pytest.mark.slow
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_resumed(damaged, straight):
    """In a line; the end is that of the run whose checkpoint was whole, bit by bit."""
    _, done = damaged
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "is damaged" in line]
    folder = done.workdir / "checkpoints" / "20"
    assert len(lines) == 1 and lines[0].startswith(f"{folder} is damaged (")
    assert lines[0].endswith(f"; it is now {done.workdir}/damaged/20.0, and the run goes on from step 10")
    assert "resuming after step 10 of 20" in done.stdout and "Traceback" not in done.stderr
    assert_same_rows(read_rows(done.workdir / "metrics.jsonl"), read_rows(straight.workdir / "metrics.jsonl"))
    _, params = spiral_jax.load(done.workdir)
    _, wanted = spiral_jax.load(straight.workdir)
    assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(wanted), strict=True))


@pytest.mark.slow
def test_readers_refuse_a_damaged_checkpoint_and_name_one_that_is_whole(damaged):
    refused, done = damaged
    errors = refused.stderr.splitlines()
    assert refused.returncode == 2 and refused.stdout == "" and len(errors) == 1, refused.stderr
    assert errors[0].startswith(f"error: {done.workdir}/checkpoints/20 is damaged (")
    assert errors[0].endswith("; allowed: --step=10")


def test_a_run_without_a_whole_checkpoint_is_not_begun_anew(train, straight):
    workdir = straight.workdir.with_name("lost")
    shutil.copytree(straight.workdir, workdir)
    for step in (10, 20):
        flip_a_bit(workdir / "checkpoints" / str(step))
    done = train("lost")
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and "none of 2 checkpoints is whole; allowed: another --workdir" in line
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["10", "20"]
