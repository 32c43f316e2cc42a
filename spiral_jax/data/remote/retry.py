"""Asking again: which failures of a request pass, and how long to wait for that."""

import asyncio
import json
import random
import sys
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from spiral_jax.errors import SpiralError, Unreachable

_T = TypeVar("_T")
# A window is a few kilobytes and takes a fraction of a second, or its connection hangs: asking again soon is what keeps
# the batches coming. Each further attempt may take twice as long, for storage that is slow rather than hung.
FIRST_TIMEOUT, _LONGEST_TIMEOUT = 3.0, 60.0  # seconds
_FIRST_DELAY, _LONGEST_DELAY = 0.1, 10.0  # seconds between attempts
_EXIT_CHECK = 0.5  # seconds
_SILENCE = 10.0  # seconds of failing before we say so, and between two such lines


class WrongAnswer(Exception):
    """An answer that is not the bytes asked for."""


class Retry:
    """Calls what may fail until it succeeds, fails for good, or the time is over."""

    def __init__(self, url: str, seconds: float, first_timeout: float = FIRST_TIMEOUT):
        self._url = url
        self._seconds = seconds
        self._first_timeout = first_timeout
        self._last_said = 0.0

    async def __call__(self, what: str, attempt: Callable[[], Awaitable[_T]], more_seconds: float = 0.0) -> _T:
        """Awaits `attempt()` until it succeeds.

        Args:
          what: what is asked for, for messages.
          attempt: the request.
          more_seconds: how much longer than a small request each attempt may take.

        Raises:
          FileNotFoundError: there is no such file.
          SpiralError: it failed for good; `Unreachable` if for too long, on this machine perhaps alone.
        """
        begin, failures = time.monotonic(), 0
        while True:
            longer = 2 ** min(failures, 10)
            try:
                async with asyncio.timeout(min(self._first_timeout * longer, _LONGEST_TIMEOUT) + more_seconds):
                    return await attempt()
            except (TypeError, NotImplementedError):  # a defect, or what this kind of storage cannot do
                raise
            except Exception as error:
                reason = _in_words(error)
                self._raise_if_final(error, what, reason)
            failures += 1
            # Random, or the requests that failed together would all come back together.
            delay = min(_FIRST_DELAY * longer, _LONGEST_DELAY) * random.uniform(0.5, 1.0)
            failing = time.monotonic() - begin
            if failing + delay > self._seconds:
                failed = f"{self._url}: {what} failed {failures} times in {failing:.1f} s"
                raise Unreachable(f"{failed} (data.retry_seconds is {self._seconds:g}), the last time with: {reason}")
            self._say(failing, what, reason)
            await self._sleep(delay)

    async def _sleep(self, seconds: float) -> None:
        """Waits, but not longer than the program runs: it ends when its reading threads do."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            await asyncio.sleep(min(left, _EXIT_CHECK))
            try:
                await asyncio.to_thread(bool)
            except RuntimeError as error:  # Python takes no more work for threads once it has begun to exit
                raise SpiralError(f"{self._url}: given up, as the program ends") from error

    def _raise_if_final(self, error: Exception, what: str, reason: str) -> None:
        """Raises what trying again would not change."""
        named = getattr(error, "status", None) or getattr(error, "code", None)  # aiohttp's and gcsfs's names for it
        status = int(str(named)) if str(named).isdigit() else None
        if isinstance(error, FileNotFoundError) or status in (404, 410):
            raise FileNotFoundError(self._url)
        # gcsfs has no type of its own for 403.
        if isinstance(error, PermissionError) or str(error).startswith("Forbidden") or status in (401, 403):
            found = f"{self._url} cannot be read: access is denied ({reason})"
            raise SpiralError(f"{found}; allowed: a file that may be read from here")
        # An answer that cannot be understood may be followed by one that can; other ValueErrors are about the URL.
        garbled = isinstance(error, (json.JSONDecodeError, UnicodeError))
        final = isinstance(error, (ValueError, ImportError, IsADirectoryError, NotADirectoryError)) and not garbled
        # 400 is what aiohttp makes of an answer that is not HTTP, and S3's word for a slow connection.
        if final or (status is not None and 400 < status < 500 and status not in (408, 425, 429)):
            raise SpiralError(f"{self._url}: {what} failed with: {reason}")

    def _say(self, failing: float, what: str, reason: str) -> None:
        now = time.monotonic()
        if failing > _SILENCE and now - self._last_said > _SILENCE:
            self._last_said = now
            message = f"{self._url}: {what} has failed for {failing:.0f} s of {self._seconds:g} s, last with: {reason}"
            print(message, file=sys.stderr, flush=True)


def _in_words(error: Exception) -> str:
    if isinstance(error, WrongAnswer):
        return str(error)
    if isinstance(error, TimeoutError) and not str(error):
        return "no answer in time"
    return " ".join(f"{type(error).__name__}: {error}".split())
