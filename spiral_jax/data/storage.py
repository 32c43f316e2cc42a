"""Files by path or by fsspec URL, opened as blobs: what stores and Megatron files stand on."""

import dataclasses
import os
from pathlib import Path

from spiral_jax.data.blob import Blob, LocalBlob
from spiral_jax.errors import SpiralError

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
    if _is_remote(place):
        raise SpiralError(f"{field} is {str(place)!r}; allowed: a path, as nothing is written to URLs yet")
    return Path(_local(place)).expanduser().resolve()


def join(place: str | os.PathLike, *names: str) -> str:
    """A place below another one."""
    return "/".join([str(place).rstrip("/"), *names]) if is_url(place) else str(Path(place, *names))


@dataclasses.dataclass(frozen=True)
class Storage:
    """How files are opened, local and remote.

    Attributes:
      retry_seconds: How long a failing remote read is tried again before it is an error.
      cache_dir: Where remote tokens are kept for the next epoch; "" for nowhere.
      cache_gigabytes: Bound of that cache, in units of 1e9 bytes; 0 for none.
    """

    retry_seconds: float = 300.0
    cache_dir: str = ""
    cache_gigabytes: float = 0.0

    def open(self, place: str | os.PathLike) -> Blob:
        """Opens a file for reading by ranges.

        Raises:
          SpiralError: It does not exist or cannot be read, or a package for its kind of URL is missing.
        """
        if not _is_remote(place):
            return LocalBlob(_local(place))
        blob = self._open_remote(place)
        if not self.cache_dir or not self.cache_gigabytes:
            return blob
        from spiral_jax.data.remote.cache import cached

        return cached(blob, self.cache_dir, (blob.name, blob.size, blob.version), int(self.cache_gigabytes * 1e9))

    def read_file(self, place: str | os.PathLike) -> bytes:
        """Reads a small file whole, past the cache.

        Raises:
          SpiralError: It does not exist or cannot be read.
        """
        blob = self._open_remote(place) if _is_remote(place) else LocalBlob(_local(place))
        return bytes(blob.read(0, blob.size))

    def exists(self, place: str | os.PathLike) -> bool:
        """Whether there is a file (or, on this machine, a folder).

        Raises:
          SpiralError: The storage cannot be asked.
        """
        if not _is_remote(place):
            return Path(_local(place)).exists()
        from spiral_jax.data.remote.blob import exists

        return exists(str(place), self.retry_seconds)

    def _open_remote(self, place: str | os.PathLike) -> Blob:
        # Imported here: most runs have no use for it.
        from spiral_jax.data.remote.blob import RemoteBlob

        return RemoteBlob(str(place), self.retry_seconds)


def _is_remote(place: str | os.PathLike) -> bool:
    return is_url(place) and not str(place).startswith(_FILE)


def _local(place: str | os.PathLike) -> str:
    return str(place).removeprefix(_FILE)


LOCAL = Storage()
