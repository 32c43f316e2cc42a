"""The one exception type for mistakes a user can make."""


class SpiralError(Exception):
    """A mistake in what a user gave us: a config field, a file, a flag, a checkpoint.

    The message is a single line that names the field or file, says what was found and what is
    allowed. Commands print it without a traceback and exit with status 2; anything else that is
    raised is a defect of this package and keeps its traceback. (Not a ValueError: libraries between us and the
    command line catch those and bury the message.)
    """


def require(ok: bool, field: str, value, allowed: str) -> None:
    """Raises SpiralError naming a configuration field, the value found and what is allowed, unless `ok`."""
    if not ok:
        raise SpiralError(f"{field} is {value!r}; allowed: {allowed}")
