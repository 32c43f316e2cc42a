"""Files by path or by fsspec URL, read by byte ranges: what stores and Megatron files stand on."""

import abc
import bisect
import concurrent.futures
import dataclasses
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from spiral_jax.errors import SpiralError

if TYPE_CHECKING:
    from spiral_jax.data.remote.blob import RemoteBlob

Range = tuple[int, int]
_BLOBS_AT_ONCE = 32  # of a JoinedBlobs
_FILE = "file://"  # needs no fsspec: what follows is a path of this machine


class Blob(abc.ABC):
    """Bytes that do not change, read by ranges from many threads.

    Attributes:
      name: What to call it in messages: its path or URL.
      size: Number of bytes.
    """

    name: str
    size: int

    @abc.abstractmethod
    def read_many(self, ranges: Sequence[Range]) -> list[bytes | memoryview]:
        """Returns bytes start to stop - 1 of each (start, stop); a remote blob has all of them in flight at once.

        Raises:
          SpiralError: It cannot be read.
        """

    def read(self, start: int, stop: int) -> bytes | memoryview:
        """Returns bytes start to stop - 1."""
        return self.read_many([(start, stop)])[0]


class LocalBlob(Blob):
    """A memory-mapped file."""

    def __init__(self, path: str | os.PathLike):
        """Maps the file.

        Raises:
          SpiralError: It does not exist or cannot be read.
        """
        self.name = str(path)
        try:
            with open(path, "rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                # An empty file cannot be mapped.
                mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) if self.size else b""
                if self.size and hasattr(mmap, "MADV_RANDOM"):
                    # Windows come in random order; reading ahead, up to 8 MB for each of them, makes that 25 x slower.
                    mapped.madvise(mmap.MADV_RANDOM)
        except FileNotFoundError as error:
            raise SpiralError(f"{self.name}: does not exist") from error
        except OSError as error:
            raise SpiralError(f"{self.name}: cannot be read ({error.strerror})") from error
        self._content = memoryview(mapped)

    def read_many(self, ranges: Sequence[Range]) -> list[memoryview]:
        return [self._content[start:stop] for start, stop in ranges]


class JoinedBlobs(Blob):
    """Several blobs as one, end to end; a range may cross from one into the next."""

    def __init__(self, name: str, blobs: Sequence[Blob]):
        self.name = name
        self._blobs = tuple(blobs)
        self._starts = [0]
        for blob in self._blobs:
            self._starts.append(self._starts[-1] + blob.size)
        self.size = self._starts.pop()

    def read_many(self, ranges: Sequence[Range]) -> list[bytes | memoryview]:
        wanted: dict[int, list[Range]] = {}
        pieces: list[list[tuple[int, int]]] = []  # of each range: (blob, its n-th range there)
        for start, stop in ranges:
            pieces.append([])
            index = max(bisect.bisect_right(self._starts, start) - 1, 0)
            while start < stop:
                begin, blob = self._starts[index], self._blobs[index]
                end = min(stop, begin + blob.size)
                if start < end:
                    there = wanted.setdefault(index, [])
                    pieces[-1].append((index, len(there)))
                    there.append((start - begin, end - begin))
                    start = end
                index += 1
        found = dict(zip(wanted, self._read_blobs(wanted), strict=True))
        parts = [[found[index][n] for index, n in places] for places in pieces]
        return [several[0] if len(several) == 1 else b"".join(several) for several in parts]

    def _read_blobs(self, wanted: dict[int, list[Range]]) -> list[list[bytes | memoryview]]:
        def read(index: int) -> list[bytes | memoryview]:
            return self._blobs[index].read_many(wanted[index])

        if len(wanted) == 1 or all(isinstance(self._blobs[index], LocalBlob) for index in wanted):
            return [read(index) for index in wanted]
        # All in flight at once, across the blobs as well.
        with concurrent.futures.ThreadPoolExecutor(min(len(wanted), _BLOBS_AT_ONCE)) as pool:
            return list(pool.map(read, wanted))


def is_url(place: str | os.PathLike) -> bool:
    """Whether a place is an fsspec URL rather than a path on this machine."""
    return "://" in str(place)


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

    def _open_remote(self, place: str | os.PathLike) -> "RemoteBlob":
        # Imported here: it stands on this module, and most runs have no use for it.
        from spiral_jax.data.remote.blob import RemoteBlob

        return RemoteBlob(str(place), self.retry_seconds)


def _is_remote(place: str | os.PathLike) -> bool:
    return is_url(place) and not str(place).startswith(_FILE)


def _local(place: str | os.PathLike) -> str:
    return str(place).removeprefix(_FILE)


LOCAL = Storage()
