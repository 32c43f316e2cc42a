"""The one exception type for mistakes a user can make."""


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


class Hung(Exception):
    """A run that this process cannot go on with, though nothing is wrong with what it was given: another process has it,
    or is gone. The message is a single line. Commands exit with status 43, and may be started again."""


def require(ok: bool, field: str, value, allowed: str) -> None:
    """Raises SpiralError naming a configuration field, the value found and what is allowed, unless `ok`."""
    if not ok:
        raise SpiralError(f"{field} is {value!r}; allowed: {allowed}")
