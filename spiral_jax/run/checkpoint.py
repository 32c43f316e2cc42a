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
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils.epath import Path
from flax.traverse_util import unflatten_dict

from spiral_jax.data.bucket import despite_trouble, is_bucket, is_trouble
from spiral_jax.data.storage import absolute
from spiral_jax.errors import Damaged, Diverged, SpiralError, Unreachable, require
from spiral_jax.parallel.processes import ALONE, Processes
from spiral_jax.run.digest import Array, outline, path_name, summary
from spiral_jax.run.failures import disk_trouble, finish_threads, first_words, is_outage
from spiral_jax.run.step_folders import committing, step_folders

FORMAT = 3
SMALL = 1 << 20  # bytes that a device writes at least, of an array that several hold


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep.

    Attributes:
      every_steps: steps between checkpoints; the last step is always saved.
      every_minutes: time after the last checkpoint for another one, whatever its step; 0 for none.
      keep: newest checkpoints to keep.
      keep_every_steps: checkpoints at multiples of this (itself a multiple of `every_steps`) are kept for good; 0
        for none.
      on_failure: what a save that fails (a full disk, say) does to the run: `stop` ends it, with status 2; `go_on` says
        so and tries again when the next one is due, but if the last one fails, it ends with status 2, too. Several
        processes always stop.
    """

    every_steps: int = 1000
    every_minutes: float = 0.0
    keep: int = 3
    keep_every_steps: int = 0
    on_failure: Literal["stop", "go_on"] = "stop"

    def __post_init__(self):
        for field, least in (("every_steps", 1), ("keep", 1), ("keep_every_steps", 0)):
            require(getattr(self, field) >= least, f"checkpoint.{field}", getattr(self, field), f"{least} or more")
        require(self.on_failure in ("stop", "go_on"), "checkpoint.on_failure", self.on_failure, "stop, go_on")
        require(0 <= self.every_minutes < math.inf, "checkpoint.every_minutes", self.every_minutes, "0 or more")
        kept, every = self.keep_every_steps, self.every_steps
        require(kept % every == 0, "checkpoint.keep_every_steps", kept, f"multiples of checkpoint.every_steps {every}")


class SaveFailed(SpiralError):
    """A checkpoint that could not be written; those before it are whole."""


class SaveUnreachable(SaveFailed, Unreachable):
    """The same on a bucket."""


class Checkpoints:
    """The checkpoints of one run directory, which all processes see; all of them make the same calls."""

    def __init__(
        self,
        workdir: Path,
        config: CheckpointConfig = CheckpointConfig(),
        *,
        read_only: bool = False,
        processes: Processes = ALONE,
        before_commit: Callable[[], None] = lambda: None,
    ):
        """Opens WORKDIR/checkpoints.

        Args:
          workdir: of the run.
          config: cadence and retention.
          read_only: for readers: nothing is created or removed.
          processes: that agree on what can be read. By default each finds out for itself.
          before_commit: called, on a bucket and on process 0, when all of a checkpoint is written but the object that
            says so, which it may prevent.
        """
        self.directory = Path(absolute(str(workdir))) / "checkpoints"  # orbax refuses relative ones at the first save
        self._config, self._processes = config, processes
        self._folders = step_folders(self.directory)
        self._aside = self._folders.damaged()
        if not read_only and jax.process_index() == 0:
            for step in self._aside:  # by a process that was killed before it had done so
                self._folders.hide(step)
        self._metas: dict[int, dict[str, Any]] = {}  # that were read
        self._saving: int | None = None  # the step whose save is not known to be complete
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=None if read_only else config.keep,
                keep_period=config.keep_every_steps or None,
                save_interval_steps=0 if read_only else 1,
                create=not read_only,
                read_only=read_only,
                temporary_path_class=committing(before_commit) if is_bucket(self.directory) else None,
            ),
            item_handlers={"params": _writer(), "training": _writer(), "meta": ocp.JsonCheckpointHandler()},
        )
        # Reads by itself: a process that cannot must not leave the others waiting for it in a barrier.
        me = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(
            primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"reader_{me}"
        )
        self._reader = ocp.Checkpointer(ocp.CompositeCheckpointHandler(), multiprocessing_options=alone)
        self._check_seen()

    def latest_step(self) -> int | None:
        """The last of `steps`, or None."""
        return max(self.steps(), default=None)

    def steps(self) -> list[int]:
        """The steps there are complete checkpoints of, oldest first; until `wait`, also the one that is being saved."""
        return sorted(set(self._manager.all_steps()) - self._aside)

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
          SaveFailed: this save could not be started, or the one before has failed.
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
        self.wait()  # what an error names has to be complete
        found = summary(items)
        if found.not_finite:
            raise Diverged(f"step {step}: {found.not_finite[0]} is not finite and is not saved; {self._last_good()}")
        meta = {"format": FORMAT, "step": step, **meta, "arrays": found.arrays}
        meta["digest"] = _digest_of(meta)
        arrays = {name: ocp.args.PyTreeSave(tree) for name, tree in items.items()}
        if not self._folders.is_there():
            raise self._failed(step)
        try:
            if step in self._aside and jax.process_index() == 0:
                self._folders.make_way(step)
            self._aside.discard(step)
            self._metas.pop(step, None)
            self._remove_unfinished()
            self._manager.save(step, args=ocp.args.Composite(**arrays, meta=ocp.args.JsonSave(meta)), force=True)
        except Exception as error:  # of any kind
            raise self._failed(step, error) from error
        self._saving = step

    def _failed(self, step: int, error: Exception | None = None) -> SaveFailed:
        """After this, the step can be saved again: orbax itself would keep it in its list, and a part of it on disk."""
        reason = "it is not there" if error is None else disk_trouble(error)
        if not self._folders.is_there():
            reason = f"{self.directory} is not there any more"
        last_good = self._last_good(but=step)
        finish_threads(seconds=5)
        for _ in range(9):  # of one save there may be several errors, and the next one would fail with each
            with contextlib.suppress(Exception):
                self._manager.check_for_errors()
                break
        self._remove_unfinished()
        with despite_trouble(), contextlib.suppress(Unreachable):  # of a disk that is gone
            self.reload()
        kind = SaveUnreachable if is_bucket(self.directory) else SaveFailed
        return kind(f"{self._folder(step)} cannot be saved ({reason}); {last_good}")

    def _remove_unfinished(self) -> None:
        """What a kill or a full disk has left of saves; it may be what fills the disk."""
        with despite_trouble():  # of a write that goes on all the same: the next call gets it
            kept = {*self._manager.all_steps(), *self._aside}
            for path in self._folders.unfinished(kept) if jax.process_index() == 0 else ():
                path.rmtree(missing_ok=True)

    def _last_good(self, but: int | None = None) -> str:
        steps = [step for step in self.steps() if step != but]
        return f"the newest checkpoint is of step {steps[-1]}" if steps else "there is no checkpoint"

    def load_meta(self, step: int) -> dict[str, Any]:
        """The JSON saved with a checkpoint.

        Raises:
          Damaged: it is not what was saved, or that of another step.
          SpiralError: it is of another version.
        """
        if step not in self._metas:
            self._metas[step] = self._read_meta(step)
        return self._metas[step]

    def _read_meta(self, step: int) -> dict[str, Any]:
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

    def is_whole(self, step: int) -> bool:
        """Whether the parameters can be restored; read on the host, by this process alone."""
        try:
            arrays = self.load_meta(step)["arrays"]
            params = {
                tuple(path.split("/")): on_host(jax.ShapeDtypeStruct(shape, np.dtype(dtype)))
                for path, (dtype, shape, _) in arrays.items()
                if path.startswith("params/")
            }
            self._restore_arrays(step, unflatten_dict(params))
            return True
        except Unreachable:
            raise
        except SpiralError:
            return False

    def set_aside(self, step: int) -> str:
        """Moves a damaged checkpoint out of the way, where its step can be saved again.

        Returns:
          Where it is now.
        """
        return self._folders.set_aside(step)

    def reload(self) -> None:
        """Looks again at which checkpoints there are."""
        self._manager.reload()
        self._aside = self._folders.damaged()
        self._check_seen()

    def _check_seen(self) -> None:
        """Raises Unreachable if orbax lists less than is whole: it takes a bucket's trouble for "not there"."""
        if missing := self._folders.whole() - self._aside - set(self._manager.all_steps()):
            self._manager.reload()  # one may have been completed in between
            if missing := missing - set(self._manager.all_steps()):
                raise Unreachable(f"{self._folder(min(missing))} cannot be seen now, although it is there")

    def wait(self) -> None:
        """Returns once every save is complete on disk.

        Raises:
          SaveFailed: it is not.
        """
        step, self._saving = self._saving, None
        error: Exception | None = None
        try:
            self._manager.wait_until_finished()
        except Exception as failure:  # of any kind
            error = failure
        if step is None or (error is None and not self._folders.is_there()):
            return  # a run that was moved away with its checkpoint: the next save says so
        # What counts is what is there: if an older one could not be removed, that does no harm. Process 0 has put it
        # there; others may see it later.
        try:
            failed = error is not None if jax.process_index() else not self._folders.is_whole(step)
        except Exception as trouble:
            if not is_trouble(trouble):
                raise
            failed, error = True, error or trouble
        if failed:
            raise self._failed(step, error) from error

    def check(self) -> None:
        """As `wait`, but if a save goes on, it returns at once.

        On several processes it always does: asking orbax can take as long as the slowest of them.
        """
        if self._saving is not None and jax.process_count() == 1 and not self._manager.is_saving_in_progress():
            self.wait()

    def close(self) -> None:
        """Waits for saves, then frees threads."""
        try:
            self.wait()
        finally:
            self._reader.close()
            self._manager.close()

    def _restore(self, step: int, **items) -> Mapping[str, Any]:
        restored, reason = {}, None
        try:
            restored = self._reader.restore(self._folder(step), args=ocp.args.Composite(**items))
        except Exception as error:  # orbax raises no kind of its own, sometimes `Exception` itself
            if is_bucket(self.directory) and is_outage(error):
                raise Unreachable(f"{self._folder(step)} cannot be read now ({first_words(error)})") from error
            reason = first_words(error)
        reason = self._processes.first_of("what could be restored", reason)
        if reason is not None:
            raise self._damaged(step, f"cannot be restored: {reason}")
        return restored

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
        return self._folders.of(step)

    def _damaged(self, step: int, what: str) -> Damaged:
        return Damaged(f"{self._folder(step)} is damaged ({what})")


def _writer() -> ocp.PyTreeCheckpointHandler:
    """Saves arrays as orbax does by itself, but small ones that several devices hold are not cut between them.

    Each shape of such a cut is a program that the first save would compile, a hundred of them for a small model.
    """
    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=SMALL)
    handlers = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, ocp.type_handlers.NumpyHandler()), (jax.Array, arrays)
    )
    return ocp.PyTreeCheckpointHandler(type_handler_registry=handlers)


def _training(state) -> dict[str, Any]:
    return {"step": state.step, "opt_state": state.opt_state, "rng": state.rng}


def _digest_of(meta: Mapping[str, Any]) -> str:
    """Of the text of everything in it but itself."""
    text = json.dumps({key: value for key, value in meta.items() if key != "digest"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def on_host(abstract_tree):
    """The same shapes as NumPy arrays, which is what orbax then restores, whatever mesh they were saved from."""
    return jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), abstract_tree)  # takes no memory
