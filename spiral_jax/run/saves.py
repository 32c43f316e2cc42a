"""When a run is saved, and what becomes of it when that fails."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from spiral_jax.parallel.processes import Processes
from spiral_jax.run.checkpoint import Checkpoints, SaveFailed
from spiral_jax.run.config import RunConfig


class Saves:
    """Saves a run's state when it is due: a `training.loop.Saving`.

    Saves go on while training does. If one fails, that is found out after the next step, on several processes with the
    next save.
    """

    def __init__(self, checkpoints: Checkpoints, config: RunConfig, fingerprints: Sequence[str], processes: Processes):
        """`fingerprints` are those of the training tokens."""
        self._checkpoints, self._last_step = checkpoints, config.train.steps
        self._meta, self._fingerprints = {"config": config.to_dict()}, list(fingerprints)
        self._processes = processes
        # The others would wait for a process whose part failed, and only end together.
        self._goes_on = config.checkpoint.on_failure == "go_on" and not processes.several
        self._failure: SaveFailed | None = None  # of the newest save

    def due(self, step: int) -> bool:
        self._attempt(self._checkpoints.check)
        return self._checkpoints.due(step, self._last_step)

    def __call__(self, step: int, state: Any) -> None:
        self._attempt(self._checkpoints.wait)
        self._failure = None
        meta = {**self._meta, "data": {"step": step, "fingerprints": self._fingerprints}}
        self._attempt(lambda: self._checkpoints.save(step, state, meta), is_last=step == self._last_step)

    def finish(self) -> None:
        """Returns once the newest save is complete.

        Raises:
          SaveFailed: it has failed.
        """
        self._checkpoints.wait()
        if self._failure is not None:
            raise self._failure

    def _attempt(self, work: Callable[[], None], is_last: bool = False) -> None:
        try:
            work()
        except SaveFailed as failure:
            if is_last or not self._goes_on:
                raise
            self._failure = failure
            self._processes.say(f"note: {failure}; training goes on, and saves again when it is due", file=sys.stderr)
