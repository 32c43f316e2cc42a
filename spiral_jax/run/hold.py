"""A start's hold on a run's directory, on whatever it lies."""

import abc
import json
import os
import socket
import threading
import time
from typing import Any

from etils.epath import Path

from spiral_jax.data.bucket import remove
from spiral_jax.parallel.leaving import HUNG, End


class Hold(abc.ABC):
    """Whether this start may write a run's directory, of which WORKDIR/.lock names the owner."""

    def __init__(self, workdir: Path, owner: str, end: End):
        """Holds nothing yet.

        Args:
          workdir: of the run.
          owner: a word that no other start has.
          end: ends the process with a status and a line, when another start has the directory.
        """
        self._workdir, self._path, self._owner, self._end = workdir, workdir / ".lock", owner, end
        self._seen = time.monotonic()  # the last moment at which the directory was ours
        self._closed = threading.Event()
        self._lost = threading.Lock()  # taken by whichever thread ends this process, and never given back

    @abc.abstractmethod
    def take(self) -> None:
        """Takes the directory.

        Raises:
          SpiralError: another process holds it, or it cannot be written.
        """

    @abc.abstractmethod
    def check(self) -> None:
        """Before anything is written: ends the process if the directory belongs to another start."""

    @abc.abstractmethod
    def look(self) -> None:
        """The same, however sure that is."""

    def keep(self) -> None:
        """Looks now and then whether the directory is still ours, and says so if this process took it."""
        self._thread = threading.Thread(target=self._keep, name="claim", daemon=True)
        self._thread.start()

    @abc.abstractmethod
    def release(self) -> None:
        """Gives the directory back."""

    def remove(self) -> None:
        """Gives it back and leaves no file: nobody has waited for it."""
        remove(self._path)

    @abc.abstractmethod
    def _keep(self) -> None:
        """In a thread, until `_closed` is set."""

    def _compare(self, owner: dict[str, Any] | None) -> None:
        """Ends the process if the owner that the file names is another one."""
        if owner is not None and owner.get("owner") != self._owner:
            self._lost.acquire()
            # Without a way out, on which a save that was going on would be finished.
            self._end(
                HUNG,
                f"error: the run in {self._workdir} was taken over by {name_of(owner)} while this process was stopped; "
                "it ends and writes nothing",
            )

    def _as_owner(self, **more: Any) -> bytes:
        """What the file says of this start."""
        return json.dumps({"owner": self._owner, "host": socket.gethostname(), "pid": os.getpid(), **more}).encode()


def parsed(content: bytes) -> dict[str, Any] | None:
    """What the content of the file says; None if nothing that an owner would."""
    try:
        value = json.loads(content.decode("utf-8"))
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def name_of(owner: dict[str, Any] | None) -> str:
    return f"process {owner.get('pid')} on {owner.get('host')}" if owner else "its owner is not known"
