"""Bytes read by ranges, on this machine or many joined as one; `remote.blob` has those behind URLs."""

import abc
import bisect
import concurrent.futures
import mmap
import os
from collections.abc import Sequence

from spiral_jax.errors import SpiralError

Range = tuple[int, int]
_BLOBS_AT_ONCE = 32  # of a JoinedBlobs


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
