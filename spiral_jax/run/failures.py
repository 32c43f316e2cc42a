"""What orbax says when a file cannot be read or written: a reason for our one line, and silence about the rest."""

import functools
import logging
import re
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from spiral_jax.data.bucket import is_trouble

# Of the operating system, as tensorstore quotes it: "to file 4: No space left on device [os_error_code='28']".
_OS_ERROR = re.compile(r"([^:\[\]\n]+) \[os_error_code=")
# As the C++ of tensorstore begins its errors: "RESOURCE_EXHAUSTED: Error writing ...".
_STATUS = re.compile(r"[A-Z]+(_[A-Z]+)*: ")
# The kinds of it that are about a storage rather than about what it holds.
_OUTAGE = re.compile("UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED|UNAUTHENTICATED|PERMISSION_DENIED")


def first_words(error: BaseException) -> str:
    """What failed, in one line at most. orbax says a great deal; it says first which array or file it is about."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def disk_trouble(error: BaseException) -> str:
    """Why something was not written: what the operating system said, if that is known."""
    one: BaseException | None = error
    seen: set[int] = set()
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        if isinstance(one, OSError) and one.strerror:
            return one.strerror
        if match := _OS_ERROR.search(str(one)):
            return match[1].strip()
        one = one.__cause__ or one.__context__
    return first_words(error)


def is_outage(error: BaseException) -> bool:
    """Whether a bucket was not read because it did not answer, which says nothing about what it holds."""
    one: BaseException | None = error
    while one is not None:
        if (is_trouble(one) and not isinstance(one, FileNotFoundError)) or _OUTAGE.search(str(one)):
            return True
        one = one.__cause__
    return False


def finish_threads(seconds: float) -> None:
    """Waits for the threads of orbax, so long at most: writes that go on behind the one that failed."""
    deadline = time.monotonic() + seconds
    for thread in threading.enumerate():
        if type(thread).__module__.startswith("orbax.") or thread.name == "async_save":
            # Their own `join` may raise what ended them, which is known.
            threading.Thread.join(thread, max(0.0, deadline - time.monotonic()))


def silence() -> None:
    """Keeps orbax from telling the log, with tracebacks, of the failures that it also raises.

    Among them are reads and writes beside the one that failed, of which asyncio complains whenever they are collected,
    perhaps as late as Python's end: this therefore stays.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_news)  # once: a filter that is there is not added again
    before = sys.unraisablehook
    if getattr(before, "func", None) is not _unraisable:
        sys.unraisablehook = functools.partial(_unraisable, before)


def _unraisable(before: Callable[[Any], None], raised: Any) -> None:
    """tensorstore finishes writes whose event loop orbax has closed when the first of them failed."""
    if not (isinstance(raised.exc_value, RuntimeError) and str(raised.exc_value) == "Event loop is closed"):
        before(raised)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a record of absl's or asyncio's is about something else."""
    if "/orbax/" in record.pathname:
        return False
    if record.name != "asyncio" or "exception was never retrieved" not in record.getMessage():
        return True
    error = record.exc_info[1] if record.exc_info else None
    where = error.__traceback__ if error else None
    if where is None and _STATUS.match(str(error)):  # Python has not come to see it
        return False
    files = []
    while where is not None:
        files.append(where.tb_frame.f_code.co_filename)
        where = where.tb_next
    return not any(f"/{package}/" in file for file in files for package in ("orbax", "tensorstore"))
