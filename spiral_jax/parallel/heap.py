"""What becomes of memory that a step on CPU frees."""

import contextlib
import ctypes

from spiral_jax.hardware import has_accelerators

# Of malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """Has glibc keep what XLA frees at the end of a CPU step, rather than give it back and fault it in for the next.

    To be called before the first device is touched, whose threads would get heaps of their own. Does nothing on a
    machine with accelerators, whose steps free none of this memory, nor with another C library.
    """
    if has_accelerators():
        return
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in ((_TRIM_THRESHOLD, -1), (_MMAP_MAX, 0), (_ARENA_MAX, 1)):
            mallopt(parameter, value)
