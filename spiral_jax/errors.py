"""The one exception type for mistakes a user can make."""

_SHOWN = 400  # characters of a value in a message


class SpiralError(Exception):
    """A mistake in what a user gave us: a config field, a file, a flag, a checkpoint.

    The message is a single line that names the field or file, says what was found and what is
    allowed. Commands print it without a traceback and exit with status 2; anything else that is
    raised is a defect of this package and keeps its traceback. (Not a ValueError: libraries between us and the
    command line catch those and bury the message.)
    """


class Damaged(SpiralError):
    """A checkpoint whose files are not what was saved; an older one may be whole."""


class Diverged(Exception):
    """Training whose numbers are no numbers any more; the message is a single line. Commands exit with status 44."""


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
