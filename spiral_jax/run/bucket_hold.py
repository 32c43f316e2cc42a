"""A hold on a folder of a bucket, where nothing can be locked: an object that its owner renews.

WORKDIR/.lock names its owner, and counts the starts. The first is written where there is no object (generation 0),
every later one where there is the generation that its writer has seen: of two that write at the same time one does. An
owner that does not renew it for two minutes is gone, and whoever saw that takes its place; until then a start waits. An
owner that was stopped for so long finds another one before its next write, and ends.
"""

import contextlib
import itertools
import sys
import time

from etils.epath import Path

from spiral_jax.data import atomic
from spiral_jax.data.bucket import Found, Versioned, is_trouble
from spiral_jax.parallel.leaving import End, end_at_once
from spiral_jax.run.hold import Hold, name_of, parsed

SECONDS_OF_A_RENEWAL = 30.0
SECONDS_OF_SILENCE = 120.0  # after which an owner is gone
_SECONDS_BETWEEN_LINES = 60.0
_SECONDS_AFTER_TROUBLE = 2.0

_RELEASED = "released"  # in place of a number


class BucketHold(Hold):
    """An object with an owner, written by generation."""

    def __init__(self, workdir: Path, owner: str, end: End = end_at_once):
        """As for `Hold`."""
        super().__init__(workdir, owner, end)
        self._object = Versioned(self._path)
        self._generation: int | None = None  # of the object, on the process that renews it
        self._attempt, self._beats = 0, itertools.count()

    def take(self) -> None:
        with atomic.written(self._path):
            while self._generation is None:
                found = self._wait_for_silence()
                before = parsed(found.content) if found else None
                attempt = before.get("attempt") if before else 0
                self._attempt = attempt + 1 if isinstance(attempt, int) else 1
                begin = time.monotonic()
                self._generation = self._object.write(self._content(), found.generation if found else 0)
                self._seen = begin

    def release(self) -> None:
        self._stop_renewing()
        if self._generation is not None:
            with contextlib.suppress(Exception):  # then it is waited for, as if this process had been killed
                self._object.write(self._as_owner(attempt=self._attempt, beat=_RELEASED), self._generation)

    def remove(self) -> None:
        self._stop_renewing()  # or it comes back
        super().remove()

    def _stop_renewing(self) -> None:
        self._closed.set()
        self._thread.join(SECONDS_OF_A_RENEWAL)

    def check(self) -> None:
        # As long as that nobody can have taken it.
        if time.monotonic() - self._seen > SECONDS_OF_SILENCE / 2:
            self.look()

    def look(self) -> None:
        """As for `Hold`; it does not return before the bucket has answered."""
        while True:
            begin = time.monotonic()
            try:
                found = self._object.read()
                break
            except Exception as error:
                if not is_trouble(error):
                    raise
                time.sleep(_SECONDS_AFTER_TROUBLE)
        self._compare(parsed(found.content) if found else None)
        if self._generation is None:  # who renews it goes by that
            self._seen = begin

    def _wait_for_silence(self) -> Found | None:
        """What there is to replace: nothing, what was given back or says nothing, or what is not renewed any more."""
        before: Found | None = None
        since = said = 0.0
        while (found := self._object.read()) is not None:
            owner = parsed(found.content)
            if owner is None or owner.get("beat") == _RELEASED:
                break
            now = time.monotonic()
            if before is None:
                since = now - (self._object.now() - found.written).total_seconds()
            elif found.generation != before.generation:
                since = now
            if now - since > SECONDS_OF_SILENCE:
                break
            if before is None or now - said > _SECONDS_BETWEEN_LINES:
                line = f"--workdir {self._workdir}: waiting for {name_of(owner)}, which trains there"
                line += f", until it ends or has said nothing for {SECONDS_OF_SILENCE:g} s"
                print(line, file=sys.stderr, flush=True)
                said = now
            before = found
            time.sleep(SECONDS_OF_A_RENEWAL / 15)
        return found

    def _renew(self) -> None:
        begin = time.monotonic()
        while (generation := self._object.write(self._content(), self._generation or 0)) is None:
            found = self._object.read()
            self._compare(parsed(found.content) if found else None)
            # Ours all the same, by a write whose answer was lost; or removed by somebody who thought it of no use.
            self._generation = found.generation if found else 0
        self._generation, self._seen = generation, begin

    def _content(self) -> bytes:
        return self._as_owner(attempt=self._attempt, beat=next(self._beats))

    def _keep(self) -> None:
        seconds = SECONDS_OF_A_RENEWAL
        while not self._closed.wait(seconds):
            try:
                if self._generation is None:
                    self.look()
                else:
                    self._renew()
                seconds = SECONDS_OF_A_RENEWAL
            except Exception as error:
                if not is_trouble(error):
                    raise
                seconds = _SECONDS_AFTER_TROUBLE
