"""A bounded copy on this machine of what was read from remote blobs.

Of each blob there are two sparse files: `NAME.data`, as long as the blob, and `NAME.index` with a little-endian uint32
per block of 4 KiB: the CRC-32 of the block's content, 0 where there is none. Nothing is ever synced: after a SIGKILL or
a power cut a block is either what its checksum says, or fetched again.
"""

import hashlib
import os
import zlib
from collections.abc import Iterator, Sequence

import numpy as np

from spiral_jax.data.blob import Blob, Range
from spiral_jax.data.remote.cache_folder import CacheFolder

_BLOCK = 4096  # bytes; the smallest unit that a file system keeps
_CRC = np.dtype("<u4")


def cached(blob: Blob, cache_dir: str | os.PathLike, key: Sequence[object], max_bytes: int) -> Blob:
    """Puts the cache in front of a blob; returns the blob itself where the cache cannot be used (stderr says so once).

    Args:
      blob: where the bytes come from.
      cache_dir: the cache's folder; made if it is not there.
      key: what names this version of this blob; the first item names the blob.
      max_bytes: bound of all the folder's blobs together.
    """
    folder = CacheFolder.open(os.path.abspath(cache_dir), max_bytes)
    if folder is None:
        return blob
    try:
        return CachedBlob(blob, folder, key)
    except OSError as error:
        folder.stop(error)
        return blob


class CachedBlob(Blob):
    """A blob that keeps what is read of it, until the folder is full; from then on the folder stays as it is.

    Nothing is evicted to make room for newer blocks: with a global shuffle each window comes once per epoch, so the
    blocks read last are those that are needed last. Evicting the oldest would make each later epoch miss everything;
    keeping any fixed part of the blob makes it hit just that part.
    """

    def __init__(self, blob: Blob, folder: CacheFolder, key: Sequence[object]):
        """Use `cached`."""
        self.name = blob.name
        self.size = blob.size
        self._blob = blob
        self._folder = folder
        blocks = -(-blob.size // _BLOCK)
        self._data, self._index = folder.add(_digest(key[:1]), _digest(key), blob.size, blocks * _CRC.itemsize)

    def read_many(self, ranges: Sequence[Range]) -> list[bytes | memoryview]:
        blocks_of = [range(start // _BLOCK, -(-stop // _BLOCK)) if start < stop else range(0) for start, stop in ranges]
        found: dict[int, memoryview] = {}
        fetched: dict[int, bytes | memoryview] = {}
        for blocks in blocks_of:
            found.update(self._kept(blocks))
        if self._folder.is_full:
            # Whole blocks are of no use then; a window is fetched as it is.
            lacking = [n for n, blocks in enumerate(blocks_of) if not all(block in found for block in blocks)]
            fetched = dict(zip(lacking, self._blob.read_many([ranges[n] for n in lacking]), strict=True))
        else:
            runs = _runs(sorted({block for blocks in blocks_of for block in blocks} - found.keys()))
            contents = self._blob.read_many([(first * _BLOCK, min(end * _BLOCK, self.size)) for first, end in runs])
            for (first, end), content in zip(runs, contents, strict=True):
                new = dict(zip(range(first, end), _split(content), strict=True))
                found.update(new)
                self._keep(first, new)
        for n, (start, stop) in enumerate(ranges):
            if n not in fetched:
                content, offset = b"".join(found[block] for block in blocks_of[n]), start % _BLOCK
                fetched[n] = memoryview(content)[offset : offset + stop - start]
        return [fetched[n] for n in range(len(ranges))]

    def _kept(self, blocks: range) -> Iterator[tuple[int, memoryview]]:
        """Those of some neighbouring blocks that are here and undamaged."""
        try:
            crcs = self._crcs(blocks)
            if not crcs.any():
                return
            content = os.pread(self._data.fileno(), len(blocks) * _BLOCK, blocks.start * _BLOCK)
        except OSError as error:  # a failing disk
            self._folder.stop(error)
            return
        for block, part, crc in zip(blocks, _split(content), crcs.tolist(), strict=False):
            if crc and _crc(part) == crc:
                yield block, part

    def _keep(self, first: int, blocks: dict[int, memoryview]) -> None:
        """Adds a run of blocks, as far as there is room."""
        with self._folder.lock:
            try:
                # Blocks that are damaged, or that another thread has just added, have their room already.
                new = np.flatnonzero(self._crcs(range(first, first + len(blocks))) == 0)
                room = self._folder.take(len(new) * _BLOCK) // _BLOCK
                end = first + (int(new[room]) if room < len(new) else len(blocks))
                if end == first:
                    return
                kept = [blocks[block] for block in range(first, end)]
                # A disk that becomes full writes a part; the checksum tells, and the next write fails.
                os.pwrite(self._data.fileno(), b"".join(kept), first * _BLOCK)
                # The checksum last: a reader that finds it finds the block.
                crcs = np.array([_crc(part) for part in kept], _CRC)
                os.pwrite(self._index.fileno(), crcs.tobytes(), first * _CRC.itemsize)
            except OSError as error:  # usually a full disk
                self._folder.stop(error)

    def _crcs(self, blocks: range) -> np.ndarray:
        content = os.pread(self._index.fileno(), len(blocks) * _CRC.itemsize, blocks.start * _CRC.itemsize)
        return np.frombuffer(content, _CRC)


def _digest(key: Sequence[object]) -> str:
    return hashlib.sha256(repr(tuple(key)).encode()).hexdigest()[:16]


def _crc(content: bytes | memoryview) -> int:
    return zlib.crc32(content) or 1  # 0 says that there is no block


def _split(content: bytes | memoryview) -> list[memoryview]:
    view = memoryview(content)
    return [view[at : at + _BLOCK] for at in range(0, len(view), _BLOCK)]


def _runs(blocks: Sequence[int]) -> list[Range]:
    """Rising numbers as (first, end) of those without a gap."""
    runs: list[Range] = []
    for block in blocks:
        if runs and runs[-1][1] == block:
            runs[-1] = (runs[-1][0], block + 1)
        else:
            runs.append((block, block + 1))
    return runs
