"""Folders that are written by libraries which know disks alone: on a bucket, by way of this machine's disk."""

import contextlib
import hashlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence

from etils import epath

from spiral_jax.data import atomic
from spiral_jax.data.bucket import download, is_bucket, remove, upload
from spiral_jax.data.json_files import read_json_object, write_json
from spiral_jax.errors import SpiralError

UNFINISHED = "unfinished.json"
_TMPDIR = pathlib.Path("TMPDIR")  # for errors: where there is none to be found, it has no name


class Staging:
    """Where a folder is to be written: itself on a disk, and a temporary one for a folder on a bucket.

    Attributes:
      folder: a path of this machine.
    """

    def __init__(self, folder: pathlib.Path | epath.Path):
        """Makes the temporary folder, if there is to be one.

        Raises:
          SpiralError: the disk refuses.
        """
        self._to = epath.Path(folder) if is_bucket(folder) else None
        if self._to is None:
            self.folder = pathlib.Path(folder)
        else:
            with atomic.written(_TMPDIR):
                self.folder = pathlib.Path(tempfile.mkdtemp(prefix="spiral_jax-"))

    def finish(self, *, alone: bool = False) -> None:
        """What is in the folder is whole: it is copied to the bucket, and is gone from this machine.

        Args:
          alone: whether other files that the folder on the bucket has are removed. Until all is there, an object
            UNFINISHED says so, and none of those that others are found by is there.

        Raises:
          SpiralError: the bucket refuses; the copy here stays.
        """
        if self._to is not None:
            with atomic.written(self._to):
                if alone:
                    self._begin(self._to)
                upload(self.folder, self._to, alone=alone)
            self.discard()

    def _begin(self, to: epath.Path) -> None:
        names = {path.name for path in self.folder.iterdir()} | {path.name for path in to.glob("*")} | unfinished(to)
        write_json(to / UNFINISHED, {"files": sorted(names)})
        for name in names:
            if name.endswith(".json") and name != UNFINISHED:
                remove(to / name)

    def discard(self) -> None:
        """Removes a temporary folder."""
        if self._to is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def unfinished(folder: pathlib.Path | epath.Path) -> frozenset[str]:
    """Names in a folder on a bucket that a copy which broke off has left there, or was to replace."""
    place = epath.Path(folder) / UNFINISHED
    if not is_bucket(folder) or not place.exists():
        return frozenset()
    names = read_json_object(place).get("files")
    return frozenset({UNFINISHED, *names}) if isinstance(names, list) else frozenset()


@contextlib.contextmanager
def whole_folder(folder: pathlib.Path | epath.Path) -> Iterator[pathlib.Path]:
    """As `atomic.whole_folder`, also for a folder on a bucket: there, it is filled file by file once all are made.

    Raises:
      SpiralError: it cannot be made or written.
    """
    if not is_bucket(folder):
        with atomic.whole_folder(pathlib.Path(folder)) as partial:
            yield partial
        return
    staging = Staging(folder)
    try:
        with atomic.written(staging.folder):
            yield staging.folder
        staging.finish(alone=True)
    finally:
        staging.discard()


def stand_in(folder: epath.Path) -> pathlib.Path:
    """The folder of this machine for one on a bucket that takes long to make; another process goes on with it.

    It is in a folder below TMPDIR in which no other user may write.

    Raises:
      SpiralError: it cannot be made, or is somebody else's.
    """
    with atomic.written(_TMPDIR):
        above = pathlib.Path(tempfile.gettempdir(), f"spiral_jax-{os.getuid()}")
        above.mkdir(mode=0o700, exist_ok=True)
        if above.is_symlink() or above.stat().st_uid != os.getuid():
            raise SpiralError(f"{above} is another user's; allowed: another folder in TMPDIR")
    return above / hashlib.sha256(str(folder).encode("utf-8")).hexdigest()[:16]


@contextlib.contextmanager
def fetched(folder: pathlib.Path | epath.Path, patterns: Sequence[str]) -> Iterator[pathlib.Path]:
    """A folder of this machine with the files of `folder` that match: itself on a disk, a temporary copy of a bucket's.

    Raises:
      OSError: it cannot be read, or an error of the bucket's libraries.
    """
    if not is_bucket(folder):
        yield pathlib.Path(folder)
        return
    with tempfile.TemporaryDirectory(prefix="spiral_jax-") as copy:
        place = epath.Path(folder)
        download([path for pattern in patterns for path in place.glob(pattern)], pathlib.Path(copy))
        yield pathlib.Path(copy)
