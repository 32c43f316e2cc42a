"""Input files: which ones, in which order, how their bytes are read, and which of them are held out.

The order depends on names alone. Links to folders are followed, wherever they are met, and a folder that is reached in
several ways counts once: links that lead in circles end.
"""

import contextlib
import dataclasses
import fnmatch
import glob
import gzip
import hashlib
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from spiral_jax.data.plain_text import BYTE_ORDER_MARK, decoded
from spiral_jax.errors import SpiralError

_ALLOWED = "allowed: files, folders, glob patterns"
_COMPRESSIONS = {".gz": "gz", ".zst": "zst", ".zstd": "zst"}
_BLOCK = 2**20
# Four bytes of zstd can stand for 128 KiB: what one block may swell to in memory, 64 MiB, is bounded by its size.
_ZSTD_BLOCK = 2**11
# What is scored is in memory as a whole; a store is not.
_LONGEST_TEXT = 2**28
# What `zstd --long=31` needs, and the most that the format's own tool reads.
_ZSTD_WINDOW = 2**31


@dataclasses.dataclass(frozen=True)
class Source:
    """An input file or a stretch of one, and where its documents go.

    Attributes:
      name: path relative to the root it was found under, with forward slashes: the same on every machine.
      path: where the file is on this machine.
      size: bytes of the file when it was found.
      modified_ns: when it was last modified.
      format: "text", "jsonl" or "parquet".
      compression: "gz", "zst" or "".
      split: "train", "validation", or "hash": each record by its text.
      begin: where the stretch begins: a byte of the unpacked text, or a row group of parquet.
      end: where it ends; None for the end of the file.
    """

    name: str
    path: str
    size: int
    modified_ns: int
    format: str
    compression: str
    split: str = "train"
    begin: int = 0
    end: int | None = None

    @property
    def is_stretch(self) -> bool:
        """Whether it is not the whole file."""
        return self.begin > 0 or self.end is not None

    @property
    def stop(self) -> int:
        """Byte after the last one, of a file that is not compressed."""
        return self.size if self.end is None else self.end

    @property
    def input_bytes(self) -> int:
        """Bytes of the file that have to be read for it; for a stretch of a compressed file, a guess."""
        if self.compression:
            return (self.size + 1) // 2 if self.is_stretch else self.size
        return self.stop - self.begin


def find_sources(
    paths: Sequence[str], exclude: Sequence[str] = (), *, format: str = "auto", field: str = "data.paths"
) -> list[Source]:
    """Lists the files that `paths` name, as whole files to train on.

    The order depends on the order of `paths` and the names below each of them, never on the file system or the
    machine. A file reached twice (overlapping patterns, links) is listed once, an empty file not at all.

    Args:
      paths: files, folders or glob patterns.
      exclude: `fnmatch` patterns against the absolute path.
      format: `data.format`.
      field: config field to name in errors.

    Raises:
      SpiralError: no paths, one that does not exist, a pattern or folder without files, or all is excluded or empty.
    """
    if not paths:
        raise SpiralError(f"{field} is empty; {_ALLOWED} (or set data.stores)")
    chosen: dict[str, Source] = {}
    found = [place for given in paths for place in find_files(given, field)]
    for root, file in found:
        if not any(fnmatch.fnmatchcase(file.as_posix(), pattern) for pattern in exclude):
            status, name = file.stat(), file.relative_to(root).as_posix()
            source = Source(name, str(file), status.st_size, status.st_mtime_ns, *_format_of(file, format))
            chosen.setdefault(os.path.realpath(file), source)
    if not chosen:
        raise SpiralError(
            f"{field}: data.exclude leaves out all {len(found)} files; allowed: paths that leave at least one text file"
        )
    with_text = [source for source in chosen.values() if source.size]
    if not with_text:
        raise SpiralError(f"{field}: no text in {', '.join(paths)}; allowed: files that are not all empty")
    return with_text


def _format_of(file: Path, configured: str) -> tuple[str, str]:
    """What a file holds and how it is compressed, by its name, `data.format` and, of `.json`, its first line."""
    compression = _COMPRESSIONS.get(file.suffix.lower(), "")
    suffix = (file.with_suffix("") if compression else file).suffix.lower()
    if configured == "auto":
        is_lines = suffix in (".jsonl", ".ndjson") or (suffix == ".json" and _begins_with_object(file, compression))
        configured = "jsonl" if is_lines else "parquet" if suffix == ".parquet" and not compression else "text"
    return configured, "" if configured == "parquet" else compression


def _begins_with_object(file: Path, compression: str) -> bool:
    """Whether the first line is an object of JSON on its own: some corpora call JSON lines `.json`."""
    begun, last = False, b""
    for number, (block, _) in enumerate(unpack(str(file), compression)):
        if not begun:
            block = (block if number else block.removeprefix(BYTE_ORDER_MARK)).lstrip()
            begun = bool(block)
            if begun and not block.startswith(b"{"):
                return False
        line, end, _ = block.partition(b"\n")
        last = line.rstrip()[-1:] or last
        if end:
            break
    return last == b"}"


def hold_out(sources: Sequence[Source], fraction: float) -> list[Source]:
    """Holds out a share of the documents: text files by a hash of their names, so that adding others moves none.

    Records are chosen one by one when their text is known. A few text files may all fall on one side, and a single
    one always does. Then the end of every file is held out instead, because a user's one book should have a
    validation loss, too. What is trained on comes first, in the order given, then what is validated on.
    """
    if not fraction:
        return list(sources)

    def split_of(source: Source) -> str:
        if source.format != "text":
            return "hash"
        return "validation" if uniform_hash(source.name.encode("utf-8", "surrogateescape")) < fraction else "train"

    split = [dataclasses.replace(source, split=split_of(source)) for source in sources]
    if {source.split for source in split} in ({"train"}, {"validation"}):
        split = []
        for source in sources:
            cut = _tail_cut(source, fraction)
            split.append(dataclasses.replace(source, end=cut))
            split.append(dataclasses.replace(source, begin=cut, split="validation"))
    return sorted(split, key=lambda source: source.split == "validation")


def uniform_hash(content: bytes) -> float:
    """A number in [0, 1) that depends on nothing but the content."""
    return int.from_bytes(hashlib.sha256(content).digest()[:4], "big") / 2**32


def _tail_cut(source: Source, fraction: float) -> int:
    """Where the held-out end of a text begins: after the end of a line if there is one, but not after the last."""
    size = sum(map(len, _blocks(source))) if source.compression else source.size
    position = int(size * (1.0 - fraction))
    begin, following = 0, b""
    for block in _blocks(source):
        first = max(position - begin, 0)
        newline = block.find(b"\n", first, max(size - 1 - begin, 0))
        if newline >= 0:
            return begin + newline + 1
        following += block[first : first + 4 - len(following)]
        begin += len(block)
    return position + character_cut(following, 0)


def character_cut(content: bytes | bytearray, position: int) -> int:
    """Moves a position forward to the next boundary between characters."""
    for _ in range(3):
        if position < len(content) and content[position] & 0xC0 == 0x80:
            position += 1
    return position


def _blocks(source: Source) -> Iterator[bytes]:
    return (block for block, _ in unpack(source.path, source.compression))


def read_text(source: Source) -> str:
    """Reads a text file, unpacked, with its line ends as they are, and without a byte order mark.

    Encoded as UTF-8 it is the bytes of the source that follow the mark.

    Raises:
      SpiralError: the file is not UTF-8, or cannot be read.
    """
    blocks, size = [], 0
    for block in _blocks(source):
        size += len(block)
        if size > _LONGEST_TEXT:
            raise SpiralError(
                f"{source.path} has more than {_LONGEST_TEXT} bytes; allowed: a text of so many, or a token store of "
                "more (python -m spiral_jax.prepare)"
            )
        blocks.append(block)
    content = b"".join(blocks)
    try:
        content.decode("utf-8")  # all of it, whichever stretch is asked for
        stretch = content[source.begin : source.end]
        return decoded(stretch) if source.begin == 0 else stretch.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SpiralError(
            f"{source.path}: byte {error.start} is not UTF-8 ({error.reason}); allowed: UTF-8 text"
        ) from error


def read_range(path: str, begin: int, end: int) -> bytes:
    """Bytes begin to end - 1 of a file as it is; SpiralError if it cannot be read or is shorter."""
    with _reading(path), open(path, "rb") as file:
        file.seek(begin)
        content = file.read(end - begin)
    if len(content) < end - begin:
        raise SpiralError(f"{path} has become shorter while it was read; allowed: files that do not change")
    return content


def check_unchanged(source: Source) -> None:
    """Raises SpiralError unless the file is still what it was when it was found."""
    with _reading(source.path):
        status = os.stat(source.path)
    if (status.st_size, status.st_mtime_ns) != (source.size, source.modified_ns):
        raise SpiralError(
            f"{source.path} has changed while it was read; allowed: files that do not change (run it again)"
        )


def unpack(path: str, compression: str) -> Iterator[tuple[bytes, int]]:
    """Reads a file block by block, all members of a gzip and all frames of a zstd file.

    Yields:
      Unpacked bytes, at least one, and how many bytes of the file they and those before them took.

    Raises:
      SpiralError: the file cannot be read, is cut off or damaged, or the package to unpack it is missing.
    """
    with _reading(path), open(path, "rb") as file:
        if compression == "zst":
            yield from _unpack_zstd(path, file)
            return
        unpacked = gzip.GzipFile(fileobj=file) if compression else file
        while block := unpacked.read(_BLOCK):
            yield block, file.tell()


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
    try:
        yield
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise SpiralError(f"{path} is cut off or damaged ({one_line(error)}); allowed: a complete gzip file") from error
    except OSError as error:
        raise SpiralError(f"{path} cannot be read ({error.strerror or error})") from error


def _unpack_zstd(path: str, file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    try:
        import zstandard
    except ImportError as error:
        raise SpiralError(f"{path} needs the package zstandard; allowed: pip install 'spiral_jax[zstd]'") from error
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
        raise SpiralError(f"{path} is damaged ({one_line(error)}); allowed: a complete zstd file") from error
    if frame is not None:
        raise SpiralError(f"{path} is cut off in the middle of a frame; allowed: a complete zstd file")


def one_line(error: Exception) -> str:
    """What a library says, without its line ends."""
    return " ".join(str(error).split())


def find_files(given: str, field: str) -> list[tuple[Path, Path]]:
    """The files that a path names, in order of their names, each with the folder that its name is relative to.

    Hidden files, hidden folders and `__pycache__` are passed over in folders and patterns; a hidden file named outright
    is taken.

    Args:
      given: a file, a folder or a glob pattern.
      field: what to call it in errors.

    Raises:
      SpiralError: there is no such thing, it holds no file, or a folder cannot be read.
    """
    path = Path(os.path.abspath(os.path.expanduser(given)))
    root, what = path, "a folder without files"
    if path.is_dir():
        found = [file for folder, names in folders_below(path, field) for file in _regular(folder, names)]
    elif path.is_file():
        root, found = path.parent, [path]
    elif path.exists():
        raise SpiralError(f"{field} is {given!r}, neither a file nor a folder; {_ALLOWED}")
    elif glob.has_magic(given):
        root, what = path, "a pattern that matches no file"
        while glob.has_magic(str(root)):
            root = root.parent
        matches = dict.fromkeys(_matching(path, field))
        found = [match for match in matches if match.is_file() and "__pycache__" not in match.relative_to(root).parts]
    else:
        raise SpiralError(f"{field} is {given!r}, which does not exist; {_ALLOWED}")
    if not found:
        raise SpiralError(f"{field} is {given!r}, {what}; allowed: paths with at least one text file")
    return [(root, file) for file in sorted(found, key=lambda file: file.relative_to(root).as_posix())]


def folders_below(root: Path, field: str) -> Iterator[tuple[Path, list[str]]]:
    """A folder and all those below it, each once, with the names of what is in it but folders.

    Folders that are reached without links come first, so that a link to them does not change what they are called.

    Raises:
      SpiralError: a folder cannot be read.
    """

    def stop(error: OSError) -> None:  # os.walk would pass over the folder without a word
        raise SpiralError(f"{field}: {error.filename} cannot be read ({error.strerror})") from error

    seen: set[tuple[int, int]] = set()
    roots = [root]
    while roots:
        links: list[Path] = []
        for start in sorted(roots):
            for folder, subfolders, names in os.walk(start, onerror=stop):
                status = os.stat(folder)
                if (status.st_dev, status.st_ino) in seen:
                    subfolders.clear()
                    continue
                seen.add((status.st_dev, status.st_ino))
                subfolders[:] = [name for name in subfolders if not _is_passed_over(name)]
                links += [Path(folder, name) for name in subfolders if os.path.islink(os.path.join(folder, name))]
                yield Path(folder), names
        roots = links


def _matching(pattern: Path, field: str) -> Iterator[Path]:
    """As `glob.glob` with `recursive=True`, but that `**` goes through links as `folders_below` does."""
    parts = pattern.parts
    head = parts[: parts.index("**")] if "**" in parts else parts
    tail = parts[len(head) + 1 :]
    for match in map(Path, glob.glob(str(Path(*head)))):
        if len(head) == len(parts):
            yield match
        elif match.is_dir():
            for folder, names in folders_below(match, field):
                if tail:
                    yield from _matching(Path(glob.escape(str(folder)), *tail), field)
                else:
                    yield from _regular(folder, names)


def _regular(folder: Path, names: list[str]) -> list[Path]:
    """The files among what is in a folder: no hidden ones, no sockets, pipes or dangling links."""
    files = (Path(folder, name) for name in names if not _is_passed_over(name))
    return [file for file in files if file.is_file()]


def _is_passed_over(name: str) -> bool:
    return name.startswith(".") or name == "__pycache__"
