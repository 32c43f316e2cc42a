"""Cuts the input into pieces of work, whose number and extent depend on the input alone."""

import dataclasses
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from spiral_jax.corpus.sources import Source, character_cut, one_line, read_range, unpack
from spiral_jax.data.config import DataConfig
from spiral_jax.errors import SpiralError

# A piece is what is lost when a worker is killed, and a file of its own for a while; a thousand of them are enough
# to keep many workers busy to the end.
_SMALLEST_PIECE, _LARGEST_PIECE = 2**20, 2**26
_PIECES = 1024
# How far ahead of the wanted place a good one is looked for.
LOOKAHEAD = 2**16

# White space beyond ASCII, in UTF-8. Bytes are searched, not characters, because a text may be too long to decode.
_WIDE_SPACE_2 = rb"\xc2[\x85\xa0]"
_WIDE_SPACE_3 = rb"\xe1\x9a\x80|\xe2\x80[\x80-\x8a\xa8\xa9\xaf]|\xe2\x81\x9f|\xe3\x80\x80"
_AFTER_VISIBLE = rb"(?<=\S)(?<!" + _WIDE_SPACE_2 + rb")(?<!" + _WIDE_SPACE_3 + rb")"
_BEFORE_VISIBLE = rb"(?=\S)(?!" + _WIDE_SPACE_2 + rb"|" + _WIDE_SPACE_3 + rb")"
# Byte-level BPE splits a text before it merges: a lone newline belongs to what precedes it or stands alone, a lone
# space belongs to what follows it or stands alone. Runs of white space are split by what is on both sides of them.
_LONE_NEWLINE = re.compile(_AFTER_VISIBLE + rb"\n" + _BEFORE_VISIBLE)
_LONE_SPACE = re.compile(_AFTER_VISIBLE + rb" " + _BEFORE_VISIBLE)
# What has to be seen on both sides of a cut: a newline and the longest white space beyond ASCII.
MARGIN = 4


@dataclasses.dataclass(frozen=True)
class Piece:
    """What a worker reads in one go.

    Attributes:
      sources: a stretch of a large file, or several small files.
      input_bytes: how much of the input it is.
      content: the unpacked bytes of a stretch of a compressed file; of other pieces empty, they are read by the worker.
      first_line: line number at the beginning of `content`, counted from 1.
      ends: whether a document of text ends here, rather than going on in the next piece.
      name: unique, and in order of the pieces.
    """

    sources: tuple[Source, ...]
    input_bytes: int
    content: bytes = b""
    first_line: int = 1
    ends: bool = True
    name: str = ""


def cut_into_pieces(
    sources: Sequence[Source], text_field: str, longest_record: int = DataConfig.longest_record
) -> Iterator[Piece]:
    """Cuts sources into pieces, one after the other as they are asked for.

    Small files share a piece. Large ones are cut: plain text and lines by bytes, parquet by row groups, compressed
    ones by unpacking them here, because they can only be unpacked from their beginning.

    Raises:
      SpiralError: a file cannot be read, is damaged, has a line longer than the longest record, or is a parquet file
        without the column of the text.
    """
    size = min(max(sum(source.input_bytes for source in sources) // _PIECES, _SMALLEST_PIECE), _LARGEST_PIECE)
    for number, piece in enumerate(_cut(sources, size, text_field, longest_record)):
        yield dataclasses.replace(piece, name=f"{number:08d}")


def _cut(sources: Sequence[Source], size: int, text_field: str, longest_record: int) -> Iterator[Piece]:
    small: list[Source] = []
    small_bytes = 0
    for source in sources:
        if not source.input_bytes:
            continue
        is_small = source.size <= size and not source.is_stretch
        if small and (not is_small or small_bytes + source.size > size):
            yield Piece(tuple(small), small_bytes)
            small, small_bytes = [], 0
        if is_small:
            small.append(source)
            small_bytes += source.size
        elif source.format == "parquet":
            yield from _cut_parquet(source, size, text_field)
        elif source.compression:
            yield from cut_packed(source, size, longest_record)
        else:
            yield from _cut_plain(source, size, longest_record)
    if small:
        yield Piece(tuple(small), small_bytes)


def _cut_plain(source: Source, size: int, longest_record: int) -> Iterator[Piece]:
    begin = source.begin
    while begin < source.stop:
        end = source.stop if source.stop - begin <= size else _plain_cut(source, begin + size, longest_record)
        yield Piece((dataclasses.replace(source, begin=begin, end=end),), end - begin, ends=end == source.stop)
        begin = end


def _plain_cut(source: Source, position: int, longest_record: int) -> int:
    if source.format == "text":
        begin, end = max(position - MARGIN, 0), min(position + LOOKAHEAD + MARGIN, source.stop)
        return min(begin + text_cut(read_range(source.path, begin, end), position - begin), source.stop)
    position -= 1  # a line may end right before the position
    wanted = position
    while position < source.stop:
        if position - wanted > longest_record:
            raise too_long(source, f"the line at byte {wanted}", longest_record)
        stop = min(position + LOOKAHEAD, source.stop)
        newline = read_range(source.path, position, stop).find(b"\n")
        if newline >= 0:
            return position + newline + 1
        position = stop
    return source.stop


def too_long(source: Source, place: str, longest_record: int) -> SpiralError:
    """What to raise about a record of a source."""
    name = os.fsencode(source.path).decode("utf-8", "backslashreplace")
    return SpiralError(
        f"{name}: {place} is longer than {longest_record} bytes; allowed: so many, or more with data.longest_record"
    )


def cut_packed(source: Source, size: int, longest_record: int) -> Iterator[Piece]:
    """Unpacks a file into pieces with content, of about `size` bytes or as long as its longest line.

    Raises:
      SpiralError: a line is longer than `longest_record` bytes.
    """
    content, begin, line = bytearray(), source.begin, 1
    enough = size + LOOKAHEAD + MARGIN
    unpacked = position = done = 0

    def take(at: int, position: int, ends: bool) -> Piece:
        nonlocal begin, line, done
        stretch = dataclasses.replace(source, begin=begin, end=begin + at)
        now = min(position, source.input_bytes)
        with memoryview(content)[:at] as beginning:
            piece = Piece((stretch,), now - done, bytes(beginning), line, ends)
        del content[:at]
        begin, done = begin + at, now
        line += piece.content.count(b"\n") if source.format == "jsonl" else 0
        return piece

    for block, position in unpack(source.path, source.compression):
        stop = len(block) if source.end is None else max(source.end - unpacked, 0)
        content += block[max(source.begin - unpacked, 0) : stop]
        unpacked += len(block)
        while len(content) >= enough:
            at = text_cut(content, size) if source.format == "text" else content.find(b"\n", size - 1) + 1
            if at in (0, len(content)):  # perhaps a longer line: look again when there is twice as much
                if not at and len(content) - size > longest_record:
                    raise too_long(source, f"the line at byte {begin + size}", longest_record)
                enough = min(2 * len(content), size + max(longest_record, LOOKAHEAD + MARGIN) + 1)
                break
            yield take(at, position, ends=False)
            enough = size + LOOKAHEAD + MARGIN
    if content:
        yield take(len(content), position, ends=True)


def _cut_parquet(source: Source, size: int, text_field: str) -> Iterator[Piece]:
    with open_parquet(source.path, text_field) as file:
        sizes = [file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups)]
    begin = unpacked = done = 0
    for group, group_bytes in enumerate(sizes, 1):
        unpacked += group_bytes
        if unpacked >= size or group == len(sizes):
            share = source.input_bytes * group // len(sizes)
            yield Piece((dataclasses.replace(source, begin=begin, end=group),), share - done)
            begin, unpacked, done = group, 0, share


def open_parquet(path: str, text_field: str) -> Any:
    """Opens a file with a column of text, as a `pyarrow.parquet.ParquetFile`. Needs the extra `parquet`.

    Raises:
      SpiralError: no parquet file, no such column, not a column of strings, or pyarrow is missing.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise SpiralError(f"{path} needs the package pyarrow; allowed: pip install 'spiral_jax[parquet]'") from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise SpiralError(f"{path} is not a parquet file ({one_line(error)}); allowed: parquet") from error
    schema = file.schema_arrow
    if text_field not in schema.names:
        raise SpiralError(f"data.text_field is {text_field!r}; allowed: columns of {path}: {listing(schema.names)}")
    kind, types = schema.field(text_field).type, pyarrow.types
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if not any(is_text(kind) for is_text in (types.is_string, types.is_large_string, types.is_string_view)):
        raise SpiralError(f"{path}: column {text_field!r} is of type {kind}; allowed: string")
    return file


def listing(names: Sequence[Any]) -> str:
    """Names in a message, not too many."""
    found = sorted(" ".join(str(name).encode("utf-8", "backslashreplace").decode("utf-8").split()) for name in names)
    return ", ".join(found[:10]) + (", ..." if len(found) > 10 else "") or "none"


def text_cut(content: bytes | bytearray, position: int) -> int:
    """Finds where text may be cut, at or soon after a position, so that its parts have the tokens of the whole.

    In this order: after a newline between two visible characters, before a space between two visible characters (in
    a text with CRLF line ends there are no such newlines), after any newline, between two characters.

    Args:
      content: UTF-8 bytes: those around the position, from MARGIN before it to LOOKAHEAD + MARGIN after it, if the
        text reaches that far.
      position: where the cut is wanted, an index into `content`.

    Returns:
      Where to cut, an index into `content`.
    """
    end = min(position + LOOKAHEAD, len(content))
    found = _LONE_NEWLINE.search(content, max(position - 1, 0), end + MARGIN)
    if found and found.end() <= end:
        return found.end()
    found = _LONE_SPACE.search(content, position, end + MARGIN)
    if found and found.end() <= end:
        return found.start()
    if 0 <= (newline := content.find(b"\n", position, end)) < len(content) - 1:
        return newline + 1
    return character_cut(content, position)
