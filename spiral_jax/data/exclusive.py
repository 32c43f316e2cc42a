"""A lock by a file, which is gone when nobody needs it."""

import contextlib
import fcntl
import itertools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from spiral_jax.errors import SpiralError
from spiral_jax.progress import Report

_SECONDS_BETWEEN_TRIES = 0.1

Check = Callable[[], None]


@contextlib.contextmanager
def exclusive(folder: Path, name: str, report: Report, check: Check = lambda: None) -> Iterator[None]:
    """Keeps processes from making the same stores at a time; the system drops the lock of a killed one.

    Args:
      folder: where the lock is; made if missing, and removed at the end if nothing is left in it.
      name: of the lock's file.
      report: told once if another process has the lock.
      check: called while waiting; raises to stop.

    Raises:
      SpiralError: the folder cannot be written.
    """
    path, made = folder / name, [above for above in (folder, *folder.parents) if not above.exists()]
    with contextlib.ExitStack() as stack:
        for attempt in itertools.count():
            try:
                folder.mkdir(parents=True, exist_ok=True)
                lock = open(path, "wb")
            except OSError as error:
                if isinstance(error, FileNotFoundError) and attempt < 3:
                    continue  # perhaps the one before us has just removed the folder
                raise SpiralError(f"{folder} cannot be written ({error.strerror})") from error
            with contextlib.suppress(BlockingIOError, FileNotFoundError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The one before us removes its file: then this is one that nobody else will see.
                if os.path.samestat(os.fstat(lock.fileno()), os.stat(path)):
                    stack.enter_context(lock)
                    break
            lock.close()
            if not attempt:
                report(f"data: waiting for another process that prepares data in {folder}")
            check()
            time.sleep(_SECONDS_BETWEEN_TRIES)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # a folder that holds something stays
                path.unlink()
                for above in made:
                    above.rmdir()
