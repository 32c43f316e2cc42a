"""A clock for what may hang: collectives, file systems, drivers."""

import dataclasses
import faulthandler
import math
import sys
import threading
import time

from spiral_jax.errors import require
from spiral_jax.parallel.leaving import HUNG, End, end_at_once

_SECONDS_OF_A_TICK = 0.5
_SECONDS_OF_A_STOP = 5.0  # a tick that comes so late is that of a process that did not run


@dataclasses.dataclass(frozen=True)
class DeadlineConfig:
    """How long things may take. When one takes longer, the run ends with status 43, to be started again. 0
    minutes stand for as long as it takes.

    Attributes:
      start_minutes: from the first line to the first step, but for the preparation of data, the compilation, and on a
        bucket the wait for another start to end.
      step_minutes: a step, reading its batch included.
      evaluation_minutes: a batch of an evaluation; compiling what tasks need counts to their first batch.
      save_minutes: what steps wait for a save, or the run for the last one.
      exit_minutes: from the last save to the end, the sample and the plot included.
      silence_seconds: that one of several processes may say nothing, as it is gone, stopped or cut off; 5 or more.
    """

    start_minutes: float = 60.0
    step_minutes: float = 30.0
    evaluation_minutes: float = 30.0
    save_minutes: float = 60.0
    exit_minutes: float = 60.0
    silence_seconds: float = 60.0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            require(0 <= value < math.inf, f"deadlines.{field.name}", value, "0 or more")
        require(self.silence_seconds >= 5, "deadlines.silence_seconds", self.silence_seconds, "5 or more")


class Watchdog:
    """In a `with` statement: ends the process when what is expected does not come in time.

    A time in which the process itself was stopped does not count.

    Attributes:
      config: the deadlines.
    """

    def __init__(self, config: DeadlineConfig, end: End = end_at_once):
        self.config, self._end = config, end
        self._expected: tuple[str, str, float] | None = None  # what, the field, the last moment by time.monotonic()
        self._lock, self._closed = threading.Lock(), threading.Event()

    def __enter__(self) -> "Watchdog":
        threading.Thread(target=self._watch, name="deadlines", daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self._closed.set()

    def expect(self, what: str, field: str) -> None:
        """From now on `what` has to end within the minutes of a field; nothing else is expected any more."""
        seconds = 60 * getattr(self.config, field)
        with self._lock:
            self._expected = (what, field, time.monotonic() + seconds) if seconds else None

    def expect_nothing(self) -> None:
        """What comes now may take as long as it takes."""
        with self._lock:
            self._expected = None

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._closed.wait(_SECONDS_OF_A_TICK):
            now = time.monotonic()
            stopped, before = now - before, now
            with self._lock:
                if self._expected is None:
                    continue
                what, field, last = self._expected
                if stopped > _SECONDS_OF_A_STOP:
                    last += stopped
                    self._expected = what, field, last
            if now > last:
                minutes = getattr(self.config, field)
                faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
                self._end(HUNG, f"error: {what} did not end in {minutes:g} min; allowed by deadlines.{field}")
                return
