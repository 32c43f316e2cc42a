"""Processes find each other, or say why not."""

import os
import signal
import socket
import subprocess
import sys
import time

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
        (f"127.0.0.1:{free_port()}", 3, 0): "where process 0 waited 2 s for processes 0 to 2: not all arrived",
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
