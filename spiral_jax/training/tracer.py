"""Profiles of a range of steps."""

from pathlib import Path

import jax

from spiral_jax.errors import SpiralError


class Tracer:
    """Profiles a range of steps: from before the first to after the last, or to where the run ends."""

    def __init__(self, folder: Path, profiled: range):
        self._folder, self._profiled = folder, profiled
        self._running = False

    def __call__(self, step: int) -> None:
        """Before a step is dispatched. When step n is, n - 2 is known to be done: its metrics were read."""
        if step in self._profiled and not self._running:
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        if step > self._profiled.stop:
            self.stop()

    def stop(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
            print(f"trace        {self._folder}", flush=True)


def parse_profile(flag: str) -> range:
    """FIRST:LAST to the range of steps to trace."""
    if not flag:
        return range(0)
    first, _, last = flag.partition(":")
    if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        raise SpiralError(f"--profile is {flag!r}; allowed: FIRST:LAST, two steps with 1 <= FIRST <= LAST")
    return range(int(first), int(last) + 1)
