"""Checkpoints for those who only read them: a damaged one is refused, and one that is whole is named."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from etils.epath import Path

from spiral_jax.data.bucket import is_folder
from spiral_jax.errors import Damaged, SpiralError
from spiral_jax.parallel.processes import ALONE, Processes
from spiral_jax.run import own_code
from spiral_jax.run.checkpoint import Checkpoints
from spiral_jax.run.config import RunConfig


class SavedRun:
    """A checkpoint of a run that is opened for reading.

    Attributes:
      workdir: of the run.
      step: of the checkpoint.
    """

    def __init__(self, workdir: Path, checkpoints: Checkpoints, step: int):
        """Use `reading`."""
        self.workdir, self.step = workdir, step
        self._checkpoints = checkpoints

    @property
    def meta(self) -> dict[str, Any]:
        """What was saved beside the arrays.

        Raises:
          SpiralError: it is damaged, or of another version.
        """
        return self._checkpoints.load_meta(self.step)

    def config(self, processes: Processes = ALONE) -> RunConfig:
        """The configuration that the checkpoint was saved with.

        Unlike `config.json`, which is for people, that one is known to be what was saved. Process 0 says on stderr if
        code of the user's own has changed since.

        Raises:
          SpiralError: it is damaged, or names what nobody has registered.
        """
        own_code.check_registered(self.workdir, self.meta["config"])
        config = RunConfig.from_dict(self.meta["config"])
        for line in own_code.changes(self.workdir, config.to_dict()):
            processes.say(line, file=sys.stderr)
        return config

    def restore(self, abstract_params: Any) -> Any:
        """The parameters, laid out as `abstract_params` says.

        Raises:
          SpiralError: they are damaged, or others.
        """
        return self._checkpoints.restore_params(self.step, abstract_params)


@contextlib.contextmanager
def reading(workdir: Path, step: int | None = None) -> Iterator[SavedRun]:
    """A run's newest checkpoint, or that of `step`, opened for reading.

    Raises:
      SpiralError: the run has no such checkpoint; or what is read in the block is damaged: then it says which one of
        the others is not.
    """
    if not is_folder(workdir / "checkpoints"):
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
            yield SavedRun(workdir, checkpoints, step)
        except Damaged as error:
            whole = next((other for other in reversed(steps) if other != step and checkpoints.is_whole(other)), None)
            raise SpiralError(f"{error}; allowed: {'another run' if whole is None else f'--step={whole}'}") from error
    finally:
        checkpoints.close()
