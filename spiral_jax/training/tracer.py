"""Profiles of a range of steps."""

import importlib.util

import jax
from etils.epath import Path

from spiral_jax.data.staging import Staging
from spiral_jax.errors import SpiralError, require


class Tracer:
    """Profiles a range of steps: from before the first to after the last, or to where the run ends."""

    def __init__(self, folder: Path, profiled: range):
        self._folder, self._profiled = folder, profiled
        self._running: Staging | None = None

    def __call__(self, step: int) -> None:
        """Before a step is dispatched. When step n is, n - 2 is known to be done: its metrics were read."""
        if step in self._profiled and self._running is None:
            try:
                self._running = Staging(self._folder)
            except SpiralError as error:  # training goes on without it
                print(f"note: {error}; there is no trace", flush=True)
                self._profiled = range(0)
                return
            jax.profiler.start_trace(str(self._running.folder))
        if step > self._profiled.stop:
            self.stop()

    def stop(self) -> None:
        if self._running is None:
            return
        jax.profiler.stop_trace()
        staging, self._running = self._running, None
        try:
            staging.finish()
            print(f"trace        {self._folder}", flush=True)
        except SpiralError as error:  # training goes on without it
            print(f"note: {error}; the trace is in {staging.folder}", flush=True)


def check_profile(profiled: range, last_step: int) -> None:
    """Raises SpiralError where steps cannot be profiled: they do not come, or the profiler would end the process."""
    if not profiled:
        return
    flag = f"{profiled.start}:{profiled.stop - 1}"
    require(profiled.start <= last_step, "--profile", flag, f"steps up to {last_step}, the last one of the run")
    # jax has loaded the TPU's library, which is installed, has found no TPU, and keeps a profiler for it that crashes.
    platform = jax.devices()[0].platform
    asked: str | None = jax.config.values["jax_platforms"]
    crashes = platform != "tpu" and (not asked or "tpu" in asked) and importlib.util.find_spec("libtpu") is not None
    allowed = f"with JAX_PLATFORMS={platform} in the environment, as libtpu is installed here and there is no TPU"
    require(not crashes, "--profile", flag, allowed)


def parse_profile(flag: str) -> range:
    """FIRST:LAST to the range of steps to trace."""
    if not flag:
        return range(0)
    first, _, last = flag.partition(":")
    are_numbers = all(number.isascii() and number.isdigit() and len(number) < 10 for number in (first, last))
    if not (are_numbers and 1 <= int(first) <= int(last)):
        raise SpiralError(f"--profile is {flag!r}; allowed: FIRST:LAST, two steps with 1 <= FIRST <= LAST")
    return range(int(first), int(last) + 1)
