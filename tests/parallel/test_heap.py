"""Freed memory stays with a process on a machine without accelerators: using it again faults nothing in."""

import platform
import subprocess
import sys

import pytest

# Page faults of filling 64 MiB, which were filled and freed before.
SCRIPT = """
import resource
from spiral_jax import hardware
from spiral_jax.parallel import heap
hardware.ACCELERATOR_FILES = ({pattern!r},)
heap.keep_freed_memory()
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = bytearray(b"x") * 2**26
    del block
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's malloc")
@pytest.mark.parametrize("pattern, kept", [("/nowhere*", True), (sys.executable, False)])
def test_pages_are_faulted_in_once(pattern, kept):
    """An accelerator, for which any file may stand, leaves the process as it was."""
    script = SCRIPT.format(pattern=pattern)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    # 16384 pages of 4 KiB, or 32 of 2 MiB.
    assert (int(done.stdout) < 16) == kept, done.stdout
