"""Processes find each other, or say why not."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from pairs import ROOT, flags_of, free_port


def waiting(folder, *flags):
    return subprocess.Popen(
        [sys.executable, "-m", "spiral_jax.train", *flags_of(folder, "late"), *flags],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=folder, text=True, stderr=subprocess.PIPE
    )  # fmt: skip


def test_processes_that_do_not_arrive_are_named_at_the_deadline(folder):
    address = f"127.0.0.1:{free_port()}"
    expected = {
        (address, 2, 1): f"is '{address}', where process 1 waited 2 s for process 0, and nothing answers there",
        (
            f"127.0.0.1:{free_port()}",
            3,
            0,
        ): "where process 0 waited 2 s for processes 0 to 2: 1 of 3 arrived, 2 missing",
    }
    running = [
        waiting(folder, f"--coordinator_address={at}", f"--num_processes={count}", f"--process_id={process}",
                "--initialization_timeout=2")
        for at, count, process in expected
    ]  # fmt: skip
    for process, named in zip(running, expected.values(), strict=True):
        _, errors = process.communicate(timeout=40)
        assert process.returncode == 2 and errors.count("\n") == 1, errors
        assert errors.startswith("error: --coordinator_address is ") and named in errors, errors
    assert not (folder / "late/checkpoints").exists()


def test_a_port_that_is_taken_is_named(folder):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        process = waiting(folder, f"--coordinator_address={address}", "--num_processes=2", "--process_id=0")
        _, errors = process.communicate(timeout=40)
    assert process.returncode == 2 and errors.count("\n") == 1, errors
    assert errors.startswith(f"error: --coordinator_address is '{address}', where process 0 cannot listen (Address")


def test_an_address_has_to_be_given(folder):
    process = waiting(folder, "--num_processes=2", "--process_id=1")
    _, errors = process.communicate(timeout=40)
    assert process.returncode == 2 and errors.startswith("error: --coordinator_address: not given by a flag"), errors


JOIN = """
import sys
from absl import flags
import jax
from spiral_jax.errors import SpiralError
from spiral_jax.parallel import join
from spiral_jax.parallel.process_flags import define_processes
join._SECONDS_TO_FIRST_LINE = 2.0
values = flags.FlagValues()
define_processes(values)
values(["test", *sys.argv[1:]])
try:
    processes = join.join(values)
except join.Unjoined as error:
    print(error.__cause__, flush=True)
    join.os._exit(2)
except SpiralError as error:
    print(error)
    sys.exit(2)
state = join.global_state
gpus = jax.config.values["jax_cuda_visible_devices"]
print(processes.count, state.coordinator_address.rpartition(":")[0], gpus, flush=True)
sys.stdin.read()
join.os._exit(0)  # at once, as the others: jax would wait for them
"""
SLURM = {"SLURM_JOB_ID": "77", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "localhost"}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
NO_TOKEN = """
class config:
    def load_incluster_config():
        raise RuntimeError("Service token file does not exist.")
"""


def joining(variables, *flags):
    """A process that joins, in an environment, and then waits for the end of its standard input."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    command, pipe = [sys.executable, "-c", JOIN, *flags], subprocess.PIPE
    return subprocess.Popen(command, env=environment, cwd=ROOT, text=True, stdin=pipe, stdout=pipe, stderr=pipe)


def check_joining(*cases):
    """Starts processes, all at a time.

    Args:
      cases: a process's variables, flags, exit status, and what is in its line on stdout, and on stderr.
    """
    started = [joining(variables, *flags) for variables, flags, *_ in cases]
    told = [process.stdout.readline() for process in started]  # all have joined now, or are about to end
    for process in started:
        process.stdin.close()
        process.stdin = None
    for process, line, (*_, status, out, errors) in zip(started, told, cases, strict=True):
        _, said = process.communicate(timeout=30)
        assert process.returncode == status and out in line, (line, said)
        assert errors in said and said.count("\n") == bool(errors), (line, said)


def slurm(count, **variables):
    return SLURM | {"SLURM_NTASKS": str(count)} | {f"SLURM_{name}": value for name, value in variables.items()}


EIGHT = {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}  # a double of a node with eight GPUs
ALONE = (0, "1 127.0.0.1 all\n", "")


def test_a_process_that_a_cluster_has_started_alone(tmp_path):
    """Two verbs in one task of Slurm at a time, each with all GPUs; a pod that is no job; one of four tasks."""
    (tmp_path / "kubernetes.py").write_text(NO_TOKEN)
    missing = "waited 4 s for processes 0 to 3: 1 of 4 arrived, 3 missing; allowed: all 4 started within"
    waiting = "waiting for the other processes: 1 of 4 arrived, 3 missing (2s of 4s)"
    check_joining(
        (slurm(1) | EIGHT, (), *ALONE),
        (slurm(1) | EIGHT, (), *ALONE),
        (POD | {"PYTHONPATH": f"{ROOT}:{tmp_path}"}, (), *ALONE),
        (slurm(4, JOB_ID="80"), ("--initialization_timeout=4",), 2, missing, waiting),
    )


@pytest.mark.slow
def test_processes_of_clusters(tmp_path):
    (tmp_path / "kubernetes.py").write_text(NO_TOKEN)
    job = POD | {"PYTHONPATH": f"{ROOT}:{tmp_path}", "JOB_COMPLETION_INDEX": "0"}
    pair = {"STEP_NUM_NODES": "1", "JOB_ID": "78"}
    names = ("SIZE", "RANK", "LOCAL_RANK", "LOCAL_SIZE")
    one, second = ({f"OMPI_COMM_WORLD_{x}": n for x, n in zip(names, text, strict=True)} for text in ("1001", "4101"))
    check_joining(
        (slurm(4, STEP_NUM_TASKS="1"), (), *ALONE),
        (slurm(4, JOB_ID="79", STEP_NUM_NODES="1") | EIGHT, ("--num_processes=1",), *ALONE),
        (
            POD | {"JOB_COMPLETION_INDEX": "0"},
            (),
            *ALONE[:2],
            "note: this pod of an indexed job is alone; with",
        ),
        (one, (), *ALONE),
        (second, (), 2, "--coordinator_address: not given by a flag or a cluster; allowed: all three of", ""),
        (job, (), 2, "the cluster does not say it (Service token file does not exist.); allowed: all three of", ""),
        (slurm(2, **pair) | EIGHT, (), 0, "2 localhost 0\n", "note: 1 of 8 GPUs used by each of 2 processes on this"),
        (slurm(2, **pair, PROCID="1", LOCALID="1") | EIGHT, (), 0, "2 localhost 1\n", ""),
    )


def test_a_port_of_slurms_that_is_taken_is_named():
    """Process 0 of a second step of the same job; jax would end with status 134."""
    with socket.socket(socket.AF_INET6) as other:
        other.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        other.bind(("::", 65535 - 2**12 + 1 + 81))  # as jax derives it from the job
        other.listen()
        process = joining(SLURM | {"SLURM_NTASKS": "2", "SLURM_JOB_ID": "81"})
        out, _ = process.communicate(timeout=40)
    assert process.returncode == 2 and "where process 0 cannot listen (Address already in use)" in out


def test_one_process_joins_itself_quickly_and_still_ends_at_sigterm():
    code = """
import os, signal, time
from absl import flags
import jax
from spiral_jax.parallel.join import join
from spiral_jax.parallel.process_flags import define_processes
values = flags.FlagValues()
define_processes(values)
values(["test"])
start = time.perf_counter()
processes = join(values)
seconds = time.perf_counter() - start
assert join(values).count == 1
print(jax.distributed.is_initialized(), processes.count == jax.process_count() == 1, seconds, flush=True)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(20)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    initialized, alone, seconds = done.stdout.split()
    assert (initialized, alone) == ("True", "True")
    assert float(seconds) < 1  # 0.01 on an idle machine
    assert done.returncode == -15


def test_ctrl_c_ends_the_wait_for_others(folder):
    port = free_port()
    process = waiting(folder, f"--coordinator_address=127.0.0.1:{port}", "--num_processes=2", "--process_id=0")
    for _ in range(400):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break  # it waits
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=10)
    assert (process.returncode, errors) == (128 + signal.SIGINT, "stopped with nothing to save\n")
