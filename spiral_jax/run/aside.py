"""What is damaged in a run's directory is set aside: never removed, and in nobody's way."""

import itertools
import json

from etils.epath import Path

from spiral_jax.data import atomic
from spiral_jax.data.bucket import is_bucket, is_folder, is_trouble, reason, remove
from spiral_jax.errors import SpiralError

DAMAGED = "damaged"  # the folder in a run's directory


def set_aside(path: Path, workdir: Path) -> Path:
    """Moves a file or folder to WORKDIR/damaged, where it keeps its name and gets a number.

    A rename, which a disk does whole or not at all. On a bucket that would be a copy and a removal, file by file:
    there, a folder stays where it is, and an object in WORKDIR/damaged says that it is damaged. Whoever lists such
    folders leaves out those that `marked` names.

    Args:
      path: what is damaged, anywhere in `workdir`.
      workdir: of the run.

    Returns:
      Where it is now, or the object that says so.

    Raises:
      SpiralError: the disk refuses.
    """
    folder = workdir / DAMAGED
    if is_bucket(workdir) and is_folder(path):
        mark = folder / path.name
        atomic.write_text(mark, json.dumps({"damaged": str(path)}) + "\n")
        return mark
    try:
        folder.mkdir(exist_ok=True)
        place = next(place for n in itertools.count() if not (place := folder / f"{path.name}.{n}").exists())
        if is_bucket(workdir):
            place.write_bytes(path.read_bytes())
            remove(path)
        else:
            path.rename(place)
    except Exception as error:
        if not is_trouble(error):
            raise
        raise SpiralError(
            f"{path} is damaged and cannot be moved to {folder} ({reason(error)}); allowed: a directory that can be "
            "written"
        ) from error
    return place


def marked(workdir: Path) -> set[str]:
    """Names of folders in a run's directory on a bucket that `set_aside` has left where they are."""
    folder = workdir / DAMAGED
    return {path.name for path in folder.iterdir()} if is_folder(folder) else set()


def unmark(path: Path, workdir: Path) -> None:
    """Something else has the name of a folder that was set aside."""
    remove(workdir / DAMAGED / path.name)
