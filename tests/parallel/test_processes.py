"""Several processes as one run: 2 x 4 CPU devices against the 1 x 8 of the tests' own process.

The configuration file carries the sabotage: it records the rows that a process reads, and makes one process fail or
signal itself at a step.
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from verbs import call

from spiral_jax import evaluate, train
from spiral_jax.data import pipeline
from spiral_jax.errors import SpiralError
from spiral_jax.parallel import processes
from spiral_jax.run.directory import claim
from spiral_jax.run.metrics import read_rows

ROOT = Path(__file__).parents[2]
STEPS, STOPPED, BATCH, WINDOW = 6, 4, 8, 17
CONFIG = """
import os, signal
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
            np.save(f"{record}-{os.environ['JAX_PROCESS_ID']}-{self.step}.npy", batch["tokens"])
        if self.step == int(step) and os.environ["JAX_PROCESS_ID"] == process:
            if kind == "fail":
                raise SpiralError("a file of process 1: broken")
            if kind == "crash":
                raise RuntimeError("a defect")
            os.kill(os.getpid(), signal.Signals[kind])
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    (folder / "text.txt").write_text(" ".join(f"{n} times {n} is {n * n}." for n in range(100, 215)))
    (folder / "config.py").write_text(CONFIG.replace("TEXT", str(folder / "text.txt")))
    return folder


@pytest.fixture(scope="module")
def start(folder):
    """(verb, flags, sabotage, flags of process 0 alone, of process 1 alone) to two finished processes."""
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0 "
        "--xla_llvm_disable_expensive_passes=true",
        "PYTHONPATH": str(ROOT),
        "JAX_NUM_PROCESSES": "2",
    }

    def start(verb, *flags, sabotage="", first=(), second=(), timeout=120):
        address = f"--coordinator_address=127.0.0.1:{free_port()}"
        running = []
        for process in (0, 1):
            command = [sys.executable, "-m", f"spiral_jax.{verb}", *flags, address, *(second if process else first)]
            extra = {"JAX_PROCESS_ID": str(process)} | ({"SABOTAGE": sabotage} if sabotage else {})
            running.append(
                subprocess.Popen(
                    command, env=environment | extra, cwd=folder, text=True, stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE
                )
            )  # fmt: skip
        try:
            deadline = time.monotonic() + timeout
            done = []
            for process in running:
                out, errors = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
                done.append(SimpleNamespace(returncode=process.returncode, stdout=out, stderr=errors))
            return done
        finally:
            for process in running:
                process.kill()

    return start


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def flags_of(folder, name):
    return f"--config={folder}/config.py", f"--workdir={folder}/{name}"


@pytest.fixture(scope="module")
def alone(folder):
    """The run in one process of 8 devices, and the batches it read: step to tokens [B, W]."""
    batches = {}
    read = pipeline.TrainBatches.__next__

    def record(self):
        batch = read(self)
        batches[self.step] = batch["tokens"]
        return batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.TrainBatches, "__next__", record)
        assert call(train, *flags_of(folder, "alone"), "--config.summary.sample_tokens=0") == (0, "")
    return SimpleNamespace(rows=read_rows(folder / "alone/metrics.jsonl"), batches=batches)


@pytest.fixture(scope="module")
def stopped(folder, start):
    """Two processes, of which the second is asked to stop in step 3."""
    return start("train", *flags_of(folder, "two"), sabotage=f"{folder}/two:SIGTERM:1:3")


@pytest.fixture(scope="module")
def resumed(folder, stopped):
    """Their run, finished in one process on another mesh."""
    (folder / "before.jsonl").write_bytes((folder / "two/metrics.jsonl").read_bytes())
    flags = ("--config.mesh.data=1", "--config.mesh.fsdp=8", "--config.summary.sample_tokens=0")
    assert call(train, *flags_of(folder, "two"), *flags) == (0, "")
    return read_rows(folder / "two/metrics.jsonl")


def assert_same_run(rows, expected):
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for row, other in zip(rows, expected, strict=True):
        for name in ("loss", "gradient_norm", "learning_rate", "router_entropy", "tokens", "epoch"):
            np.testing.assert_allclose(row[name], other[name], rtol=0, atol=1e-5, err_msg=f"{name} {row['step']}")
        assert ("validation_loss" in row) == ("validation_loss" in other)
        if "validation_loss" in row:
            assert row["validation_loss"] == pytest.approx(other["validation_loss"], abs=1e-5)


def test_two_processes_compute_what_one_does(folder, alone, stopped, resumed):
    rows = read_rows(folder / "before.jsonl")
    assert_same_run(rows, alone.rows[:STOPPED])
    assert any("validation_loss" in row for row in rows)


def test_the_rows_they_read_are_those_of_one_process(folder, alone, stopped):
    for step in range(1, STOPPED + 1):
        parts = [np.load(folder / f"two-{process}-{step}.npy") for process in (0, 1)]
        assert [part.shape for part in parts] == [(BATCH // 2, WINDOW)] * 2
        # Every second row is a process's: shuffled first, sliced afterwards.
        together_BxW = np.stack(parts, axis=1).reshape(BATCH, WINDOW)
        np.testing.assert_array_equal(together_BxW, alone.batches[step])


def test_a_signal_to_one_process_stops_all_after_the_same_step(folder, stopped):
    main, other = stopped
    assert (main.returncode, other.returncode) == (128 + 15, 128 + 15), main.stderr + other.stderr
    assert f"stopped after step {STOPPED} of {STEPS}, saved; the same command resumes" in main.stderr
    assert (folder / f"two/checkpoints/{STOPPED}").is_dir()


def test_process_0_alone_prints_and_writes(folder, alone, stopped, resumed):
    main, other = stopped
    assert "on 8 x cpu in 2 processes" in main.stdout and f"step {STOPPED - 1}/{STEPS}" in main.stdout
    assert main.stdout.count("data: wrote") == 1
    assert (other.stdout, other.stderr) == ("", "")
    assert "Gloo" not in main.stdout
    assert {path.name for path in (folder / "two").iterdir()} == {path.name for path in (folder / "alone").iterdir()}
    first, second = json.loads((folder / "two/environment.json").read_text())
    assert (first["processes"], first["mesh"]) == (2, {"data": 2, "fsdp": 4, "tensor": 1})
    assert (second["processes"], second["mesh"]) == (1, {"data": 1, "fsdp": 8, "tensor": 1})


def test_the_run_goes_on_in_one_process_on_another_mesh(alone, resumed):
    assert_same_run(resumed, alone.rows)


def test_two_processes_evaluate_as_one_does(folder, start, resumed, capsys):
    capsys.readouterr()
    flags = (f"--workdir={folder}/two", "--stride=5", "--json")
    assert call(evaluate, *flags) == (0, "")
    expected = json.loads(capsys.readouterr().out)
    main, other = start("evaluate", *flags)
    assert (main.returncode, other.returncode) == (0, 0), main.stderr + other.stderr
    found = json.loads(main.stdout)
    assert found["loss"] == pytest.approx(expected["loss"], abs=1e-6)
    assert {**found, "loss": 0, "perplexity": 0, "bits_per_byte": 0} == {
        **expected, "loss": 0, "perplexity": 0, "bits_per_byte": 0
    }  # fmt: skip
    assert other.stdout == ""


def both_end(done, named: str, status=2):
    """Every process ends with the status and one line, whichever of them met the error."""
    for process in done:
        assert process.returncode == status, process.stderr
        assert process.stderr.startswith("error: ") and process.stderr.count("\n") == 1, process.stderr
        assert named in process.stderr


def test_what_only_process_0_can_see_ends_the_others_too(folder, start):
    (folder / "taken").mkdir()
    with claim(folder / "taken"):
        done = start("train", *flags_of(folder, "taken"), timeout=40)
    both_end(done, "another process is training there")
    assert done[1].stderr.startswith("error: process 0: --workdir")


def test_a_process_that_was_given_another_configuration_says_in_what(folder, start):
    done = start("train", *flags_of(folder, "other"), second=("--config.train.steps=7",), timeout=40)
    both_end(done, "train.steps: found 7 on process 1; allowed: the same on every process (6)")


def test_a_process_with_another_file_of_ones_own_says_so(folder, start):
    """The same names, defined otherwise: the processes would compute different things."""
    for number, body in enumerate(("e_BxLxD", "2 * e_BxLxD")):
        (folder / f"own_{number}.py").write_text(
            "from spiral_jax.model.topology import Topology, topologies\n"
            '@topologies.register("own")\nclass Own(Topology):\n'
            f"    def next_state(self, states, e_BxLxD, linears):\n        return {body}\n"
        )
    flags = [*flags_of(folder, "files"), "--config.model.topology=own"]
    first, second = ([f"--import={folder}/own_{process}.py"] for process in (0, 1))
    main, other = start("train", *flags, first=first, second=second)
    assert main.returncode == other.returncode == 2
    assert "--import.model.topology: found '" in other.stderr and "on process 1; allowed: the same" in other.stderr


@pytest.mark.slow
def test_a_folder_that_is_not_shared_is_refused(folder, start, tmp_path):
    done = start("train", *flags_of(folder, "mine"), second=(f"--workdir={tmp_path}",), timeout=60)
    both_end(done, "does not share with process 0")


@pytest.mark.slow
def test_tasks_run_in_one_process(folder, start, resumed):
    done = start("evaluate", f"--workdir={folder}/two", "--tasks=piqa", timeout=40)
    both_end(done, "--tasks is given to 2 processes; allowed: one")
    done = start("train", *flags_of(folder, "tasks"), "--config.evaluation.tasks=('piqa',)", timeout=40)
    both_end(done, "evaluation.tasks is piqa with 2 processes; allowed: none")


@pytest.mark.slow
def test_data_that_cannot_be_prepared_ends_all(folder, start):
    done = start("train", *flags_of(folder, "empty"), "--config.data.paths=/no/such/file", timeout=60)
    both_end(done, "/no/such/file")


@pytest.mark.slow
def test_a_failure_in_a_step_of_one_process_ends_the_other(folder, start):
    done = start("train", *flags_of(folder, "fails"), sabotage=":fail:1:2", timeout=90)
    both_end(done, "a file of process 1: broken")


@pytest.mark.slow
def test_a_defect_has_its_traceback_and_ends_the_other(folder, start):
    main, other = start("train", *flags_of(folder, "crashes"), sabotage=":crash:1:2", timeout=90)
    assert other.returncode == 1 and "Traceback" in other.stderr and "a defect" in other.stderr
    assert main.returncode == 1 and main.stderr == "error: process 1: RuntimeError: a defect\n"


@pytest.mark.slow
def test_a_killed_process_does_not_leave_the_other_waiting(folder, start):
    """It takes 100 seconds: so long does the coordinator wait for a heartbeat."""
    main, other = start("train", *flags_of(folder, "killed"), sabotage=":SIGKILL:1:2", timeout=150)
    assert other.returncode == -9
    assert main.returncode != 0 and "stopped sending heartbeats" in main.stderr


@pytest.mark.slow
def test_two_processes_go_on_with_a_run_on_other_meshes(folder, start, alone, resumed):
    """Among them one whose tensor axis crosses the processes: both then read the same rows."""
    for mesh in ({"data": 1, "fsdp": 8}, {"data": 1, "fsdp": 1, "tensor": 8}):
        name = f"on{mesh['fsdp']}"
        assert call(train, *flags_of(folder, name), "--config.checkpoint.keep=9",
                    "--config.summary.sample_tokens=0") == (0, "")  # fmt: skip
        shutil.rmtree(folder / name / "checkpoints" / str(STEPS))
        meshes = [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
        done = start("train", *flags_of(folder, name), *meshes, sabotage=f"{folder}/{name}:none:none:0")
        assert [process.returncode for process in done] == [0, 0], done[0].stderr + done[1].stderr
        assert "resuming after step 3 of 6" in done[0].stdout
        assert "no sample: " in done[0].stdout
        assert_same_run(read_rows(folder / name / "metrics.jsonl"), alone.rows)
        for step in (4, 5, 6):
            parts = [np.load(folder / f"{name}-{process}-{step}.npy") for process in (0, 1)]
            if "tensor" in mesh:
                assert all(np.array_equal(part, alone.batches[step]) for part in parts)
            else:
                np.testing.assert_array_equal(np.stack(parts, 1).reshape(BATCH, WINDOW), alone.batches[step])


def waiting(folder, *flags):
    return subprocess.Popen(
        [sys.executable, "-m", "spiral_jax.train", *flags_of(folder, "late"), *flags],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=folder, text=True, stderr=subprocess.PIPE
    )  # fmt: skip


def test_processes_that_do_not_arrive_are_named_at_the_deadline(folder):
    address = f"127.0.0.1:{free_port()}"
    expected = {
        (address, 2, 1): f"found {address}, where process 1 waited 2 s for process 0, and nothing answers there",
        (f"127.0.0.1:{free_port()}", 3, 0): "where process 0 waited 2 s for processes 1, 2: not all arrived",
    }
    running = [
        waiting(folder, f"--coordinator_address={at}", f"--num_processes={count}", f"--process_id={process}",
                "--initialization_timeout=2")
        for at, count, process in expected
    ]  # fmt: skip
    for process, named in zip(running, expected.values(), strict=True):
        _, errors = process.communicate(timeout=40)
        assert process.returncode == 2 and errors.count("\n") == 1, errors
        assert errors.startswith("error: --coordinator_address: ") and named in errors, errors
    assert not (folder / "late/checkpoints").exists()


def test_an_address_has_to_be_given(folder):
    process = waiting(folder, "--num_processes=2", "--process_id=1")
    _, errors = process.communicate(timeout=40)
    assert process.returncode == 2 and errors.startswith("error: --coordinator_address: found nothing"), errors


@pytest.mark.parametrize(
    "flags, environment, named",
    [
        (("--num_processes=2", "--process_id=2"), {}, "--process_id: found 2; allowed: 0 to 1, with 2 processes"),
        (("--process_id=-1",), {}, "--process_id: found -1; allowed: 0 or more"),
        (("--num_processes=0",), {}, "--num_processes: found 0; allowed: 1 or more"),
        (("--num_processes=two",), {}, "--num_processes=two"),
        (("--coordinator_address=localhost",), {}, "--coordinator_address: found 'localhost'; allowed: HOST:PORT"),
        (("--coordinator_address=a:70000",), {}, "--coordinator_address: found 'a:70000'"),
        (("--initialization_timeout=0",), {}, "--initialization_timeout: found 0; allowed: 1 or more seconds"),
        ((), {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES: found 'two'; allowed: a whole number"),
        (("--num_processes=2",), {"JAX_PROCESS_ID": "5"}, "JAX_PROCESS_ID: found 5; allowed: 0 to 1"),
        # The tests' own process has computed already.
        (("--num_processes=2",), {"JAX_PROCESS_ID": "1"}, "--num_processes: found 2; allowed: 1, as jax has started"),
    ],
)
def test_bad_flags(folder, monkeypatch, flags, environment, named):
    jax.devices()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    status, errors = call(train, *flags_of(folder, "bad"), *flags)
    assert status == 2 and errors.startswith("error: ") and errors.count("\n") == 1
    assert named in errors


def test_one_process_joins_itself_quickly_and_still_ends_at_sigterm():
    code = """
import os, signal, time
from absl import flags
import jax
from spiral_jax.parallel import processes
values = flags.FlagValues()
processes.define(values)
values(["test"])
start = time.perf_counter()
processes.initialize(values)
seconds = time.perf_counter() - start
processes.initialize(values)
print(jax.distributed.is_initialized(), jax.process_count(), seconds, flush=True)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(20)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    initialized, count, seconds = done.stdout.split()
    assert (initialized, count) == ("True", "1")
    assert float(seconds) < 1  # 0.01 on an idle machine
    assert done.returncode == -15


def test_the_part_of_a_batch_that_a_process_has():
    def parts(processes_of_rows):
        """(index, count) of each process; `processes_of_rows`: of each shard of rows, the processes that hold it."""
        size = len(processes_of_rows)
        shards = {
            Device(process): (slice(i, i + 1), slice(None))
            for i, processes in enumerate(processes_of_rows)
            for process in processes
        }
        sharding = SimpleNamespace(devices_indices_map=lambda shape: shards)
        found = []
        for process in sorted(set().union(*processes_of_rows)):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(jax, "process_index", lambda process=process: process)
                with contextlib.suppress(SpiralError):
                    found.append(processes.rows_of_process(sharding, size))
        return found

    assert parts([[0], [0], [1], [1]]) == [(0, 2), (1, 2)]
    assert parts([[1], [0], [1], [0]]) == [(1, 2), (0, 2)]  # interleaved, as on a torus
    assert parts([[0, 1], [0, 1]]) == [(0, 1), (0, 1)]  # tensor across processes
    assert parts([[0, 1], [2, 3]]) == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert parts([[0], [0, 1], [1]]) == []  # refused


class Device:
    """A device, hashable by itself."""

    def __init__(self, process_index: int):
        self.process_index = process_index
