"""A hold on a directory of a disk, or of a file system that several machines see.

WORKDIR/.lock names its owner, who counts up a number in it (a beat) and holds a lock on the file. A start replaces a
file whose owner is gone: one that the machine says is dead at once, another one after so many seconds without a beat.
An owner that was stopped (SIGSTOP, a paused machine) still holds its lock, but of a file that is not there any more:
it looks before it writes, sees another owner, and ends.
"""

import contextlib
import fcntl
import os
import socket
import time
from typing import IO, Any

from etils.epath import Path

from spiral_jax.data import atomic
from spiral_jax.errors import SpiralError
from spiral_jax.parallel.leaving import End, end_at_once
from spiral_jax.run.aside import set_aside
from spiral_jax.run.hold import Hold, name_of, parsed

SECONDS_OF_SILENCE = 20.0  # after which an owner is gone
_SECONDS_OF_A_BEAT = 1.0
_SECONDS_OF_A_LOOK = 5.0  # of processes that do not beat, and that the directory is trusted to be ours after one

_RELEASED = "____released"  # in place of a number


class DiskHold(Hold):
    """A locked file with a beat in it."""

    def __init__(self, workdir: Path, owner: str, end: End = end_at_once):
        """As for `Hold`."""
        super().__init__(workdir, owner, end)
        self._file: IO[str] | None = None

    def take(self) -> None:
        with atomic.written(self._path):
            self._take()

    def _take(self) -> None:
        if self._path.is_dir():
            set_aside(self._path, self._workdir)
        file, owner = _open(self._path), _read(self._path)
        # Locks of network file systems may not reach other machines.
        elsewhere = owner is not None and owner.get("host") != socket.gethostname() and owner.get("beat") != _RELEASED
        replaces = not _try_lock(file) or elsewhere
        if replaces:
            file.close()
            self._wait_for_silence(owner)
            new = self._path.with_name(f".lock.{self._owner}")
            file = _open(new)
            _try_lock(file)
            self._beat(file, f"{0:012}")
            new.replace(self._path)
        elif not _is_at(file, self._path):  # replaced since it was opened
            file.close()
            self._take()
            return
        else:
            file.truncate(0)
            self._beat(file, f"{0:012}")
        self._file, self._seen = file, time.monotonic()

    def release(self) -> None:
        self._closed.set()
        self._thread.join(_SECONDS_OF_A_BEAT)

    def check(self) -> None:
        if time.monotonic() - self._seen > _SECONDS_OF_A_LOOK:
            self.look()

    def look(self) -> None:
        self._compare(_read(self._path))
        self._seen = time.monotonic()

    def _wait_for_silence(self, owner: dict[str, Any] | None) -> None:
        """Returns when the file has not changed for so long.

        Raises:
          SpiralError: its owner is there.
        """
        deadline = time.monotonic() + SECONDS_OF_SILENCE
        while time.monotonic() < deadline:
            time.sleep(_SECONDS_OF_A_BEAT / 2)
            if (now := _read(self._path)) != owner:
                raise SpiralError(
                    f"--workdir {self._workdir}: another process is training there ({name_of(now or owner)})"
                )

    def _beat(self, file: IO[str], beat: str) -> None:
        os.pwrite(file.fileno(), self._as_owner(beat=beat), 0)  # of one length, and so never read by half

    def _keep(self) -> None:
        beats = 0
        while not self._closed.wait(_SECONDS_OF_A_LOOK if self._file is None else _SECONDS_OF_A_BEAT):
            self.look()
            beats += 1
            # A disk in trouble is reported by what writes to it.
            with contextlib.suppress(OSError):
                if self._file is not None:
                    self._beat(self._file, f"{beats:012}")
        if self._file is not None:
            with contextlib.suppress(OSError), self._file as file:
                # The name stays, for owners before that were stopped.
                self._beat(file, _RELEASED)


def _open(path: Path) -> IO[str]:
    """For writing anywhere in it, a mode that these paths do not have."""
    file = path.open("a", encoding="utf-8")
    fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) & ~os.O_APPEND)
    return file


def _try_lock(file) -> bool:
    """Whether nobody else holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_at(file, path: Path) -> bool:
    """Whether the open file is the one at the path."""
    try:
        here, there = os.fstat(file.fileno()), os.stat(path)
    except FileNotFoundError:  # a start that was refused has removed it
        return False
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def _read(path: Path) -> dict[str, Any] | None:
    """What the file says; None if nothing that a claim would."""
    try:
        return parsed(path.read_bytes())
    except OSError:
        return None
