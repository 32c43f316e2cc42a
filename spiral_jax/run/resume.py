"""Where a run goes on: at the newest of its checkpoints that is whole."""

import functools
from typing import Any, NamedTuple

from etils.epath import Path

from spiral_jax.errors import Damaged, SpiralError
from spiral_jax.parallel.processes import Processes
from spiral_jax.run import own_code
from spiral_jax.run.checkpoint import Checkpoints
from spiral_jax.run.config import RunConfig


class Saved(NamedTuple):
    """A checkpoint that was restored.

    Attributes:
      step: optimizer steps done; 0 is of imported parameters, not trained here yet.
      arrays: a TrainState; of step 0 the parameters alone.
      fingerprints: of the training tokens.
      divergence: what `training.divergence.Skips` kept; None if nothing is trained here yet.
    """

    step: int
    arrays: Any
    fingerprints: list[str]
    divergence: dict[str, Any] | None


def newest_whole(
    config: RunConfig,
    workdir: Path,
    checkpoints: Checkpoints,
    abstract_state: Any,
    processes: Processes,
    *,
    until: int | None = None,
) -> Saved | None:
    """Restores the newest checkpoint that is whole, after checking that `config` continues it.

    Damaged ones that are newer are named, a line each, and moved to WORKDIR/damaged.

    Args:
      config: of the run as it is to go on.
      workdir: of the run.
      checkpoints: in it.
      abstract_state: how the arrays are to lie.
      processes: of the run.
      until: the newest step that may be taken; None for any.

    Returns:
      None if there is no checkpoint.

    Raises:
      SpiralError: a configuration that does not continue the run, or there are checkpoints, but none is whole.
    """
    damaged: dict[int, Damaged] = {}
    steps = processes.from_main("the checkpoints", checkpoints.steps)
    for step in reversed(steps):
        if until is not None and step > until:
            continue
        try:
            saved = _restore(config, workdir, checkpoints, step, abstract_state)
        except Damaged as error:
            damaged[step] = error
            continue
        for newer, damage in damaged.items():
            place = processes.from_main("a damaged checkpoint", functools.partial(checkpoints.set_aside, newer))
            processes.say(f"{damage}; it is now {place}, and the run goes on from step {step}")
        if damaged:
            checkpoints.reload()
        return saved
    if damaged:
        newest = next(iter(damaged.values()))
        raise SpiralError(
            f"{newest}, and none of {len(steps)} checkpoints is whole; allowed: another --workdir, or this one without "
            f"{checkpoints.directory}"
        )
    return None


def _restore(config: RunConfig, workdir: Path, checkpoints: Checkpoints, step: int, abstract_state: Any) -> Saved:
    meta = checkpoints.load_meta(step)
    own_code.check_registered(workdir, meta["config"])
    config.check_resume(RunConfig.from_dict(meta["config"]), step)
    is_start = step == 0
    restore = checkpoints.restore_params if is_start else checkpoints.restore
    arrays = restore(step, abstract_state.params if is_start else abstract_state)
    return Saved(step, arrays, meta["data"]["fingerprints"], meta.get("divergence"))
