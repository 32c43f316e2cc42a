"""Process 0 is jax's coordinator; what becomes of the others when it is gone.

jax aborts them, with a page of C++ on stderr. Its client takes a callback instead, but jax has no door to it, and in
jaxlib 0.10 the callback cannot be called from Python: the attempt ends in `std::terminate`. So both are caught: the
callback, and the handler of `std::terminate`. Where neither is to be had, jax aborts as before.
"""

import contextlib
import ctypes
import functools
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jax._src import distributed

from spiral_jax.errors import SpiralError
from spiral_jax.parallel.leaving import HUNG, end_at_once


class CoordinatorLost:
    """What jax calls, on a thread of C++, when process 0 is gone.

    Attributes:
      act: ends this process.
    """

    def __init__(self) -> None:
        self.act: Callable[[], None] = lambda: end_at_once(HUNG, "error: process 0 is gone; the same command resumes")

    def __call__(self, *status: object) -> None:
        self.act()

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Clients that jax makes in here call this."""
        extension: Any = getattr(distributed, "_jax", None)
        make = getattr(extension, "get_distributed_runtime_client", None)
        if make is None:
            yield
            return
        extension.get_distributed_runtime_client = functools.partial(make, missed_heartbeat_callback=self)
        try:
            yield
        finally:
            extension.get_distributed_runtime_client = make
        with contextlib.suppress(OSError, AttributeError):
            handler = ctypes.CFUNCTYPE(None)(self)
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(handler))  # for as long as the process lives
            ctypes.CDLL("libstdc++.so.6")._ZSt13set_terminatePFvvE(handler)


def check_port(address: str, bind_address: str | None) -> None:
    """Whether process 0 can listen there: jax crashes without a word if another program does.

    Args:
      address: HOST:PORT, as the user gave it.
      bind_address: where jax is told to listen; None for every interface.

    Raises:
      SpiralError: another program listens there.
    """
    host, _, port = (bind_address or f"[::]:{address.rpartition(':')[2]}").rpartition(":")
    host = host.strip("[]")
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as jax does
        try:
            probe.bind((host, int(port)))
        except OSError as error:
            raise SpiralError(
                f"--coordinator_address is {address!r}, where process 0 cannot listen ({error.strerror}); "
                "allowed: a free port of the machine of process 0 (JAX_COORDINATOR_PORT is a cluster's)"
            ) from None


def connections_to(address: str, tables: Sequence[str] = ("/proc/net/tcp", "/proc/net/tcp6")) -> int | None:
    """How many have connected to an address of this machine, as Linux counts them; None on other systems.

    Args:
      address: HOST:PORT.
      tables: where the system lists its connections.
    """
    ends, established = f":{int(address.rpartition(':')[2]):04X}", "01"
    try:
        rows = [line.split() for table in tables for line in Path(table).read_text(encoding="ascii").splitlines()[1:]]
    except OSError:
        return None
    return sum(len(row) > 3 and row[1].endswith(ends) and row[3] == established for row in rows)
