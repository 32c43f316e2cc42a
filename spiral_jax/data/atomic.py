"""Files and folders that are there whole or not at all: the one way to write them. (Folders on a bucket: `staging`.)"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from etils import epath

from spiral_jax.data.bucket import is_bucket, refusals

AnyPath = TypeVar("AnyPath", Path, epath.Path)


def partial_of(path: AnyPath) -> AnyPath:
    """Where a file or folder is until it is whole."""
    return path.with_name(f".{path.name}.partial")


def write_text(path: Path | epath.Path, text: str) -> None:
    """As `write_bytes`, in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path | epath.Path, content: bytes) -> None:
    """Writes a file beside `path` and renames it, so that a kill leaves the old content or the new, never a part.

    On a bucket an object is written at once, with the same effect.

    Raises:
      SpiralError: it cannot be written.
    """
    if is_bucket(path):
        with written(path):
            path.write_bytes(content)
        return
    scratch = partial_of(path)
    with written(path):
        try:
            with scratch.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                scratch.unlink(missing_ok=True)  # a part of it would stay on a full disk
            raise


@contextlib.contextmanager
def written(path: Path | epath.Path) -> Iterator[None]:
    """What the disk or the bucket refuses in here is a SpiralError that names `path`."""
    with refusals(path, lambda why: f"{path} cannot be written ({why})"):
        yield


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into that takes the name `folder` when the block ends, in place of what was there.

    An exception removes it, and leaves what was there.

    Args:
      folder: its final name; the folder above it is made if need be.

    Yields:
      The folder to write into, a hidden one beside it.

    Raises:
      SpiralError: it cannot be made or written.
    """
    partial = partial_of(folder)
    made = [above for above in folder.parents if not above.exists()]
    try:
        with written(folder):
            shutil.rmtree(partial, ignore_errors=True)  # of a command that was killed
            partial.mkdir(parents=True)
            yield partial
            for path in partial.rglob("*"):
                if path.is_file():
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
            rename_whole(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):  # what holds something stays
            for above in made:
                above.rmdir()


def rename_whole(partial: Path, folder: Path) -> None:
    """Gives a complete folder its final name so that the name survives a power cut; replaces what was there.

    Args:
      partial: the complete folder, its files already on disk.
      folder: its final name, on the same file system.

    Raises:
      OSError: the file system refuses.
    """
    _sync_folder(partial)
    replaced = folder.with_name(f".{folder.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)  # of a run that was killed
    if folder.exists():
        # A folder with content cannot be renamed over. Between the two renames there is no store, never half of one.
        os.rename(folder, replaced)
    os.rename(partial, folder)
    shutil.rmtree(replaced, ignore_errors=True)
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
