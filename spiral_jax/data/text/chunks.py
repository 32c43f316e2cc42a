"""Reads files by ranges, and as streams cut where text or records may be cut."""

import dataclasses
from collections.abc import Iterator

from spiral_jax.data.text.cuts import LOOKAHEAD, MARGIN, text_cut
from spiral_jax.data.text.spans import Span
from spiral_jax.data.text.unpack import unpack
from spiral_jax.errors import SpiralError


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Unpacked bytes of a file, cut where text or records may be cut.

    Attributes:
      content: The bytes.
      begin: Where they are in the unpacked file.
      first_line: Line number at `begin`.
      position: Bytes of the (packed) file read so far.
      last: Whether nothing follows.
    """

    content: bytes
    begin: int
    first_line: int
    position: int
    last: bool


def stream_chunks(span: Span, size: int) -> Iterator[Chunk]:
    """Cuts a file of text or lines into chunks of about `size` bytes, or as long as the longest line.

    Yields:
      Chunks, at least one; empty only if the whole span is.
    """
    cut = text_cut if span.format == "text" else _line_cut
    enough = size + LOOKAHEAD + MARGIN
    content, begin, line, unpacked, position = bytearray(), span.begin, 1, 0, 0
    for block, position in unpack(span.path, span.compression):
        first = max(span.begin - unpacked, 0)
        content += block[first:] if span.end is None else block[first : max(span.end - unpacked, 0)]
        unpacked += len(block)
        while len(content) >= enough:
            at = cut(content, size)
            if at >= len(content):  # perhaps a longer line: look again when there is twice as much
                enough = 2 * len(content)
                break
            chunk = Chunk(bytes(content[:at]), begin, line, position, last=False)
            yield chunk
            del content[:at]
            begin += at
            line += chunk.content.count(b"\n") if span.format == "jsonl" else 0
            enough = size + LOOKAHEAD + MARGIN
    yield Chunk(bytes(content), begin, line, position, last=True)


def read_range(path: str, begin: int, end: int) -> bytes:
    """Reads bytes begin to end - 1 of a file.

    Raises:
      SpiralError: The file cannot be read, or is shorter.
    """
    try:
        with open(path, "rb") as file:
            file.seek(begin)
            content = file.read(end - begin)
    except OSError as error:
        raise SpiralError(f"{path}: cannot be read ({error.strerror})") from error
    if len(content) < end - begin:
        raise SpiralError(f"{path}: has become shorter while it was read; allowed: files that do not change")
    return content


def _line_cut(content: bytes | bytearray, position: int) -> int:
    newline = content.find(b"\n", position - 1)
    return len(content) if newline < 0 else newline + 1
