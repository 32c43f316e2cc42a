"""Flags of XLA that the installed jaxlib has."""

import os
import subprocess
import sys

from spiral_jax.parallel.xla_flags import QUICKLY, known, quick_flags


def test_only_flags_that_are_there_are_given():
    names = list(QUICKLY)
    assert known(["xla_no_such_flag", *names]) == known(names)
    assert "xla_backend_optimization_level" in known(names)


def test_a_process_runs_with_them():
    code = "import jax; print(jax.jit(lambda x: x + 1)(41))"
    environment = os.environ | {"XLA_FLAGS": quick_flags(), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "42\n"), done.stderr
