"""Stretches of input files, and what is found in them: text, or what is none."""

import dataclasses
import os
from collections.abc import Iterable
from typing import Literal

from spiral_jax.data.text.unpack import unpack

Format = Literal["text", "jsonl", "parquet"]


@dataclasses.dataclass(frozen=True)
class Span:
    """A file, or a stretch of it, to be read in one go.

    Attributes:
      path: The file.
      format: What is in it.
      compression: "gz", "zst" or "".
      split: Where its documents go; "hash" decides for each by its text.
      begin: First byte, of the unpacked text.
      end: Byte after the last one; None for the end of the file.
      ends: Whether a text document ends here, rather than going on in another span.
      first_line: Line number at `begin`, counted from 1, as far as it is known: from `counted_from` on.
      counted_from: Byte that `first_line` is counted from.
      rows_from: First row group of a parquet file.
      rows_to: Row group after the last one; None for all.
    """

    path: str
    format: Format
    compression: str
    split: Literal["train", "validation", "hash"]
    begin: int = 0
    end: int | None = None
    ends: bool = True
    first_line: int = 1
    counted_from: int = 0
    rows_from: int = 0
    rows_to: int | None = None


@dataclasses.dataclass(frozen=True)
class Text:
    """A document, or a piece of one.

    Attributes:
      text: The text, never empty.
      ends: Whether the document ends here.
    """

    text: str
    ends: bool = True


@dataclasses.dataclass(frozen=True)
class Invalid:
    """Something that is no text: a record, or a whole text file.

    Attributes:
      path: The file.
      what: What was found.
      line: Its line, counted from 1 at byte `counted_from`; 0 if it is not a line.
      counted_from: See `line`.
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
        return f"{name}:{self.line + _count_lines(self.path, self.counted_from)}: {self.what}"


def checked_text(text: object, text_field: str) -> str:
    """A value as text, or ValueError with what is wrong with it.

    Args:
      text: The value of a record's field.
      text_field: The field.
    """
    if not isinstance(text, str):
        raise ValueError(f'field "{text_field}" is {kind_of(text)}, not a string')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f'field "{text_field}" holds {text[error.start]!r} at character {error.start}, which has no UTF-8 form'
        ) from error
    return text


def _count_lines(path: str, end: int) -> int:
    lines = position = 0
    for block, _ in unpack(path, ""):
        if position >= end:
            break
        lines += block[: end - position].count(b"\n")
        position += len(block)
    return lines


def listing(names: Iterable) -> str:
    """Names in a message, not too many."""
    names = sorted(" ".join(str(name).encode("utf-8", "backslashreplace").decode("utf-8").split()) for name in names)
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "") or "none"


def kind_of(value: object) -> str:
    """What a value is called in JSON."""
    kinds = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")
