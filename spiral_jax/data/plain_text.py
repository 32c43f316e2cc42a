"""Text as people's files have it: UTF-8, perhaps behind a byte order mark, in lines that end at \\n or \\r\\n."""

import codecs

BYTE_ORDER_MARK = codecs.BOM_UTF8


def decoded(content: bytes) -> str:
    """The text of a whole file, without the mark that some editors put in front of it.

    Raises:
      UnicodeDecodeError: it is not UTF-8.
    """
    return content.decode("utf-8").removeprefix("\N{BOM}")


def lines_of(text: str) -> list[str]:
    """The lines of a text, without their ends.

    `str.splitlines` would also split at form feeds, U+0085, U+2028 and others, which stand within lines of JSON, and of
    texts. An empty last line is none.
    """
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return lines if lines[-1] else lines[:-1]
