"""Folders that appear whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from spiral_jax.data.atomic import rename_whole
from spiral_jax.data.storage import local_path
from spiral_jax.errors import SpiralError


def output_folder(flag: str, given: str | None, replaceable: frozenset[str] = frozenset()) -> Path:
    """The absolute path of a folder to make.

    Args:
      flag: how it is called in errors.
      given: the path; it must not be there, or be empty.
      replaceable: names of files that it may hold all the same.

    Raises:
      SpiralError: not given, not a folder, or one that holds something else.
    """
    if not given:
        raise SpiralError(f"--{flag} is missing: the folder to make")
    folder = local_path(f"--{flag}", given)
    if folder.exists() and not folder.is_dir():
        raise SpiralError(f"--{flag} {folder}: is a file; allowed: a folder, new or empty")
    foreign = sorted(path.name for path in folder.glob("*") if path.name not in replaceable) if folder.exists() else []
    if foreign:
        raise SpiralError(f"--{flag} {folder}: holds {foreign[0]}; allowed: a folder that is new or empty")
    return folder


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into that takes the name `folder` when the block ends, in place of what was there.

    An exception removes it, and leaves what was there.

    Raises:
      SpiralError: it cannot be made or written.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a command that was killed
        partial.mkdir(parents=True)
        yield partial
        for path in partial.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        rename_whole(partial, folder)
    except OSError as error:
        raise SpiralError(f"{folder}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
