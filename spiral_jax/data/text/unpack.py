"""Compressed files as streams of bytes."""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from spiral_jax.errors import SpiralError

_SUFFIXES = {".gz": "gz", ".zst": "zst", ".zstd": "zst"}
_BLOCK = 2**20
# A few bytes of zstd can stand for 128 KiB: what one block may swell to in memory is bounded by its size.
_ZSTD_BLOCK = 2**14
# What `zstd --long=31` needs, and the most that the format's own tool reads.
_ZSTD_WINDOW = 2**31


def compression_of(name: str) -> str:
    """How a file is compressed by its name: "gz", "zst" or ""."""
    return _SUFFIXES.get(Path(name).suffix.lower(), "")


def without_compression(name: str) -> str:
    """A file's name without the suffix of its compression."""
    return name[: -len(Path(name).suffix)] if compression_of(name) else name


def unpack(path: str, compression: str) -> Iterator[tuple[bytes, int]]:
    """Reads a file block by block, all members of a gzip and all frames of a zstd file.

    Args:
      path: The file.
      compression: "gz", "zst" or "".

    Yields:
      Unpacked bytes, never none, and how many bytes of the file they and those before them took.

    Raises:
      SpiralError: The file cannot be read, is cut off or damaged, or the package to unpack it is missing.
    """
    reader = {"": _plain, "gz": _gzip, "zst": _zstd}[compression]
    try:
        with open(path, "rb") as file:
            yield from reader(path, file)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise SpiralError(f"{path}: cut off or damaged ({_one_line(error)}); allowed: a complete gzip file") from error
    except OSError as error:
        raise SpiralError(f"{path}: cannot be read ({error.strerror or error})") from error


def _plain(path: str, file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    del path
    while block := file.read(_BLOCK):
        yield block, file.tell()


def _gzip(path: str, file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    del path
    with gzip.GzipFile(fileobj=file) as unpacked:
        while block := unpacked.read(_BLOCK):
            yield block, file.tell()


def _zstd(path: str, file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    try:
        import zstandard
    except ImportError as error:
        raise SpiralError(f"{path}: needs the package zstandard; pip install 'spiral_jax[zstd]'") from error
    # Not zstandard's stream_reader: it takes the end of a truncated file for the end of the text.
    frames = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
    frame = None
    try:
        while packed := file.read(_ZSTD_BLOCK):
            while packed:
                frame = frame or frames.decompressobj()
                if block := frame.decompress(packed):
                    yield block, file.tell()
                packed = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise SpiralError(f"{path}: damaged ({_one_line(error)}); allowed: a complete zstd file") from error
    if frame is not None:
        raise SpiralError(f"{path}: cut off in the middle of a frame; allowed: a complete zstd file")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
