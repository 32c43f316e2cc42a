"""What a host says on the bucket, and what it is told there.

A thread of its own does all of it: however long the bucket is silent, the job and its supervisor go on.
"""

import contextlib
import ctypes
import itertools
import os
import threading
import time
import traceback
from pathlib import Path

from tpu.bucket import Bucket, Conflict

_PART = 1 << 20  # bytes of a part, at most
_PARTS = 8  # between two signs of life
_KEPT = 256 << 20  # bytes that wait for a bucket that does not answer; older ones are dropped
_TAIL = 1 << 16  # bytes that stay in the file, for a look at how the job ended
_SECONDS_AT_THE_END = 1800.0
_PUNCH_HOLE_KEEP_SIZE = 3  # of fallocate(2)


STOP = "control/stop"  # the object that asks all hosts to end the job


def attempt_folder(attempt: int) -> str:
    return f"attempts/{attempt:04d}"


class Spool:
    """The output of the job: a local file that it appends to, sent to the bucket in parts.

    A part's name is the place of its first byte, so a part that is sent again is the same object, and a supervisor that
    was started again, or comes after one that died, knows from the bucket what is missing. What was sent is punched out
    of the file, which stays small.
    """

    def __init__(self, bucket: Bucket, folder: str, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self._bucket, self._folder = path, bucket, folder
        self.file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        self._sent: int | None = None

    def send(self, most: int | None = None) -> None:
        """Sends what is new, or so many parts of it."""
        if self._sent is None:
            parts = self._bucket.list(f"{self._folder}/")
            self._sent = max((int(part.name[-16:-4]) + part.size for part in parts), default=0)
        dropped = self.size() - _KEPT - self._sent
        if dropped > 0:
            self._forget(self._sent + dropped)
            self.note(f"{dropped} bytes of output were dropped")
        numbers = itertools.count() if most is None else range(most)
        for _ in numbers:
            if not (part := os.pread(self.file, _PART, self._sent)):
                return
            self._bucket.put(f"{self._folder}/{self._sent:012d}.txt", part)
            self._forget(self._sent + len(part))

    def size(self) -> int:
        return os.fstat(self.file).st_size

    def tail(self, since: int) -> str:
        """The end of the output that came after the file had so many bytes."""
        return os.pread(self.file, _TAIL, max(since, self.size() - _TAIL)).decode(errors="replace")

    def note(self, line: str) -> None:
        """A line of the supervisor's own, between those of the job."""
        os.write(self.file, f"[supervisor: {line}]\n".encode())

    def _forget(self, place: int) -> None:
        offset, length = ctypes.c_long(0), ctypes.c_long(max(0, place - _TAIL))
        if length.value:
            ctypes.CDLL(None).fallocate(self.file, _PUNCH_HOLE_KEEP_SIZE, offset, length)
        self._sent = place


class Reporter:
    """Sends output and state every so many seconds, and at once after `say`.

    Attributes:
      state: what host-I.json holds.
      stop_asked: whether the object STOP was there.
      first_exit: what the first host to end wrote, as soon as that is known.
    """

    def __init__(self, bucket: Bucket, attempt: int, host: int, spool: Spool, seconds: float):
        self.bucket, self.spool, self.host = bucket, spool, host
        self.folder = attempt_folder(attempt)
        self.state = {"state": "setting_up", "phase": "setting_up", "beat": 0.0, "status": None, "signal": False,
                      "line": "", "kernel": [], "code": "", "versions": {}, "first_exit": None}  # fmt: skip
        self.stop_asked = False
        self.first_exit: dict | None = None
        self._seconds, self._now, self._ended = seconds, threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="reporter", daemon=True)

    def __enter__(self) -> "Reporter":
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        """Sends what is left. What a bucket does not take for so long is left for the next supervisor of this host."""
        self._ended = True
        self._now.set()
        self._thread.join(_SECONDS_AT_THE_END)

    def say(self, **changed) -> None:
        self.state.update(changed)
        self._now.set()

    def claim_first_exit(self, **exit) -> None:
        """Says that this host has ended; the first that does so decides what became of the attempt."""
        with contextlib.suppress(Conflict):
            self.bucket.put(f"{self.folder}/first_exit.json", {"host": self.host, **exit}, if_generation_match=0)

    def _run(self) -> None:
        while True:
            last = self._ended
            try:
                if self.state["state"] == "ended":  # then the slice may be taken away
                    self.spool.send()
                self.state["beat"] = time.time()
                self.bucket.put(f"{self.folder}/host-{self.host}.json", dict(self.state))
                if last:
                    return
                self.first_exit = self.bucket.read(f"{self.folder}/first_exit.json")
                self.stop_asked = self.stop_asked or self.bucket.get(STOP) is not None
                self.spool.send(_PARTS)  # a job that prints faster than this is no silent one
            except Exception:
                # Whatever is wrong with the bucket may be mended; what is to be said waits in the spool.
                traceback.print_exc()
            self._now.wait(self._seconds)
            self._now.clear()
