"""What is damaged in a run's directory is set aside: renamed, never removed, and in nobody's way."""

import itertools

from etils.epath import Path

from spiral_jax.errors import SpiralError

DAMAGED = "damaged"  # the folder in a run's directory


def set_aside(path: Path, workdir: Path) -> Path:
    """Moves a file or folder to WORKDIR/damaged, where it keeps its name and gets a number.

    A rename, which a disk does whole or not at all. On a bucket it would be a copy and a removal, file by file: there,
    an object beside the folder has to say that it is damaged, and whoever lists checkpoints has to look for it.

    Args:
      path: what is damaged, anywhere in `workdir`.
      workdir: of the run.

    Returns:
      Where it is now.

    Raises:
      SpiralError: the disk refuses.
    """
    folder = workdir / DAMAGED
    try:
        folder.mkdir(exist_ok=True)
        place = next(place for n in itertools.count() if not (place := folder / f"{path.name}.{n}").exists())
        path.rename(place)
    except OSError as error:
        raise SpiralError(
            f"{path} is damaged and cannot be moved to {folder} ({error.strerror or error}); allowed: a directory that "
            "can be written"
        ) from error
    return place
