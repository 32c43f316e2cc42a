"""When a run is saved."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from spiral_jax.run.checkpoint import CheckpointConfig, Checkpoints
from spiral_jax.run.guards import Guards


class Clock:
    """Whether it is time for a checkpoint by `checkpoint.every_minutes`; asked on process 0, which decides for all."""

    def __init__(self, config: CheckpointConfig):
        self._seconds = 60 * config.every_minutes
        self._begin = time.monotonic()

    def restart(self) -> None:
        """From now on."""
        self._begin = time.monotonic()

    def is_due(self) -> bool:
        """Once: it then starts again."""
        if not self._seconds or time.monotonic() - self._begin < self._seconds:
            return False
        self.restart()
        return True


class Saves:
    """Saves a run's state when it is due: a `training.loop.Saving`."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        last_step: int,
        meta: Mapping[str, Any],
        fingerprints: Sequence[str],
        *,
        guards: Guards,
        clock: Clock,
        asked: Callable[[], bool],
    ):
        """Saves nothing yet.

        Args:
          checkpoints: where to.
          last_step: which is always saved.
          meta: JSON to keep with every checkpoint.
          fingerprints: those of the training tokens.
          guards: of which the claim allows a save, and the watchdog expects it.
          clock: for the time since the last one.
          asked: whether all processes have agreed to save now.
        """
        self._checkpoints, self._last_step = checkpoints, last_step
        self._meta, self._fingerprints = meta, list(fingerprints)
        self._guards, self._clock, self._asked = guards, clock, asked

    def due(self, step: int) -> bool:
        asked = self._asked()
        return asked or self._checkpoints.due(step, self._last_step)

    def __call__(self, step: int, state: Any) -> None:
        self._guards.check_claim()
        self._guards.watchdog.expect(f"the save of step {step}", "save_minutes")
        self._clock.restart()
        data = {"step": step, "fingerprints": self._fingerprints}
        self._checkpoints.save(step, state, {**self._meta, "data": data})
