"""The folders of a run's checkpoints: when one is whole, and what becomes of the others."""

import asyncio
from collections.abc import Callable, Collection

import orbax.checkpoint as ocp
from etils.epath import Path

from spiral_jax.data.bucket import COMMITTED, folders_with, is_bucket, is_folder, remove
from spiral_jax.run.aside import marked, set_aside, unmark


class StepFolders:
    """On a disk: a rename gives a folder its name when it is whole.

    Attributes:
      directory: the folder with all of them.
    """

    def __init__(self, directory: Path):
        self.directory = directory

    def is_there(self) -> bool:
        """Whether the run is still where it began: orbax would begin another one at its old place."""
        return self.directory.is_dir()

    def is_whole(self, step: int) -> bool:
        """Whether a save of this step was completed."""
        return self.of(step).is_dir()

    def whole(self) -> set[int]:
        """Steps whose folders are known to be whole, as far as orbax cannot be trusted to know it."""
        return set()

    def damaged(self) -> set[int]:
        """Steps that were set aside, but whose folders are still among the others."""
        return set()

    def unfinished(self, kept: Collection[int]) -> list[Path]:
        """What a kill or a full disk has left of saves, if those of `kept` were completed."""
        return list(self.directory.glob("*.orbax-checkpoint-tmp*"))

    def set_aside(self, step: int) -> str:
        """Moves a damaged checkpoint out of the way, where its step can be saved again.

        Returns:
          Where it is now.
        """
        return str(set_aside(self.of(step), self.directory.parent))

    def hide(self, step: int) -> None:
        """Makes orbax, which knows nothing of `damaged`, leave out a step of it."""

    def make_way(self, step: int) -> None:
        """Before a step of `damaged` is saved."""

    def of(self, step: int) -> Path:
        """The folder of a step."""
        return self.directory / str(step)


class BucketStepFolders(StepFolders):
    """On a bucket: an object that is written last says that a folder is whole, and another one that it is damaged."""

    def is_there(self) -> bool:
        return True  # there are no folders that could be moved away

    def is_whole(self, step: int) -> bool:
        return (self.of(step) / COMMITTED).exists()

    def whole(self) -> set[int]:
        return {int(name) for name in folders_with(self.directory, COMMITTED) if name.isdigit()}

    def damaged(self) -> set[int]:
        return {int(name) for name in marked(self.directory.parent) if name.isdigit()}

    def unfinished(self, kept: Collection[int]) -> list[Path]:
        if not is_folder(self.directory):
            return []
        # Also if orbax has not seen a whole one: it takes some answers of a bucket in trouble for "not there".
        kept = {*kept, *self.whole()}
        return [path for path in self.directory.iterdir() if path.name.isdigit() and int(path.name) not in kept]

    def set_aside(self, step: int) -> str:
        mark = set_aside(self.of(step), self.directory.parent)
        self.hide(step)
        return f"marked by {mark}"

    def hide(self, step: int) -> None:
        # As one that was never completed.
        remove(self.of(step) / COMMITTED)

    def make_way(self, step: int) -> None:
        # orbax then removes the folder, as one that was never completed.
        self.hide(step)
        unmark(self.of(step), self.directory.parent)


def step_folders(directory: Path) -> StepFolders:
    """Those of a run, wherever it is."""
    return BucketStepFolders(directory) if is_bucket(directory) else StepFolders(directory)


def committing(check: Callable[[], None]) -> type[ocp.path.atomicity.CommitFileTemporaryPath]:
    """How orbax completes a checkpoint on a bucket, but after a last check: another start may have the run by then."""

    class Checked(ocp.path.atomicity.CommitFileTemporaryPath):
        async def finalize(self) -> None:
            if self.get_final().name.isdigit():  # not one of its items
                await asyncio.to_thread(check)
            await super().finalize()

    return Checked
