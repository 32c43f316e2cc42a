"""Where text may be cut so that its parts, tokenised one by one, give the tokens of the whole."""

import re

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


def text_cut(content: bytes, position: int) -> int:
    """Finds a good place to cut text at or soon after a position.

    In this order: after a newline between two visible characters, before a space between two visible characters (in
    a text with CRLF line ends there are no such newlines), after any newline, between two characters.

    Args:
      content: UTF-8 bytes: those around the position, from MARGIN before it to LOOKAHEAD + MARGIN after it, if the
        text reaches that far.
      position: Where the cut is wanted, an index into `content`.

    Returns:
      Where to cut, an index into `content`.
    """
    end = min(position + LOOKAHEAD, len(content))
    begin = max(position - 1, 0)
    found = _LONE_NEWLINE.search(content, begin, end + MARGIN)
    if found and found.end() <= end:
        return found.end()
    found = _LONE_SPACE.search(content, position, end + MARGIN)
    if found and found.end() <= end:
        return found.start()
    if 0 <= (newline := content.find(b"\n", position, end)) < len(content) - 1:
        return newline + 1
    return character_cut(content, position)


def character_cut(content: bytes, position: int) -> int:
    """Moves a position forward to the next boundary between characters."""
    for _ in range(3):
        if position < len(content) and content[position] & 0xC0 == 0x80:
            position += 1
    return position
