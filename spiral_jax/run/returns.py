"""Going on from an older checkpoint's arrays, but not from its step."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils.epath import Path

from spiral_jax.errors import Diverged
from spiral_jax.parallel.processes import Processes
from spiral_jax.run.checkpoint import Checkpoints
from spiral_jax.run.config import RunConfig
from spiral_jax.run.resume import newest_whole
from spiral_jax.training.divergence import Skips


class Returns:
    """Takes the arrays of the last good checkpoint when too many updates were skipped: a `training.loop.Returning`."""

    def __init__(
        self,
        config: RunConfig,
        workdir: Path,
        checkpoints: Checkpoints,
        abstract_state: Any,
        skips: Skips,
        processes: Processes,
    ):
        """All of the run; `abstract_state` says how its state lies on the devices."""
        self._config, self._workdir, self._checkpoints = config, workdir, checkpoints
        self._abstract_state, self._skips, self._processes = abstract_state, skips, processes

    def due(self) -> bool:
        return self._skips.too_many()

    def __call__(self, step: int, state: Any) -> Any:
        """The state of a checkpoint, as after `step`.

        Args:
          step: the last one dispatched.
          state: after it; its memory is given back first, as two states may not fit.

        Raises:
          Diverged: there is no checkpoint to return to, or it was done too often.
        """
        skips = self._skips
        self._checkpoints.wait()
        steps: Sequence[int] = self._processes.from_main("the checkpoints", self._checkpoints.steps)
        said = f"after {skips.in_a_row} skipped updates in a row, the last one of step {step - 1}"
        newest = f"the newest checkpoint is of step {steps[-1]}" if steps else "there is no checkpoint"
        if not skips.may_return():
            raise Diverged(f"{said}, and {len(skips.passed_over)} returns to a checkpoint before that; {newest}")
        saved = None
        if skips.good:  # that of step 0 has no optimizer state
            jax.tree.map(lambda x: x.delete(), state)
            saved = newest_whole(
                self._config, self._workdir, self._checkpoints, self._abstract_state, self._processes, until=skips.good
            )
        if not saved or not saved.step:
            raise Diverged(f"{said}, with no checkpoint from before them to return to; {newest}")
        self._processes.say(
            f"{said}: training goes on after it with the parameters of step {saved.step}; steps {saved.step + 1} to "
            f"{step} are passed over"
        )
        skips.returned(saved.step, step)
        number = jax.make_array_from_callback((), self._abstract_state.step.sharding, lambda _: np.int32(step))
        return saved.arrays.replace(step=number)
