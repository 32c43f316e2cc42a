"""One of two processes is asked to stop, killed, or stopped in a step: the other one ends and names it."""

import signal
import time
from pathlib import Path

import numpy as np
import pytest
from pairs import BATCH, STEPS, WINDOW, finished, flags_of, run_alone, start_pair

from spiral_jax.run import disk_hold
from spiral_jax.run.metrics import read_rows

STEP, SILENCE = 4, 8  # of which the batch is read when step 3 has been saved
LINE = "error: process {} is gone; the same command resumes\n"


@pytest.fixture(scope="module")
def alone(folder):
    """The run in one process of 8 devices: its rows, and the batches it read."""
    return run_alone(folder, "alone")


def take_over(folder, name):
    """As `run_alone`, in a directory whose owner is gone or stopped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk_hold, "SECONDS_OF_SILENCE", 4.0)
        return run_alone(folder, name)


def files_of(workdir):
    return {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("kind", ["SIGTERM", "SIGKILL", "SIGSTOP"])
def test_the_other_ends_and_the_run_goes_on_elsewhere(folder, alone, kind, victim):
    name = f"{kind}-{victim}"
    flags = (*flags_of(folder, name), f"--config.deadlines.silence_seconds={SILENCE}")
    running = start_pair(folder, "train", *flags, sabotage=f"{folder}/{name}:{kind}:{victim}:{STEP}")
    try:
        other = finished(running[1 - victim], 120)
        step = 3
        if kind == "SIGTERM":
            step, asked = STEP + 1, finished(running[victim], 10)
            assert (asked.returncode, other.returncode) == (42, 42), asked.stderr + other.stderr
            assert f"stopped after step {step} of {STEPS}, saved" in asked.stderr + other.stderr
        else:
            assert (other.returncode, other.stderr) == (43, LINE.format(victim))
        resumed = take_over(folder, name)
        assert [row["step"] for row in resumed.rows] == list(range(1, STEPS + 1))
        assert min(resumed.batches) == step + 1
        for number, batch_BxW in resumed.batches.items():
            if number <= STEPS:
                np.testing.assert_array_equal(batch_BxW, alone.batches[number])
        for row, expected in zip(resumed.rows, alone.rows, strict=True):
            assert row["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        parts = [np.load(folder / f"{name}-{process}-2.npy") for process in (0, 1)]
        np.testing.assert_array_equal(np.stack(parts, 1).reshape(BATCH, WINDOW), alone.batches[2])
        if kind == "SIGSTOP":
            before = files_of(folder / name)
            running[victim].send_signal(signal.SIGCONT)
            stopped = finished(running[victim], 60)
            assert stopped.returncode == 43 and stopped.stderr.count("\n") == 1, stopped.stderr
            assert files_of(folder / name) == before
    finally:
        for process in running:
            process.kill()


def is_stopped(process) -> bool:
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


@pytest.mark.slow
def test_a_short_stop_ends_nothing(folder, alone):
    flags = (*flags_of(folder, "short"), f"--config.deadlines.silence_seconds={4 * SILENCE}")
    running = start_pair(folder, "train", *flags, sabotage=":SIGSTOP:1:5")
    try:
        workdir = folder / "short"
        deadline = time.monotonic() + 90
        while not is_stopped(running[1]):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        time.sleep(8)
        running[1].send_signal(signal.SIGCONT)
        done = [finished(process, 90) for process in running]
        assert [process.returncode for process in done] == [0, 0], done[0].stderr + done[1].stderr
        for row, expected in zip(read_rows(workdir / "metrics.jsonl"), alone.rows, strict=True):
            assert row["loss"] == pytest.approx(expected["loss"], abs=1e-5)
    finally:
        for process in running:
            process.kill()


@pytest.mark.slow
def test_checkpoints_by_time_are_of_the_same_steps_on_all(folder, start):
    """Process 0 decides."""
    flags = (*flags_of(folder, "timed"), "--config.checkpoint.every_steps=100", "--config.checkpoint.keep=9")
    done = start("train", *flags, "--config.checkpoint.every_minutes=1e-9")
    assert [process.returncode for process in done] == [0, 0], done[0].stderr + done[1].stderr
    # Agreed one step late, as everything is.
    steps = sorted(int(path.name) for path in (folder / "timed/checkpoints").iterdir())
    assert steps == list(range(2, STEPS + 1))
