"""The one exception type for mistakes a user can make, in what they give us or in code of their own."""

import contextlib
import io
import os
import sys
import traceback
from collections.abc import Iterator

_SHOWN = 400  # characters of a value in a message
# Modules of the errors of what asks buckets.
_BUCKET_LIBRARIES = (
    "gcsfs.", "aiohttp.", "google.api_core.", "google.auth.", "google.cloud.", "google.resumable_media.", "requests.",
    "urllib3.",
)  # fmt: skip
_BAD_REQUEST = "Bad Request: "


class SpiralError(Exception):
    """A mistake in what a user gave us: a config field, a file, a flag, a checkpoint.

    The message is a single line that names the field or file, says what was found and what is
    allowed. Commands print it without a traceback and exit with status 2; anything else that is
    raised is a defect of this package and keeps its traceback. (Not a ValueError: libraries between us and the
    command line catch those and bury the message.)
    """


class Damaged(SpiralError):
    """A checkpoint whose files are not what was saved; an older one may be whole."""


class Unreachable(SpiralError):
    """A bucket that does not answer now, and may the next time. Commands exit with status 43."""


class Diverged(Exception):
    """Training whose numbers are no numbers any more; the message is a single line. Commands exit with status 44."""


def is_of_bucket(error: BaseException) -> bool:
    """Whether an error is one of the libraries that ask buckets, which have many kinds, and a bucket has been used."""
    if {"gcsfs", "google.cloud.storage"}.isdisjoint(sys.modules):
        return False
    ours = any(f"{kind.__module__}.".startswith(_BUCKET_LIBRARIES) for kind in type(error).mro())
    return ours or (isinstance(error, ValueError) and str(error).startswith(_BAD_REQUEST))


def is_refusal(error: BaseException) -> bool:
    """Whether a bucket's error is an answer that the user can mend: other ones may pass."""
    # Of HTTP; gcsfs has no type of its own for 403, nor for an answer that calls something invalid.
    code = getattr(error, "code", None)
    answered = isinstance(code, int) and 400 <= code < 500 and code not in (408, 429)
    said = str(error).startswith(("Forbidden", _BAD_REQUEST))
    return answered or said or type(error).__name__ == "DefaultCredentialsError"


def escape_unprintable() -> None:
    """Standard streams then show what their encoding lacks as an escape, where they would raise: a locale need not be
    UTF-8, nor the name of a file."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def require(ok: bool, field: str, value, allowed: str) -> None:
    """Raises SpiralError naming a configuration field, the value found and what is allowed, unless `ok`."""
    if not ok:
        raise SpiralError(f"{field} is {shown(value)}; allowed: {allowed}")


def shown(value: object) -> str:
    """A value as a message has it: of a long one the beginning."""
    try:
        text = repr(value)
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, a list in itself
        text = f"a {type(value).__name__} ({error})"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text)} characters)"


@contextlib.contextmanager
def guarded(where: str, file: str) -> Iterator[None]:
    """Makes one line of whatever code of the user's own raises in the block.

    Args:
      where: how the line begins.
      file: the real path of the file with the code.

    Raises:
      SpiralError: the block raised something; a SpiralError is passed on as it is.
    """
    try:
        yield
    except SpiralError:
        raise
    except Exception as error:
        raise blamed(error, where, file) from error


def blamed(error: Exception, where: str, file: str) -> SpiralError:
    """The one line of `guarded`: what the code is for, the last line of the file that was reached, and the reason."""
    lines = lines_in(error, file)
    place = f", line {lines[-1]}" if lines else ""
    return SpiralError(f"{where}{place}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")


def lines_in(error: Exception, file: str) -> list[int]:
    """Lines of a file (its real path) that an exception came through, the outermost first."""
    frames = traceback.extract_tb(error.__traceback__)
    return [frame.lineno for frame in frames if frame.lineno and os.path.realpath(frame.filename) == file]
