"""How far a long job is: a line every few seconds."""

import time
from collections.abc import Callable

Report = Callable[[str], None]


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
        now = time.monotonic()
        if now - self._last < self._seconds or self.done <= self._skipped:
            return
        self._last = now
        rate = (self.done - self._skipped) / max(now - self._begin, 1e-9)
        left = max(self._total - self.done, 0) / rate
        share = min(self.done / self._total, 1.0) if self._total else 1.0
        self._report(
            f"{self._label}: {self._show(self.done)} of {self._show(self._total)} ({share:.0%}), "
            f"{self._show(rate)}/s, {left:.0f} s left"
        )

    def _show(self, amount: float) -> str:
        shown = f"{amount / self._scale:,.1f}" if self._scale != 1 else f"{amount:,.0f}"
        return f"{shown} {self._unit}".rstrip()
