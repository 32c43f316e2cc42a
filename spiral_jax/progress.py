"""How far a long job is: a line every few seconds."""

import concurrent.futures
import math
import threading
import time
from collections.abc import Callable
from typing import TypeVar

Report = Callable[[str], None]
T = TypeVar("T")


def in_thread(name: str, work: Callable[[], T]) -> concurrent.futures.Future[T]:
    """Does work that cannot say how far it is, and hears no Ctrl-C, in a thread that keeps no process from ending.

    Args:
      name: of the thread.
      work: what it does.

    Returns:
      What becomes of it, to be waited for between lines and checks.
    """
    done: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return done


class Progress:
    """Reports the share done, the rate and the time left.

    Attributes:
      done: how much is done, in units.
    """

    def __init__(
        self,
        label: str,
        total: float,
        *,
        unit: str = "",
        scale: float = 1.0,
        report: Report = print,
        seconds: float = 2.0,
    ):
        """Starts the clock.

        Args:
          label: what is going on, in front of the line.
          total: how much there is to do.
          unit: what the numbers are shown in.
          scale: how much one such unit is: 1e6 to show bytes as MB.
          report: called with a line.
          seconds: least time between two lines.
        """
        self._label = label
        self._total = total
        self._unit = unit
        self._scale = scale
        self._report = report
        self._seconds = seconds
        self._skipped = 0.0
        self.done = 0.0
        self._begin = self._last = time.monotonic()

    def skip(self, amount: float) -> None:
        """Counts what was done before, which says nothing about the rate."""
        self._skipped += amount
        self.done += amount

    def advance(self, amount: float) -> None:
        """Counts what has just been done, and reports if it is time to."""
        self.done += amount
        if self.done > self._skipped and self.is_due():
            share = min(self.done / self._total, 1.0) if self._total else 1.0
            self._report(
                f"{self._label}: {self._show(self.done)} of {self._show(self._total)} {self._unit} ({share:.0%}), "
                f"{self._show(self._rate())} {self._unit}/s, {duration(self.seconds_left())} left"
            )

    def is_due(self, at_once: bool = False) -> bool:
        """Whether it is time for a line, or one is wanted `at_once`; the wait for the next one then starts."""
        now = time.monotonic()
        if not at_once and now - self._last < self._seconds:
            return False
        self._last = now
        return True

    def seconds_left(self) -> float:
        """At the rate since the start; infinite while nothing has been done."""
        rate = self._rate()
        return max(self._total - self.done, 0) / rate if rate else math.inf

    def _rate(self) -> float:
        return (self.done - self._skipped) / max(time.monotonic() - self._begin, 1e-9)

    def _show(self, amount: float) -> str:
        amount /= self._scale
        whole = self._scale == 1 and (amount >= 10 or amount == int(amount))
        return f"{amount:,.0f}" if whole else f"{amount:,.1f}"


def duration(seconds: float) -> str:
    """Seconds as people say them: 45s, 3m20s, 5h07m, 2d03h."""
    if not math.isfinite(seconds):
        return "?"
    seconds = round(seconds)
    for size, small, names in ((86400, 3600, "dh"), (3600, 60, "hm"), (60, 1, "ms")):
        if seconds >= size:
            return f"{seconds // size}{names[0]}{seconds % size // small:02d}{names[1]}"
    return f"{seconds}s"
