"""Cuts the input into work units: pieces of work whose number and extent depend on the input alone."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Literal

from spiral_jax.data.text.chunks import read_range, stream_chunks
from spiral_jax.data.text.cuts import LOOKAHEAD, MARGIN, text_cut
from spiral_jax.data.text.files import TextDocument
from spiral_jax.data.text.parquet import open_parquet
from spiral_jax.data.text.records import format_of
from spiral_jax.data.text.spans import Format, Span
from spiral_jax.errors import SpiralError

# A unit is what is lost when a worker is killed, and a file of its own for a while; a thousand of them are enough
# to keep many workers busy to the end.
_SMALLEST_UNIT, _LARGEST_UNIT = 2**20, 2**26
_UNITS = 1024


@dataclasses.dataclass(frozen=True)
class Source:
    """An input file, or a part of a text file, and where its documents go.

    Attributes:
      document: The file.
      format: What is in it.
      compression: "gz", "zst" or "".
      split: "train", "validation", or "hash": each record by its text.
    """

    document: TextDocument
    format: Format
    compression: str
    split: Literal["train", "validation", "hash"]

    @classmethod
    def of(cls, document: TextDocument, configured_format: str, split: str) -> "Source":
        """A source, its format by the configuration and the file's name."""
        return cls(document, *format_of(document.name, configured_format), split)

    @property
    def path(self) -> str:
        """Where the file is."""
        return str(self.document.path)

    @property
    def is_part(self) -> bool:
        """Whether it is not the whole file."""
        return self.document.begin > 0 or self.document.end is not None

    @property
    def input_bytes(self) -> int:
        """Bytes of the file that have to be read for it; of a part of a compressed file, a guess."""
        if self.compression:
            return (self.document.size + 1) // 2 if self.is_part else self.document.size
        return max(self._end - self.document.begin, 0)

    @property
    def _end(self) -> int:
        return self.document.size if self.document.end is None else self.document.end

    def span(self, **changes) -> Span:
        """The whole of it, or with changes a stretch of it."""
        whole = {"begin": self.document.begin, "end": self.document.end if self.compression else self._end}
        return Span(self.path, self.format, self.compression, self.split, **(whole | changes))

    def check_unchanged(self) -> None:
        """Checks that the file is still what it was when it was found.

        Raises:
          SpiralError: It is not.
        """
        try:
            status = os.stat(self.path)
        except OSError as error:
            raise SpiralError(f"{self.path}: cannot be read ({error.strerror})") from error
        if (status.st_size, status.st_mtime_ns) != (self.document.size, self.document.modified_ns):
            raise SpiralError(
                f"{self.path}: has changed while it was read; allowed: files that do not change (run it again)"
            )


@dataclasses.dataclass(frozen=True)
class Unit:
    """What one worker does in one go.

    Attributes:
      name: Its name, unique; in order of the units.
      spans: What to read.
      input_bytes: How much of the input it is.
      content: The bytes of its one span, where they had to be unpacked before they could be cut.
      whole_file: The text file that this is a part of and that is left out as a whole if any part is no text, or "".
    """

    name: str
    spans: tuple[Span, ...]
    input_bytes: int
    content: bytes | None = None
    whole_file: str = ""


def unit_bytes(sources: Sequence[Source]) -> int:
    """The size of a unit, which depends on nothing but the size of the input."""
    total = sum(source.input_bytes for source in sources)
    return min(max(total // _UNITS, _SMALLEST_UNIT), _LARGEST_UNIT)


def cut_into_units(sources: Sequence[Source], text_field: str) -> Iterator[Unit]:
    """Cuts sources into units, one after the other as they are asked for.

    Small files share a unit. Large ones are cut: plain text and lines by bytes, parquet by row groups, compressed ones
    by unpacking them here, because they can only be unpacked from their beginning.

    Args:
      sources: The input.
      text_field: Column of text that a parquet file must have.

    Yields:
      Units in the order of the documents.

    Raises:
      SpiralError: A file cannot be read or is damaged.
    """
    size = unit_bytes(sources)
    group: list[tuple[int, Source]] = []
    group_bytes = 0
    for index, source in enumerate(sources):
        if not source.input_bytes:
            continue
        is_small = source.document.size <= size and not source.is_part
        if group and (not is_small or group_bytes + source.input_bytes > size):
            yield _grouped(group)
            group, group_bytes = [], 0
        if is_small:
            group.append((index, source))
            group_bytes += source.input_bytes
        else:
            yield from _cut_source(index, source, size, text_field)
    if group:
        yield _grouped(group)


def _grouped(group: Sequence[tuple[int, Source]]) -> Unit:
    spans = tuple(source.span() for _, source in group)
    return Unit(_name(group[0][0], 0), spans, sum(source.input_bytes for _, source in group))


def _name(source: int, part: int) -> str:
    return f"{source:07d}-{part:07d}"


def _cut_source(index: int, source: Source, size: int, text_field: str) -> Iterator[Unit]:
    if source.format == "parquet":
        spans = _parquet_spans(source, size, text_field)
    else:
        spans = _packed_spans(source, size) if source.compression else _plain_spans(source, size)
    whole_file = source.path if source.format == "text" else ""
    for part, (span, input_bytes, content) in enumerate(spans):
        yield Unit(_name(index, part), (span,), input_bytes, content, whole_file)


def _plain_spans(source: Source, size: int) -> Iterator[tuple[Span, int, None]]:
    whole = source.span()
    begin = whole.begin
    while begin < whole.end:
        end = whole.end
        if end - begin > size:
            cut = _plain_text_cut if source.format == "text" else _plain_line_cut
            end = min(cut(source.path, begin + size, whole.end), end)
        yield source.span(begin=begin, end=end, ends=end == whole.end, counted_from=begin), end - begin, None
        begin = end


def _plain_text_cut(path: str, position: int, end: int) -> int:
    start = max(position - MARGIN, 0)
    window = read_range(path, start, min(position + LOOKAHEAD + MARGIN, end))
    return start + text_cut(window, position - start)


def _plain_line_cut(path: str, position: int, end: int) -> int:
    position -= 1  # a line may end right before the position
    while position < end:
        stop = min(position + LOOKAHEAD, end)
        newline = read_range(path, position, stop).find(b"\n")
        if newline >= 0:
            return position + newline + 1
        position = stop
    return end


def _packed_spans(source: Source, size: int) -> Iterator[tuple[Span, int, bytes]]:
    before = 0
    for chunk in stream_chunks(source.span(), size):
        if chunk.content:
            end = chunk.begin + len(chunk.content)
            span = source.span(begin=chunk.begin, end=end, ends=chunk.last, first_line=chunk.first_line)
            yield span, min(chunk.position, source.input_bytes) - before, chunk.content
            before = min(chunk.position, source.input_bytes)


def _parquet_spans(source: Source, size: int, text_field: str) -> Iterator[tuple[Span, int, None]]:
    with open_parquet(source.path, text_field) as file:
        sizes = [file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups)]
    begin = unpacked = done = 0
    for group, group_bytes in enumerate(sizes, 1):
        unpacked += group_bytes
        if unpacked >= size or group == len(sizes):
            share = source.input_bytes * group // len(sizes)
            yield source.span(rows_from=begin, rows_to=group), share - done, None
            begin, unpacked, done = group, 0, share
