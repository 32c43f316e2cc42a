"""What is in an input file: the text of its documents, and what in it is no text."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

from spiral_jax.data.text.chunks import Chunk, read_range, stream_chunks
from spiral_jax.data.text.cuts import text_cut
from spiral_jax.data.text.parquet import read_rows
from spiral_jax.data.text.spans import Format, Invalid, Span, Text, checked_text, kind_of, listing
from spiral_jax.data.text.unpack import compression_of, without_compression

# A document longer than this is tokenised in pieces. Memory per worker is some hundred times this.
PIECE_BYTES = 2**20


def format_of(name: str, configured: str) -> tuple[Format, str]:
    """What a file holds and how it is compressed.

    Args:
      name: The file's name.
      configured: `data.format`.
    """
    compression = compression_of(name)
    suffix = Path(without_compression(name)).suffix.lower()
    if configured == "auto":
        is_lines = suffix in (".jsonl", ".ndjson") or (compression and suffix == ".json")
        configured = "jsonl" if is_lines else "parquet" if suffix == ".parquet" and not compression else "text"
    return configured, "" if configured == "parquet" else compression


def read_span(span: Span, content: bytes | None, text_field: str) -> Iterator[Text | Invalid]:
    """Reads documents, long text in pieces.

    Args:
      span: What to read.
      content: The bytes of the span where they have been read already.
      text_field: Field or column of records that holds the text.

    Yields:
      Documents that are not empty, in order. Of a text file that is not UTF-8, one Invalid and nothing else.

    Raises:
      SpiralError: The file cannot be read, is damaged, or has no such column.
    """
    if span.format == "parquet":
        yield from read_rows(span, text_field)
    elif span.format == "jsonl":
        for chunk in _chunks_of(span, content):
            yield from _json_lines(span, chunk, text_field)
    else:
        yield from _text(span, content)


def _chunks_of(span: Span, content: bytes | None) -> Iterator[Chunk]:
    if content is None and span.compression:
        yield from stream_chunks(span, PIECE_BYTES)
        return
    if content is None:
        content = read_range(span.path, span.begin, span.end)
    yield Chunk(content, span.begin, span.first_line, 0, last=True)


def _text(span: Span, content: bytes | None) -> Iterator[Text | Invalid]:
    # Everything is decoded before anything is given out: a file that is not UTF-8 is left out whole.
    for chunk in _chunks_of(span, content):
        try:
            chunk.content.decode("utf-8")
        except UnicodeDecodeError as error:
            yield Invalid(span.path, f"byte {chunk.begin + error.start} is not UTF-8 ({error.reason})")
            return
    for chunk in _chunks_of(span, content):
        begin, size = 0, len(chunk.content)
        while size - begin >= 2 * PIECE_BYTES:
            end = text_cut(chunk.content, begin + PIECE_BYTES)
            yield Text(chunk.content[begin:end].decode("utf-8"), ends=False)
            begin = end
        if begin < size:
            yield Text(chunk.content[begin:].decode("utf-8"), ends=chunk.last and span.ends)


def _json_lines(span: Span, chunk: Chunk, text_field: str) -> Iterator[Text | Invalid]:
    begin = chunk.begin
    for number, line in enumerate(io.BytesIO(chunk.content), chunk.first_line):
        if not line.isspace():
            try:
                text = _field(line, begin, text_field)
            except ValueError as error:
                yield Invalid(span.path, str(error), number, span.counted_from)
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
        raise ValueError(f"not JSON ({' '.join(str(error).split())})") from error
    if not isinstance(record, dict):
        raise ValueError(f'{kind_of(record)}, not an object with a field "{text_field}"')
    if text_field not in record:
        raise ValueError(f'no field "{text_field}" (data.text_field); fields: {listing(record)}')
    return checked_text(record[text_field], text_field)
