"""What the TPU compiler makes of a program for devices that need not be there, as text."""

import tempfile
from pathlib import Path

import jax

from spiral_jax.roofline.slices import no_compilation_cache


def compile_described(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, str]:
    """Compiles a program for described devices.

    Args:
      lowered: the program, its arguments sharded over devices of `slices.describe_devices`.

    Returns:
      The compiled program, and the compiler's text of it, scheduled and with memory assigned.
    """
    # The text has to come from the compiler: `compiled.as_text()` fails for programs with work on the sparse cores, as
    # the lookup in a large embedding is on v5p, and for all of tpu7x (libtpu 0.0.52).
    with no_compilation_cache(), tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        (path,) = Path(folder).glob("*.after_optimizations.txt")
        return compiled, path.read_text(encoding="utf-8")
