"""Bytes read by ranges, on this machine or many joined as one; `remote.blob` has those behind URLs."""

import abc
import bisect
import concurrent.futures
import mmap
import os
from collections.abc import Iterator, Sequence

import numpy as np

from spiral_jax.errors import SpiralError

Range = tuple[int, int]
_BLOBS_AT_ONCE = 32  # of a JoinedBlobs


class Blob(abc.ABC):
    """Bytes that do not change, read by ranges from many threads.

    Attributes:
      name: what to call it in messages: its path or URL.
      size: number of bytes.
    """

    name: str
    size: int

    @abc.abstractmethod
    def read_many(self, ranges: Sequence[Range]) -> Sequence[bytes | memoryview]:
        """Returns bytes start to stop - 1 of each (start, stop); a remote blob has all of them in flight at once.

        Raises:
          SpiralError: it cannot be read.
        """

    def read(self, start: int, stop: int) -> bytes | memoryview:
        """Returns bytes start to stop - 1."""
        return self.read_many([(start, stop)])[0]

    def read_arrays(self, ranges: Sequence[Range], dtype: np.dtype) -> list[np.ndarray]:
        """Returns items start to stop - 1 of each range, [stop - start], of a blob that is items of one type.

        Raises:
          IndexError: not inside the blob.
          SpiralError: it cannot be read.
        """
        size = dtype.itemsize
        for start, stop in ranges:
            if not 0 <= start <= stop <= self.size // size:
                raise IndexError(f"items {start}:{stop} of {self.name}, which has {self.size // size}")
        # Python's integers, because NumPy's int32 would overflow beyond 2**31 bytes.
        found = self.read_many([(int(start) * size, int(stop) * size) for start, stop in ranges])
        return [np.frombuffer(content, dtype) for content in found]


class LocalBlob(Blob):
    """A memory-mapped file; SpiralError if it does not exist or cannot be read."""

    def __init__(self, path: str | os.PathLike):
        self.name = str(path)
        self._content = memoryview(b"")  # an empty file cannot be mapped
        try:
            with open(path, "rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                if self.size:
                    mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
                    # Windows come in random order; reading ahead, up to 8 MB for each of them, makes that 25 x slower.
                    mapped.madvise(mmap.MADV_RANDOM)
                    self._content = memoryview(mapped)
        except FileNotFoundError as error:
            raise SpiralError(f"{self.name} does not exist") from error
        except OSError as error:
            raise SpiralError(f"{self.name} cannot be read ({error.strerror})") from error

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

    def place(self, byte: int) -> tuple[Blob, int]:
        """Returns the blob that has a byte, and where it is in it."""
        part = bisect.bisect_right(self._starts, byte) - 1
        return self._blobs[part], byte - self._starts[part]

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

    def _read_blobs(self, wanted: dict[int, list[Range]]) -> list[Sequence[bytes | memoryview]]:
        def read(index: int) -> Sequence[bytes | memoryview]:
            return self._blobs[index].read_many(wanted[index])

        if len(wanted) == 1 or all(isinstance(self._blobs[index], LocalBlob) for index in wanted):
            return [read(index) for index in wanted]
        # All in flight at once, across the blobs as well.
        with concurrent.futures.ThreadPoolExecutor(min(len(wanted), _BLOBS_AT_ONCE)) as pool:
            return list(pool.map(read, wanted))


def spread(total: int, pieces: int, length: int) -> list[Range]:
    """Returns ranges of `length` evenly spaced over `total`, its ends included; one of all if that is less."""
    if total <= pieces * length:
        return [(0, total)]
    starts = ((total - length) * piece // (pieces - 1) for piece in range(pieces))
    return [(start, start + length) for start in starts]


def chunks(total: int, length: int) -> Iterator[Range]:
    """Yields ranges of at most `length` that cover `total`."""
    for start in range(0, total, length):
        yield start, min(start + length, total)
