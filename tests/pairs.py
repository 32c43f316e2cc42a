"""Pairs of processes that run a verb as one run: 2 x 4 CPU devices against the 1 x 8 of the tests' own process.

The configuration file carries the sabotage: it records the rows that a process reads, and makes one process fail or
signal itself at a step.
"""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from verbs import call

from spiral_jax import train
from spiral_jax.data import pipeline
from spiral_jax.parallel.xla_flags import quick_flags
from spiral_jax.run.metrics import read_rows

ROOT = Path(__file__).parents[1]
STEPS, STOPPED, BATCH, WINDOW = 6, 5, 8, 17
CONFIG = """
import os, signal, time
import numpy as np
from spiral_jax.run import metrics
from spiral_jax.run.config import default_config
from spiral_jax.data import pipeline
from spiral_jax.errors import SpiralError


def get_config(argument=""):
    c = default_config()
    c.model.update(dict(vocab_size=264, d_model=32, num_heads=8, prelude_layers=0, core_layers=1, coda_layers=0,
                        chunks=(2, 1), rotary_fraction=0.5, dtype="float32"))
    c.train.update(dict(steps=6, batch_size=8, sequence_length=16))
    c.optimizer.update(dict(peak_learning_rate=1e-2, warmup_steps=2))
    c.data.update(dict(paths=("TEXT",), validation_fraction=0.2))
    c.mesh.update(dict(data=2, fsdp=4))
    c.checkpoint.every_steps = 3
    c.evaluation.every_steps = 3
    c.summary.sample_tokens = 4
    return c


def sabotage(record, kind, process, step):
    read = pipeline.TrainBatches.__next__

    def read_and_act(self):
        batch = read(self)
        if record:
            np.save(f"{record}-{os.environ['JAX_PROCESS_ID']}-{self.step}.npy", batch)
        if self.step == int(step) and os.environ["JAX_PROCESS_ID"] == process:
            if kind == "fail":
                raise SpiralError("a file of process 1: broken")
            if kind == "crash":
                raise RuntimeError("a defect")
            while kind in ("SIGKILL", "SIGSTOP") and record and not os.path.isdir(f"{record}/checkpoints/3"):
                time.sleep(0.05)
            os.kill(os.getpid(), signal.Signals[kind])
            time.sleep(0.3)  # a thread takes it
        return batch

    pipeline.TrainBatches.__next__ = read_and_act


def refuse(self, *_, **__):
    raise RuntimeError("process 1 opens the metrics")


if "SABOTAGE" in os.environ:
    if os.environ["JAX_PROCESS_ID"] != "0":
        # The file would not tell: the second process to open it renames it away from under the first.
        metrics.MetricsWriter.__init__ = refuse
    sabotage(*os.environ["SABOTAGE"].split(":"))
"""


def write_inputs(folder: Path) -> None:
    """A text and a configuration file that trains on it."""
    (folder / "text.txt").write_text(" ".join(f"{n} times {n} is {n * n}." for n in range(100, 215)))
    (folder / "config.py").write_text(CONFIG.replace("TEXT", str(folder / "text.txt")))


def flags_of(folder: Path, name: str) -> tuple[str, str]:
    return f"--config={folder}/config.py", f"--workdir={folder}/{name}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_pair(folder, verb, *flags, sabotage="", first=(), second=(), timeout=300) -> list[SimpleNamespace]:
    """Two finished processes.

    Args:
      folder: where they run.
      verb: what they run.
      flags: of both.
      sabotage: RECORD:KIND:PROCESS:STEP for the configuration file; RECORD is a run's directory, or nothing.
      first: flags of process 0 alone.
      second: flags of process 1 alone.
      timeout: seconds, after which the test fails.
    """
    running = start_pair(folder, verb, *flags, sabotage=sabotage, first=first, second=second)
    try:
        deadline = time.monotonic() + timeout
        return [finished(process, deadline - time.monotonic()) for process in running]
    finally:
        for process in running:
            process.kill()


def start_pair(folder, verb, *flags, sabotage="", first=(), second=()) -> list[subprocess.Popen]:
    """As `run_pair`, but just started."""
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=4 {quick_flags()}",
        "PYTHONPATH": str(ROOT),
        "JAX_NUM_PROCESSES": "2",
    }
    environment.pop("TF_CPP_MIN_LOG_LEVEL", None)  # jax has set it in this process
    address = f"--coordinator_address=127.0.0.1:{free_port()}"
    running = []
    for process in (0, 1):
        command = [sys.executable, "-m", f"spiral_jax.{verb}", *flags, address, *(second if process else first)]
        extra = {"JAX_PROCESS_ID": str(process)} | ({"SABOTAGE": sabotage} if sabotage else {})
        running.append(
            subprocess.Popen(
                command, env=environment | extra, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
        )
    return running


def finished(process: subprocess.Popen, timeout: float) -> SimpleNamespace:
    """What a process has come to."""
    out, errors = process.communicate(timeout=max(0.1, timeout))
    return SimpleNamespace(returncode=process.returncode, stdout=out, stderr=errors)


def both_end(done, named: str, status=2):
    """Every process ends with the status and one line, whichever of them met the error."""
    for process in done:
        assert process.returncode == status, process.stderr
        assert process.stderr.startswith("error: ") and process.stderr.count("\n") == 1, process.stderr
        assert named in process.stderr


def run_alone(folder, name):
    """The run in this process, of 8 devices: its rows, and the batches it read, step to tokens [B, W]."""
    batches = {}
    read = pipeline.TrainBatches.__next__

    def record(self):
        batch = read(self)
        batches[self.step] = batch
        return batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.TrainBatches, "__next__", record)
        assert call(train, *flags_of(folder, name), "--config.summary.sample_tokens=0") == (0, "")
    return SimpleNamespace(rows=read_rows(folder / name / "metrics.jsonl"), batches=batches)
