"""What gloo, jax's collectives between the CPUs of several processes, prints."""

import contextlib
import os
import sys
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Leaves stdout to Python: gloo greets every peer of every group on it, from C++, in its first collective.

    Collectives of TPUs and GPUs print nothing there, and what their drivers do print stays. Touches the devices, so the
    processes have to have joined.
    """
    if jax.default_backend() != "cpu" or jax.config.values["jax_cpu_collectives_implementation"] != "gloo":
        yield
        return
    sys.stdout.flush()
    own = os.dup(1)
    with (
        open(own, "w", buffering=1, encoding=sys.stdout.encoding, errors=sys.stdout.errors) as python,
        open(os.devnull, "wb") as nowhere,
        contextlib.redirect_stdout(python),
    ):
        os.dup2(nowhere.fileno(), 1)
        try:
            yield
        finally:
            os.dup2(own, 1)
