"""Saving and restoring runs. The only file that imports orbax.

A checkpoint holds three items: `params`; `training` (optimizer state, step, RNG); `meta` (JSON: configuration and
data state). Parameters are an item of their own so that scoring and sampling read nothing else. Step 0
is of imported parameters and has no `training`. Saves are asynchronous and atomic: a step's directory appears under
its final name when all of it is written.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils.epath import Path

from spiral_jax.errors import SpiralError, require

FORMAT = 2


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep.

    Attributes:
      every_steps: steps between checkpoints; the last step is always saved.
      keep: newest checkpoints to keep.
      keep_every_steps: checkpoints at multiples of this (itself a multiple of `every_steps`) are kept for good; 0
        for none.
    """

    every_steps: int = 1000
    keep: int = 3
    keep_every_steps: int = 0

    def __post_init__(self):
        for field, least in (("every_steps", 1), ("keep", 1), ("keep_every_steps", 0)):
            require(getattr(self, field) >= least, f"checkpoint.{field}", getattr(self, field), f"{least} or more")
        kept, every = self.keep_every_steps, self.every_steps
        require(kept % every == 0, "checkpoint.keep_every_steps", kept, f"multiples of checkpoint.every_steps {every}")


class Checkpoints:
    """The checkpoints of one run directory, which all processes see; all of them make the same calls."""

    def __init__(self, workdir: Path, config: CheckpointConfig = CheckpointConfig(), *, read_only: bool = False):
        """Opens WORKDIR/checkpoints.

        Args:
          workdir: absolute; orbax refuses relative directories at the first save only.
          config: cadence and retention.
          read_only: for readers: nothing is created or removed.
        """
        self.directory = workdir / "checkpoints"
        self._config = config
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=None if read_only else config.keep,
                keep_period=config.keep_every_steps or None,
                save_interval_steps=0 if read_only else 1,
                create=not read_only,
                read_only=read_only,
            ),
            item_names=("params", "training", "meta"),
        )

    def latest_step(self) -> int | None:
        """The newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """The steps there are complete checkpoints of, oldest first."""
        return sorted(self._manager.all_steps())

    def due(self, step: int, last_step: int) -> bool:
        return step % self._config.every_steps == 0 or step == last_step

    def save(self, step: int, state, meta: Mapping[str, Any]) -> None:
        """Starts saving; arrays are copied before this returns, so the state may be donated to the next step.

        Args:
          step: optimizer steps done.
          state: a `training.step.TrainState`.
          meta: JSON values; `load_meta` returns them.
        """
        if step in self.steps():
            return
        training = {"step": state.step, "opt_state": state.opt_state, "rng": state.rng}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                training=ocp.args.StandardSave(training),
                meta=ocp.args.JsonSave({"format": FORMAT, **meta}),
            ),
        )

    def save_start(self, params, meta: Mapping[str, Any]) -> None:
        """Saves parameters that come from elsewhere as step 0, and waits. Nothing is trained: no optimizer state.

        Args:
          params: NumPy or JAX arrays.
          meta: as for `save`.
        """
        items = {
            "params": ocp.args.StandardSave(params),
            "meta": ocp.args.JsonSave({"format": FORMAT, **meta}),
        }
        self._manager.save(0, args=ocp.args.Composite(**items))
        self.wait()

    def load_meta(self, step: int) -> dict[str, Any]:
        """The JSON saved with a checkpoint."""
        meta = self._restore(step, meta=ocp.args.JsonRestore())["meta"]
        if meta.get("format") != FORMAT:
            raise SpiralError(f"{self.directory / str(step)} has format {meta.get('format')!r}; allowed: {FORMAT}")
        return meta

    def restore(self, step: int, abstract_state):
        """A TrainState laid out as `abstract_state` says (shapes, dtypes, shardings)."""
        training = {"step": abstract_state.step, "opt_state": abstract_state.opt_state, "rng": abstract_state.rng}
        items = self._restore(
            step,
            params=ocp.args.StandardRestore(abstract_state.params),
            training=ocp.args.StandardRestore(training),
        )
        return abstract_state.replace(params=items["params"], **items["training"])

    def restore_params(self, step: int, abstract_params):
        """The parameters alone."""
        return self._restore(step, params=ocp.args.StandardRestore(abstract_params))["params"]

    def wait(self) -> None:
        """Returns once every save is complete on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for saves, then frees threads."""
        self._manager.close()

    def _restore(self, step: int, **items) -> Mapping[str, Any]:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, KeyError, OSError, TypeError) as error:
            # orbax says a great deal; its first words say which array or file it is about.
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
            raise SpiralError(f"{self.directory / str(step)}: the checkpoint cannot be restored: {reason}") from error


class Saves:
    """Saves a run's state when it is due: a `training.loop.Saving`."""

    def __init__(self, checkpoints: Checkpoints, last_step: int, meta: Mapping[str, Any], fingerprints: Sequence[str]):
        """`meta` is JSON to keep with every checkpoint; `fingerprints` are those of the training tokens."""
        self._checkpoints, self._last_step = checkpoints, last_step
        self._meta, self._fingerprints = meta, list(fingerprints)

    def due(self, step: int) -> bool:
        return self._checkpoints.due(step, self._last_step)

    def __call__(self, step: int, state: Any) -> None:
        data = {"step": step, "fingerprints": self._fingerprints}
        self._checkpoints.save(step, state, {**self._meta, "data": data})


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
    """A run's checkpoints, and which of them is meant."""
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
        yield checkpoints, step
    finally:
        checkpoints.close()


def on_host(abstract_tree):
    """The same shapes as NumPy arrays, which is what orbax then restores, whatever mesh they were saved from."""
    return jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), abstract_tree)  # takes no memory
