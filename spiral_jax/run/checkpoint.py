"""Saving and restoring runs. The only file that imports orbax.

A checkpoint holds three items: `params`; `training` (optimizer state, step, RNG); `meta` (JSON: configuration, data
state, the step, and digests). Parameters are an item of their own so that scoring and sampling read nothing else.
Step 0 is of imported parameters and has no `training`. Saves are asynchronous and atomic: a step's directory appears
under its final name when all of it is written.

Nothing that was not saved is ever restored: the digest of every array (`run.digest`) is compared with the one in
`meta`, `meta` with a digest of its own text, and the folder's name with the step in both. What differs is `Damaged`.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils.epath import Path

from spiral_jax.errors import Damaged, Diverged, SpiralError, require
from spiral_jax.run.digest import Array, outline, path_name, summary

FORMAT = 3
DAMAGED = "damaged"  # the folder, beside `checkpoints`, of what was set aside


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


class Unreadable(Damaged):
    """Files that cannot be read, perhaps on this process alone."""


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

        Raises:
          Diverged: a number of the state is not finite. Such a state is never saved.
        """
        if step in self.steps():
            return
        self._save(step, {"params": state.params, "training": _training(state)}, meta)

    def save_start(self, params, meta: Mapping[str, Any]) -> None:
        """Saves parameters that come from elsewhere as step 0, and waits. Nothing is trained: no optimizer state.

        Args:
          params: NumPy or JAX arrays.
          meta: as for `save`.
        """
        self._save(0, {"params": params}, meta)
        self.wait()

    def _save(self, step: int, items: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        found = summary(items)
        if found.not_finite:
            self.wait()  # what is named has to be complete
            raise Diverged(f"step {step}: {found.not_finite[0]} is not finite and is not saved; {self._last_good()}")
        meta = {"format": FORMAT, "step": step, **meta, "arrays": found.arrays}
        meta["digest"] = _digest_of(meta)
        arrays = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        self._manager.save(step, args=ocp.args.Composite(**arrays, meta=ocp.args.JsonSave(meta)))

    def _last_good(self) -> str:
        steps = self.steps()
        return f"the newest checkpoint is of step {steps[-1]}" if steps else "there is no checkpoint"

    def load_meta(self, step: int) -> dict[str, Any]:
        """The JSON saved with a checkpoint.

        Raises:
          Damaged: it is not what was saved, or that of another step.
          SpiralError: it is of another version.
        """
        meta = self._restore(step, meta=ocp.args.JsonRestore())["meta"]
        if not isinstance(meta, dict):
            raise self._damaged(step, "meta is no JSON object")
        if "digest" not in meta and isinstance(meta.get("format"), int):  # of versions that had none
            raise SpiralError(f"{self._folder(step)} has format {meta['format']}; allowed: {FORMAT}")
        if _digest_of(meta) != meta.get("digest"):
            raise self._damaged(step, "meta is not what was saved")
        require(meta["format"] == FORMAT, f"{self._folder(step)}: format", meta["format"], str(FORMAT))
        if meta["step"] != step:
            raise self._damaged(step, f"it is the checkpoint of step {meta['step']}")
        return meta

    def restore(self, step: int, abstract_state):
        """A TrainState laid out as `abstract_state` says (shapes, dtypes, shardings).

        Raises:
          Damaged: its arrays cannot be read, or are not those that were saved.
        """
        items = self._restore_arrays(step, {"params": abstract_state.params, "training": _training(abstract_state)})
        if int(items["training"]["step"]) != step:
            raise self._damaged(step, f"its state is that of step {int(items['training']['step'])}")
        return abstract_state.replace(params=items["params"], **items["training"])

    def restore_params(self, step: int, abstract_params):
        """The parameters alone, likewise."""
        return self._restore_arrays(step, {"params": abstract_params})["params"]

    def is_whole(self, step: int, abstract_params) -> bool:
        """Whether the parameters can be restored."""
        try:
            self.restore_params(step, abstract_params)
            return True
        except Damaged:
            return False

    def set_aside(self, step: int) -> str:
        """Moves a damaged checkpoint out of the way, to WORKDIR/damaged, where its step can be saved again.

        Returns:
          Where it is now.
        """
        folder = self.directory.parent / DAMAGED
        folder.mkdir(exist_ok=True)
        number = sum(path.name.startswith(f"{step}.") for path in folder.iterdir())
        place = folder / f"{step}.{number}"
        self._folder(step).rename(place)
        return str(place)

    def reload(self) -> None:
        """Looks again at which checkpoints there are."""
        self._manager.reload()

    def wait(self) -> None:
        """Returns once every save is complete on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for saves, then frees threads."""
        self._manager.close()

    def _restore(self, step: int, **items) -> Mapping[str, Any]:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # orbax raises no kind of its own, sometimes `Exception` itself
            # It says a great deal; its first words say which array or file it is about.
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
            raise Unreadable(f"{self._folder(step)} is damaged (cannot be restored: {reason})") from error

    def _restore_arrays(self, step: int, abstract: Mapping[str, Any]) -> Mapping[str, Any]:
        """Items as they were saved, in the dtypes of `abstract`."""
        saved = {path: Array(dtype, tuple(shape), digest)
                 for path, (dtype, shape, digest) in self.load_meta(step)["arrays"].items()
                 if path.partition("/")[0] in abstract}  # fmt: skip
        wanted = outline(abstract)
        for path in sorted(saved.keys() | wanted.keys()):
            ours, theirs = wanted.get(path), saved.get(path)
            if ours is None or theirs is None or ours.shape != theirs.shape:
                raise SpiralError(
                    f"{self._folder(step)}: {path} is {theirs or 'missing'}; allowed: {ours or 'no such'}"
                )

        def as_saved(path, x):
            like = jax.ShapeDtypeStruct(x.shape, np.dtype(saved[path_name(path)].dtype))
            return on_host(like) if isinstance(x, np.ndarray) else like.update(sharding=x.sharding)

        stored = jax.tree_util.tree_map_with_path(as_saved, dict(abstract))
        items = self._restore(step, **{name: ocp.args.StandardRestore(tree) for name, tree in stored.items()})
        items = {name: items[name] for name in abstract}
        found = summary(items).arrays
        others = [path for path in found if found[path] != saved[path]]
        if others:
            raise self._damaged(step, f"{others[0]} is not what was saved, {len(others)} of {len(found)} arrays")
        return jax.tree.map(lambda x, like: x if x.dtype == like.dtype else x.astype(like.dtype), items, dict(abstract))

    def _folder(self, step: int) -> Path:
        return self.directory / str(step)

    def _damaged(self, step: int, what: str) -> Damaged:
        return Damaged(f"{self._folder(step)} is damaged ({what})")


def _training(state) -> dict[str, Any]:
    return {"step": state.step, "opt_state": state.opt_state, "rng": state.rng}


def _digest_of(meta: Mapping[str, Any]) -> str:
    """Of the text of everything in it but itself."""
    text = json.dumps({key: value for key, value in meta.items() if key != "digest"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def restore_for_inference(workdir: Path, abstract_params, step: int | None = None) -> tuple[Any, int]:
    """Parameters of a run's newest checkpoint (or of `step`), laid out as `abstract_params` says.

    Returns:
      params and the step they were saved at.

    Raises:
      SpiralError: the run has no such checkpoint.
    """
    with _reading(workdir, step) as (checkpoints, step):
        try:
            return checkpoints.restore_params(step, abstract_params), step
        except Damaged as error:
            whole = next((s for s in reversed(checkpoints.steps()) if checkpoints.is_whole(s, abstract_params)), None)
            raise SpiralError(f"{error}; allowed: {'another run' if whole is None else f'--step={whole}'}") from error


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
