"""The real command, asked to stop by a signal: in an evaluation, and at any moment of its start."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pairs import ROOT, flags_of, write_inputs
from verbs import call

from spiral_jax import train
from spiral_jax.evaluation.perplexity import WindowScorer
from spiral_jax.parallel import signals
from spiral_jax.run.metrics import read_rows

COMPARED = ("step", "loss", "learning_rate", "gradient_norm", "tokens", "validation_loss")
NO_SAMPLE = "--config.summary.sample_tokens=0"


@pytest.fixture
def handlers():
    """After a request the process that got it is about to end, and keeps its handlers: this one goes on."""
    numbers = (*signals.STOPPING, signal.SIGCONT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    signal.set_wakeup_fd(-1)
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.slow
def test_in_an_evaluation_no_step_is_lost_and_the_evaluation_is_left(tmp_path, monkeypatch, handlers, capsys):
    """Twice within a second, as some clusters do; the end is that of the run that was left alone."""
    write_inputs(tmp_path)
    batches = []
    score = WindowScorer.__call__

    def score_and_signal(self, *arguments):
        batches.append(1)
        if len(batches) == 2:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.3)
        return score(self, *arguments)

    monkeypatch.setattr(WindowScorer, "__call__", score_and_signal)
    status, errors = call(train, *flags_of(tmp_path, "run"), NO_SAMPLE)
    assert (status, errors) == (42, "stopped after step 3 of 6, saved; the same command resumes\n")
    assert len(batches) == 2
    rows = read_rows(tmp_path / "run/metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3] and not any("validation_loss" in row for row in rows)
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["3"]
    assert json.loads((tmp_path / "run/checkpoints/3/meta/metadata").read_text())["step"] == 3
    capsys.readouterr()
    for name in ("run", "alone"):
        assert call(train, *flags_of(tmp_path, name), NO_SAMPLE) == (0, "")
    assert "resuming after step 3 of 6" in capsys.readouterr().out
    found, expected = (read_rows(tmp_path / name / "metrics.jsonl") for name in ("run", "alone"))
    assert [{n: row.get(n) for n in COMPARED} for row in found] == [
        {n: row.get(n) for n in COMPARED} for row in expected
    ]  # that of step 3, too
    assert [row["step"] for row in found if "validation_loss" in row] == [3, 6]


def catches_sigint(pid: int) -> bool:
    """Whether the process has got as far as our first line."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (caught,) = (line.split()[1] for line in lines if line.startswith("SigCgt"))
    return bool(int(caught, 16) & 1 << signal.SIGTERM - 1)


@pytest.mark.slow
def test_every_sigint_during_the_start_ends_the_process(tmp_path):
    """28 of them; before the first step nothing can be saved, and after it a checkpoint is."""
    write_inputs(tmp_path)

    def start(name):
        command = [sys.executable, "-m", "spiral_jax.train", *flags_of(tmp_path, name), NO_SAMPLE]
        process = subprocess.Popen(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
        while not catches_sigint(process.pid):
            time.sleep(0.005)
        return process, time.monotonic()

    for name in ("cold", "whole"):  # what the first has compiled, the others find
        process, begin = start(name)
        while "compiled in" not in process.stdout.readline():
            assert process.poll() is None
        seconds = time.monotonic() - begin
        assert process.communicate(timeout=120)[1] == "" and process.returncode == 0
    moments = random.Random(0)
    for number in range(28):
        process, begin = start(f"run{number}")
        moment = moments.uniform(0, seconds)
        time.sleep(moment)
        process.send_signal(signal.SIGINT)
        sent = time.monotonic()
        _, errors = process.communicate(timeout=60)
        assert errors.count("\n") == 1 and errors.startswith("stopped "), (moment, errors)
        assert process.returncode in (130, 42), (moment, errors)
        assert process.returncode == 42 or time.monotonic() - sent < 5, moment
