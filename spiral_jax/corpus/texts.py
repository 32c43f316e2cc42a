"""What is in a piece: the text of its documents, and what in it is no text."""

import concurrent.futures
import dataclasses
import functools
import hashlib
import io
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from spiral_jax.corpus.pieces import Piece, cut_into_pieces, cut_packed, listing, open_parquet, text_cut, too_long
from spiral_jax.corpus.sources import Source, one_line, read_range, uniform_hash, unpack
from spiral_jax.data.config import DataConfig
from spiral_jax.data.exclusive import Check
from spiral_jax.data.plain_text import BYTE_ORDER_MARK
from spiral_jax.data.tokenizers import Tokenizer, train_bpe
from spiral_jax.errors import SpiralError
from spiral_jax.progress import Report, duration, in_thread

# A document longer than this is tokenised in stretches. Memory per worker is some hundred times this.
_TEXT_BYTES = 2**20
_ROWS_PER_BATCH = 256
# More text does not make a small vocabulary better in a way one can measure, only slower to train.
SAMPLE_BYTES = 8_000_000
_SECONDS_BETWEEN_CHECKS, _SECONDS_BETWEEN_LINES = 0.1, 5.0


class NotText(SpiralError):
    """Input that is no text. Whatever mends it makes it other input: nothing of a preparation can be gone on with."""


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

    def error(self) -> "NotText":
        """What to raise where it is an error."""
        return NotText(self.describe() + '; allowed: UTF-8 text, or data.invalid="skip" to leave it out')


def read_piece(
    piece: Piece, text_field: str, longest_record: int = DataConfig.longest_record
) -> Iterator[tuple[Source, Text | Invalid]]:
    """Reads documents, long text in stretches.

    Args:
      piece: what to read.
      text_field: the field or column of records that holds the text.
      longest_record: most bytes of a line, or of a text in a parquet file.

    Yields:
      Documents that are not empty, in order, each with its source. Of a text file that is not UTF-8, one Invalid and
      nothing else.

    Raises:
      SpiralError: a file cannot be read, is damaged, has no such column or a longer record.
    """
    for source in piece.sources:
        one = dataclasses.replace(piece, sources=(source,))
        if source.format == "parquet":
            found = _rows(source, text_field, longest_record)
        elif source.format == "jsonl":
            unpacked = _with_content(one, longest_record)
            found = (item for part in unpacked for item in _json_lines(part, text_field, longest_record))
        else:
            found = _texts(source.path, functools.partial(_with_content, one, longest_record))
        yield from ((source, item) for item in found)


def sample_texts(sources: Sequence[Source], config: DataConfig) -> list[str]:
    """Training documents for a tokenizer, about SAMPLE_BYTES of them; the same for the same input.

    Raises:
      SpiralError: input that is no text or cannot be read.
    """
    texts: list[str] = []
    num_bytes = 0
    # In the order of a hash, so that the sample is not just the first folder.
    train = [source for source in sources if source.split != "validation"]
    train.sort(key=lambda source: hashlib.sha256(source.name.encode("utf-8", "surrogateescape")).digest())
    how = config.text_field, config.longest_record
    pieces = (piece for source in train for piece in cut_into_pieces([source], *how))
    for source, found in (item for piece in pieces for item in read_piece(piece, *how)):
        if num_bytes >= SAMPLE_BYTES:
            break
        if isinstance(found, Invalid):
            if config.invalid == "error":
                raise found.error()
        elif split_of(found.text.encode("utf-8"), source, config) == "train":
            texts.append(found.text[: SAMPLE_BYTES - num_bytes])
            num_bytes += len(texts[-1].encode("utf-8"))
    return texts


def split_of(content: bytes, source: Source, config: DataConfig) -> str:
    """Where a document goes: equal records of a corpus are on one side."""
    if source.split != "hash":
        return source.split
    return "validation" if uniform_hash(content) < config.validation_fraction else "train"


def _with_content(piece: Piece, longest_record: int) -> Iterator[Piece]:
    [source] = piece.sources
    if piece.content:
        yield piece
    elif source.compression:
        yield from cut_packed(source, _TEXT_BYTES, longest_record)
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
        begin, size = _mark_bytes(piece.content, piece.sources[0].begin), len(piece.content)
        while size - begin >= 2 * _TEXT_BYTES:
            end = text_cut(piece.content, begin + _TEXT_BYTES)
            yield Text(piece.content[begin:end].decode("utf-8"), ends=False)
            begin = end
        if begin < size:
            yield Text(piece.content[begin:].decode("utf-8"), ends=piece.ends)


def _json_lines(piece: Piece, text_field: str, longest_record: int) -> Iterator[Text | Invalid]:
    [source] = piece.sources
    begin = source.begin
    for number, line in enumerate(io.BytesIO(piece.content), piece.first_line):
        if len(line) > longest_record:
            raise too_long(source, f"the line at byte {begin}", longest_record)
        mark = _mark_bytes(line, begin)
        line, begin = line[mark:], begin + mark
        if line and not line.isspace():
            try:
                text = _field(line, begin, text_field)
            except ValueError as error:
                yield Invalid(source.path, str(error), number, 0 if source.compression else source.begin)
            else:
                if text:
                    yield Text(text)
        begin += len(line)


def _mark_bytes(content: bytes, begin: int) -> int:
    """Bytes of the byte order mark in front of content that begins at a byte of its file."""
    return len(BYTE_ORDER_MARK) if begin == 0 and content.startswith(BYTE_ORDER_MARK) else 0


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


def _rows(source: Source, text_field: str, longest_record: int) -> Iterator[Text | Invalid]:
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
                    if len(text) > longest_record // 4 and len(text.encode("utf-8")) > longest_record:
                        raise too_long(source, f"row {row}", longest_record)
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


def train_with_progress(texts: Sequence[str], size: int, report: Report, check: Check) -> Tokenizer:
    """As `train_bpe`, in a thread, with a line now and then: the library says nothing, and hears no Ctrl-C.

    Args:
      texts: what to train on.
      size: number of entries.
      report: called with a line.
      check: called often; raises to stop. The thread then works on, but keeps no process that ends.
    """
    done = in_thread("training a BPE", lambda: train_bpe(texts, size))
    begin = said = time.monotonic()
    while not concurrent.futures.wait([done], _SECONDS_BETWEEN_CHECKS).done:
        check()
        if time.monotonic() - said >= _SECONDS_BETWEEN_LINES:
            said = time.monotonic()
            report(f"data: training the BPE, {duration(said - begin)} so far")
    return done.result()
