"""Who may print on stdout beside Python."""

import os

import jax
import pytest
from absl import flags

from spiral_jax import command
from spiral_jax.parallel import gloo
from spiral_jax.parallel.place import define_processes


@pytest.mark.parametrize(
    "backend, collectives, expected",
    [("cpu", "gloo", ""), ("tpu", "gloo", "native "), ("gpu", "gloo", "native "), ("cpu", "mpi", "native ")],
)
def test_gloo_alone_is_silenced(monkeypatch, capfd, backend, collectives, expected):
    before = jax.config.values["jax_cpu_collectives_implementation"]
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    jax.config.update("jax_cpu_collectives_implementation", collectives)
    try:
        with gloo.silenced():
            print("python", end=" ", flush=True)
            os.write(1, b"native ")
            print("still", end=" ", flush=True)
        os.write(1, b"native again ")
        print("after")
    finally:
        jax.config.update("jax_cpu_collectives_implementation", before)
    assert capfd.readouterr().out == f"python {expected}still native again after\n"


def test_one_process_is_not_silenced(capfd):
    jax.devices()
    values = flags.FlagValues()
    define_processes(values)
    values(["test"])
    with command.joined(values) as processes:
        os.write(1, b"native\n")
    assert (processes.id, processes.count) == (0, 1)
    assert capfd.readouterr().out == "native\n"
