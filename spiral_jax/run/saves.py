"""When a run is saved, and what becomes of it when that fails."""

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from spiral_jax.parallel.processes import Processes
from spiral_jax.run.checkpoint import CheckpointConfig, Checkpoints, SaveFailed, SaveUnreachable
from spiral_jax.run.config import RunConfig
from spiral_jax.run.guards import Guards
from spiral_jax.training.divergence import Skips


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
    """Saves a run's state when it is due: a `training.loop.Saving`.

    Saves go on while training does. If one fails, that is found out after the next step, on several processes with the
    next save.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        config: RunConfig,
        fingerprints: Sequence[str],
        processes: Processes,
        *,
        skips: Skips,
        guards: Guards,
        clock: Clock,
        asked: Callable[[], bool],
        flush: Callable[[], str | None] = lambda: None,
    ):
        """Saves nothing yet.

        Args:
          checkpoints: where to.
          config: the run's.
          fingerprints: those of the training tokens.
          processes: of the run.
          skips: updates that were skipped, of which a checkpoint keeps a record.
          guards: of which the claim allows a save, and the watchdog expects it.
          clock: for the time since the last one.
          asked: whether all processes have agreed to save now.
          flush: called before a save: what else is on record of the steps up to there has to be written, or it says
            why it is not.
        """
        self._checkpoints, self._last_step = checkpoints, config.train.steps
        self._meta, self._fingerprints = {"config": config.to_dict()}, list(fingerprints)
        self._processes = processes
        self._skips, self._guards, self._clock, self._asked, self._flush = skips, guards, clock, asked, flush
        # The others would wait for a process whose part failed, and only end together.
        self._goes_on = config.checkpoint.on_failure == "go_on" and not processes.several
        self._failure: SaveFailed | None = None  # of the newest save

    def due(self, step: int) -> bool:
        asked = self._asked()
        self._attempt(self._checkpoints.check)
        return asked or self._checkpoints.due(step, self._last_step)

    def __call__(self, step: int, state: Any) -> None:
        self._expect(step)
        self._clock.restart()
        self._attempt(self._checkpoints.wait)
        self._failure = None
        self._skips.saving(step)
        data = {"step": step, "fingerprints": self._fingerprints}
        meta = {**self._meta, "data": data, "divergence": self._skips.to_json()}

        def save() -> None:
            if why := self._flush():
                raise SaveUnreachable(f"step {step} is not saved, as its rows cannot be written ({why})")
            self._checkpoints.save(step, state, meta)

        self._attempt(save, is_last=step == self._last_step)

    def finish(self, step: int) -> None:
        """Returns once the newest save, of this step, is complete.

        Raises:
          SaveFailed: it has failed.
        """
        self._expect(step)
        self._checkpoints.wait()
        if self._failure is not None:
            raise self._failure

    def _expect(self, step: int) -> None:
        self._guards.watchdog.expect(f"the save of step {step}", "save_minutes")
        self._guards.check_claim()  # returns when the bucket has answered

    def _attempt(self, work: Callable[[], None], is_last: bool = False) -> None:
        try:
            work()
        except SaveFailed as failure:
            if is_last or not self._goes_on:
                raise
            self._failure = failure
            self._processes.say(f"note: {failure}; training goes on, and saves again when it is due", file=sys.stderr)
