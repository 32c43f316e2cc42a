"""Who may write a run's directory: one process, and on several the processes of one start.

WORKDIR/.lock names its owner, who counts up a number in it (a beat) and holds a lock on the file. A start replaces a
file whose owner is gone: one that the machine says is dead at once, another one after so many seconds without a beat.
An owner that was stopped (SIGSTOP, a paused machine) still holds its lock, but of a file that is not there any more:
it looks before it writes, sees another owner, and ends.
"""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import IO, Any

from etils.epath import Path

from spiral_jax.data import atomic
from spiral_jax.errors import SpiralError
from spiral_jax.parallel.leaving import HUNG, End, end_at_once
from spiral_jax.parallel.processes import ALONE, Processes
from spiral_jax.run.aside import set_aside

SECONDS_OF_SILENCE = 20.0  # after which an owner is gone
_SECONDS_OF_A_BEAT = 1.0
_SECONDS_OF_A_LOOK = 5.0  # of processes that do not beat, and that the directory is trusted to be ours after one

_RELEASED = "____released"  # in place of a number


class Claim:
    """A start's hold on a run's directory."""

    def __init__(self, workdir: Path, owner: str, end: End = end_at_once):
        """Holds nothing yet.

        Args:
          workdir: of the run.
          owner: a word that no other start has.
          end: ends the process with a status and a line, when another start has the directory.
        """
        self._workdir, self._path, self._owner, self._end = workdir, workdir / ".lock", owner, end
        self._seen = time.monotonic()  # the last moment at which the directory was ours
        self._file: IO[str] | None = None
        self._closed = threading.Event()
        self._lost = threading.Lock()  # taken by whichever thread ends this process, and never given back

    def take(self) -> None:
        """Takes the directory.

        Raises:
          SpiralError: another process holds it.
        """
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

    def keep(self) -> None:
        """Looks now and then whether the directory is still ours, and says so if this process took it."""
        self._thread = threading.Thread(target=self._keep, name="claim", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Gives the directory back."""
        self._closed.set()
        self._thread.join(_SECONDS_OF_A_BEAT)

    def check(self) -> None:
        """Before anything is written: ends the process if the directory belongs to another start."""
        if time.monotonic() - self._seen > _SECONDS_OF_A_LOOK:
            self.look()

    def look(self) -> None:
        """The same, however sure that is."""
        owner = _read(self._path)
        if owner is not None and owner.get("owner") != self._owner:
            self._lost.acquire()
            # Without a way out, on which a save that was going on would be finished.
            self._end(
                HUNG,
                f"error: the run in {self._workdir} was taken over by {_name(owner)} while this process was stopped; "
                "it ends and writes nothing",
            )
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
                    f"--workdir {self._workdir}: another process is training there ({_name(now or owner)})"
                )

    def _beat(self, file: IO[str], beat: str) -> None:
        text = {"owner": self._owner, "host": socket.gethostname(), "pid": os.getpid(), "beat": beat}
        os.pwrite(file.fileno(), json.dumps(text).encode(), 0)  # of one length, and so never read by half

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


@contextlib.contextmanager
def claim(workdir: Path, processes: Processes = ALONE, end: End = end_at_once) -> Iterator[Claim]:
    """Holds a run's directory, so that two starts do not write one run.

    Args:
      workdir: of the run.
      processes: of this start; process 0 takes the directory for all.
      end: as for `Claim`.

    Raises:
      SpiralError: another process holds it.
    """

    def take() -> str:
        held.take()
        return owner

    owner = uuid.uuid4().hex
    held = Claim(workdir, owner, end)
    theirs = processes.from_main("the claim", take)
    if theirs != owner:
        held = Claim(workdir, theirs, end)
    held.keep()
    try:
        yield held
    finally:
        held.release()


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
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _name(owner: dict[str, Any] | None) -> str:
    return f"process {owner.get('pid')} on {owner.get('host')}" if owner else "its owner is not known"
