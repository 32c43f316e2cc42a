"""Files by path or by fsspec URL, opened as blobs: what stores and Megatron files stand on."""

import dataclasses
import os
import re
from pathlib import Path

from etils import epath

from spiral_jax.data.blob import Blob, LocalBlob
from spiral_jax.data.bucket import bucket_path, check_reachable, is_bucket
from spiral_jax.errors import SpiralError, require

_FILE = "file://"  # needs no fsspec: what follows is a path of this machine


def is_url(place: str | os.PathLike) -> bool:
    """Whether a place is an fsspec URL rather than a path on this machine."""
    return "://" in str(place)


def local_path(field: str, place: str | os.PathLike) -> Path:
    """The absolute path of a place that is written: of this machine, or of a file system that it sees.

    Args:
      field: what to call it in errors.
      place: a path, or a `file://` URL.

    Raises:
      SpiralError: a URL of another scheme.
    """
    path = on_this_machine(place)
    if path is None or re.match(r"[a-z][a-z0-9]+:/", path):  # gs:/bucket: a slash was lost on its way
        raise SpiralError(f"{field} is {str(place)!r}; allowed: a path of this machine")
    return expanded(field, path).resolve()


def expanded(field: str, place: str) -> Path:
    """A path of this machine in which ~ and ~USER stand for home directories.

    Args:
      field: what to call it in errors.
      place: as it was given.

    Raises:
      SpiralError: there is no such user.
    """
    path = os.path.expanduser(place)
    user = path.partition("/")[0]
    require(not user.startswith("~"), field, place, f"another path; {user} is no user's home directory here")
    return Path(path)


def writable_path(field: str, place: str | os.PathLike) -> epath.Path:
    """As `local_path`, or the path of a folder on a bucket.

    Raises:
      SpiralError: a URL of another kind, or a package for it is missing.
    """
    if is_url(place) and on_this_machine(place) is None:
        return bucket_path(field, place)
    return epath.Path(local_path(field, place))


def reachable_path(field: str, place: str | os.PathLike) -> epath.Path:
    """As `writable_path`, of a bucket that answers.

    Raises:
      SpiralError: also if there is no such bucket, or it may not be used from here.
    """
    path = writable_path(field, place)
    if is_bucket(path):
        check_reachable(field, path)
    return path


def absolute(place: str) -> str:
    """A place that stays the same when the working folder changes; a URL is one."""
    return place if is_url(place) else os.path.abspath(os.path.expanduser(place))


def join(place: str | os.PathLike, *names: str) -> str:
    """A place below another one."""
    return "/".join([str(place).rstrip("/"), *names]) if is_url(place) else str(Path(place, *names))


def on_this_machine(place: str | os.PathLike) -> str | None:
    """The path that a path or a `file://` URL stands for; None for another URL."""
    path = str(place).removeprefix(_FILE)
    return None if is_url(path) else path


@dataclasses.dataclass(frozen=True)
class Storage:
    """How files are opened, local and remote.

    Attributes:
      retry_seconds: how long a failing remote read is tried again before it is an error.
      cache_dir: where remote tokens are kept for the next epoch; "" for nowhere.
      cache_gigabytes: bound of that cache, in units of 1e9 bytes; 0 for none.
    """

    retry_seconds: float = 300.0
    cache_dir: str = ""
    cache_gigabytes: float = 0.0

    def open(self, place: str | os.PathLike) -> Blob:
        """Opens a file for reading by ranges.

        Raises:
          SpiralError: it does not exist or cannot be read, or a package for its kind of URL is missing.
        """
        path = on_this_machine(place)
        if path is not None:
            return LocalBlob(path)
        # Imported here: most runs have no use for it.
        from spiral_jax.data.remote.blob import RemoteBlob

        blob = RemoteBlob(str(place), self.retry_seconds)
        if not self.cache_dir or not self.cache_gigabytes:
            return blob
        from spiral_jax.data.remote.cache import cached

        return cached(blob, self.cache_dir, (blob.name, blob.size, blob.version), int(self.cache_gigabytes * 1e9))

    def read_file(self, place: str | os.PathLike, max_bytes: int = 2**28) -> bytes:
        """Reads a small file whole, past the cache; raises as `open` does, and SpiralError if it is not small."""
        blob = Storage(self.retry_seconds).open(place)
        require(blob.size <= max_bytes, f"{place}: size", blob.size, f"up to {max_bytes} bytes")
        return bytes(blob.read(0, blob.size))

    def exists(self, place: str | os.PathLike) -> bool:
        """Whether there is a file (or, on this machine, a folder).

        Raises:
          SpiralError: the storage cannot be asked.
        """
        path = on_this_machine(place)
        if path is not None:
            return Path(path).exists()
        from spiral_jax.data.remote.blob import exists

        return exists(str(place), self.retry_seconds)


LOCAL = Storage()
