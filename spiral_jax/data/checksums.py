"""Checksums of a data file: one of all of it, and one of each block, by which a part can be checked alone."""

import hashlib
import re
import zlib
from collections.abc import Sequence

from spiral_jax.data.blob import Blob
from spiral_jax.errors import SpiralError

BLOCK_BYTES = 2**20
# Checked when a file is opened: all of a small one, a few reads of one behind a URL.
_SAMPLED = 8
_DIGITS = 8  # of a CRC-32, in hexadecimal


class Checksums:
    """SHA-256 of content that comes bit by bit, and the CRC-32 of each of its blocks: any flipped bit changes both."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self._finished: list[int] = []
        self._crc = self._filled = 0  # of the block that is not full

    def update(self, content: bytes | memoryview) -> None:
        """Takes more content."""
        if not len(content):
            return
        whole = memoryview(content).cast("B")
        self._sha256.update(whole)
        at = 0
        while at < len(whole):
            part = whole[at : at + BLOCK_BYTES - self._filled]
            self._crc = zlib.crc32(part, self._crc)
            self._filled += len(part)
            at += len(part)
            if self._filled == BLOCK_BYTES:
                self._finished.append(self._crc)
                self._crc = self._filled = 0

    @property
    def sha256(self) -> str:
        """Of everything so far, in hexadecimal."""
        return self._sha256.hexdigest()

    @property
    def blocks(self) -> str:
        """CRC-32 of each block, eight hexadecimal digits each; the last block may be a short one."""
        crcs = [*self._finished, self._crc] if self._filled else self._finished
        return "".join(f"{crc:08x}" for crc in crcs)


def are_blocks(blocks: str, size: int) -> bool:
    """Whether this can be `Checksums.blocks` of a file of `size` bytes."""
    digits = -(-size // BLOCK_BYTES) * _DIGITS
    return len(blocks) == digits and re.fullmatch("[0-9a-f]*", blocks) is not None


def sampled(blocks: str, seed: str) -> list[int]:
    """Which blocks are checked when a file is opened: the first, the last, and some between that a seed chooses."""
    count = len(blocks) // _DIGITS
    if count <= _SAMPLED:
        return list(range(count))
    between = (int.from_bytes(hashlib.sha256(f"{seed} {n}".encode()).digest()[:8], "big") for n in range(_SAMPLED - 2))
    return sorted({0, count - 1, *(1 + number % (count - 2) for number in between)})


def check_blocks(blob: Blob, blocks: str, which: Sequence[int]) -> None:
    """Reads some blocks of a file and compares them with their checksums.

    Raises:
      SpiralError: naming the file and the bytes that are not what was written.
    """
    ranges = [(n * BLOCK_BYTES, min((n + 1) * BLOCK_BYTES, blob.size)) for n in which]
    for n, (start, stop), content in zip(which, ranges, blob.read_many(ranges), strict=True):
        if zlib.crc32(content) != int(blocks[n * _DIGITS : (n + 1) * _DIGITS], 16):
            raise SpiralError(f"{blob.name} is damaged (bytes {start} to {stop - 1} are not what was written)")
