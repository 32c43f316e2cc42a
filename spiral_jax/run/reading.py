"""Checkpoints for those who only read them: a damaged one is refused, and one that is whole is named."""

import contextlib
from collections.abc import Iterator
from typing import Any

from etils.epath import Path

from spiral_jax.errors import Damaged, SpiralError
from spiral_jax.run.checkpoint import Checkpoints


def restore_for_inference(workdir: Path, abstract_params, step: int | None = None) -> tuple[Any, int]:
    """Parameters of a run's newest checkpoint (or of `step`), laid out as `abstract_params` says.

    Returns:
      params and the step they were saved at.

    Raises:
      SpiralError: the run has no such checkpoint.
    """
    with _reading(workdir, step) as (checkpoints, step):
        return checkpoints.restore_params(step, abstract_params), step


def read_meta(workdir: Path, step: int | None = None) -> tuple[dict[str, Any], int]:
    """What was saved beside the parameters that `restore_for_inference` restores, and the step.

    Raises:
      SpiralError: the run has no such checkpoint, or one of another version.
    """
    with _reading(workdir, step) as (checkpoints, step):
        return checkpoints.load_meta(step), step


@contextlib.contextmanager
def _reading(workdir: Path, step: int | None) -> Iterator[tuple[Checkpoints, int]]:
    """A run's checkpoints, and which of them is meant; if that is damaged, the error says which one is not."""
    if not (workdir / "checkpoints").is_dir():
        raise SpiralError(f"{workdir} has no checkpoints; allowed: the directory of a run")
    checkpoints = Checkpoints(workdir, read_only=True)
    try:
        steps = checkpoints.steps()
        if step is None and steps:
            step = steps[-1]
        if step not in steps:
            raise SpiralError(
                f"{checkpoints.directory} has no checkpoint of step {step}; allowed: {steps or 'a trained run'}"
            )
        try:
            yield checkpoints, step
        except Damaged as error:
            whole = next((other for other in reversed(steps) if other != step and checkpoints.is_whole(other)), None)
            raise SpiralError(f"{error}; allowed: {'another run' if whole is None else f'--step={whole}'}") from error
    finally:
        checkpoints.close()
