"""Flags of XLA that the installed jaxlib has."""

import os
import subprocess
import sys

from spiral_jax.parallel.xla_flags import QUICKLY, known, named_in, quick_flags


def test_only_flags_that_are_there_are_given():
    names = list(QUICKLY)
    assert known(["xla_no_such_flag", *names]) == known(names)
    assert "xla_backend_optimization_level" in known(names)


def test_a_process_runs_with_them():
    code = "import jax; print(jax.jit(lambda x: x + 1)(41))"
    environment = os.environ | {"XLA_FLAGS": quick_flags(), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "42\n"), done.stderr


def test_a_name_that_is_only_reserved_is_no_flag(tmp_path):
    """As `xla_cpu_use_fusion_emitters` in jaxlib 0.12."""
    library = tmp_path / "lib.so"
    library.write_bytes(b"text\0xla_flag\0xla_other\0 \x08xla_gone\x18 xla_flag_gone\0")
    assert named_in([library], ["xla_flag", "xla_gone", "xla_other", "xla_flag_gone"]) == ["xla_flag", "xla_other"]
