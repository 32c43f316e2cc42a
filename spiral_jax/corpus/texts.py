"""What is in a piece: the text of its documents, and what in it is no text."""

import dataclasses
import io
import json
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

from spiral_jax.corpus.pieces import Piece, cut_packed, listing, open_parquet, text_cut
from spiral_jax.corpus.sources import Source, one_line, read_range, unpack
from spiral_jax.errors import SpiralError

# A document longer than this is tokenised in stretches. Memory per worker is some hundred times this.
_TEXT_BYTES = 2**20
_ROWS_PER_BATCH = 256


class Text(NamedTuple):
    """A document, or a stretch of one.

    Attributes:
      text: the text, at least one character.
      ends: whether the document ends here.
    """

    text: str
    ends: bool = True


class Invalid(NamedTuple):
    """Something that is no text: a record, or a whole text file.

    Attributes:
      path: the file.
      what: what was found.
      line: its line, counted from 1 at byte `counted_from`; 0 if it is not a line.
      counted_from: where that byte is in the file.
    """

    path: str
    what: str
    line: int = 0
    counted_from: int = 0

    def describe(self) -> str:
        """File, line in the file, and what was found; reads the file up to there to count lines."""
        name = os.fsencode(self.path).decode("utf-8", "backslashreplace")
        if not self.line:
            return f"{name}: {self.what}"
        lines, left = self.line, self.counted_from
        for block, _ in unpack(self.path, "") if left else ():
            lines += block[:left].count(b"\n")
            left -= min(len(block), left)
            if not left:
                break
        return f"{name}:{lines}: {self.what}"

    def error(self) -> SpiralError:
        """What to raise where it is an error."""
        return SpiralError(self.describe() + '; allowed: UTF-8 text, or data.invalid="skip" to leave it out')


def read_piece(piece: Piece, text_field: str) -> Iterator[tuple[Source, Text | Invalid]]:
    """Reads documents, long text in stretches.

    Args:
      piece: what to read.
      text_field: field or column of records that holds the text.

    Yields:
      Documents that are not empty, in order, each with its source. Of a text file that is not UTF-8, one Invalid and
      nothing else.

    Raises:
      SpiralError: a file cannot be read, is damaged, or has no such column.
    """
    for source in piece.sources:
        one = dataclasses.replace(piece, sources=(source,))
        if source.format == "parquet":
            found = _rows(source, text_field)
        elif source.format == "jsonl":
            found = (item for read in _with_content(one) for item in _json_lines(read, text_field))
        else:
            found = _texts(source.path, lambda one=one: _with_content(one))
        for item in found:
            yield source, item


def _with_content(piece: Piece) -> Iterator[Piece]:
    [source] = piece.sources
    if piece.content:
        yield piece
    elif source.compression:
        yield from cut_packed(source, _TEXT_BYTES)
    else:
        yield dataclasses.replace(piece, content=read_range(source.path, source.begin, source.stop))


def _texts(path: str, read: Callable[[], Iterator[Piece]]) -> Iterator[Text | Invalid]:
    # Everything is decoded before anything is given out: a file that is not UTF-8 is left out whole.
    for piece in read():
        try:
            piece.content.decode("utf-8")
        except UnicodeDecodeError as error:
            yield Invalid(path, f"byte {piece.sources[0].begin + error.start} is not UTF-8 ({error.reason})")
            return
    for piece in read():
        begin, size = 0, len(piece.content)
        while size - begin >= 2 * _TEXT_BYTES:
            end = text_cut(piece.content, begin + _TEXT_BYTES)
            yield Text(piece.content[begin:end].decode("utf-8"), ends=False)
            begin = end
        if begin < size:
            yield Text(piece.content[begin:].decode("utf-8"), ends=piece.ends)


def _json_lines(piece: Piece, text_field: str) -> Iterator[Text | Invalid]:
    [source] = piece.sources
    begin = source.begin
    for number, line in enumerate(io.BytesIO(piece.content), piece.first_line):
        if not line.isspace():
            try:
                text = _field(line, begin, text_field)
            except ValueError as error:
                yield Invalid(source.path, str(error), number, 0 if source.compression else source.begin)
            else:
                if text:
                    yield Text(text)
        begin += len(line)


def _field(line: bytes, begin: int, text_field: str) -> str:
    """The text of a line of JSON, or ValueError with what is wrong."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {begin + error.start} is not UTF-8 ({error.reason})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({one_line(error)})") from error
    if not isinstance(record, dict):
        raise ValueError(f'{_kind_of(record)}, not an object with a field "{text_field}"')
    if text_field not in record:
        raise ValueError(f'no field "{text_field}" (data.text_field); fields: {listing(list(record))}')
    return _checked_text(record[text_field], text_field)


def _rows(source: Source, text_field: str) -> Iterator[Text | Invalid]:
    with open_parquet(source.path, text_field) as file:
        stop = file.num_row_groups if source.end is None else source.end
        row = sum(file.metadata.row_group(group).num_rows for group in range(source.begin))
        try:
            batches = file.iter_batches(
                _ROWS_PER_BATCH, row_groups=list(range(source.begin, stop)), columns=[text_field], use_threads=False
            )
            for value in (value for batch in batches for value in batch.column(0)):
                row += 1
                try:
                    text = _checked_text(value.as_py(), text_field)
                except UnicodeDecodeError as error:
                    yield Invalid(source.path, f'row {row}: column "{text_field}" is not UTF-8 ({error.reason})')
                except ValueError as error:
                    yield Invalid(source.path, f"row {row}: {error}")
                else:
                    if text:
                        yield Text(text)
        except (OSError, ValueError) as error:  # from one of which the errors of pyarrow derive
            raise SpiralError(f"{source.path} cannot be read ({one_line(error)})") from error


def _checked_text(text: object, text_field: str) -> str:
    """A value as text, or ValueError with what is wrong with it."""
    if not isinstance(text, str):
        raise ValueError(f'field "{text_field}" is {_kind_of(text)}, not a string')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f'field "{text_field}" holds {text[error.start]!r} at character {error.start}, which has no UTF-8 form'
        ) from error
    return text


def _kind_of(value: object) -> str:
    """What a value is called in JSON."""
    kinds = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")
