"""Files behind fsspec URLs: many ranges in flight at once, each tried again on its own.

fsspec opens and sends; what is done here is what it does not do for every kind of storage: it neither repeats a failed
range by itself until a deadline (of its file systems only some try again, HTTP not at all), nor compares answers with
what was asked for and with the version that was opened.
"""

import asyncio
import itertools
import sys
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from spiral_jax.data import bucket
from spiral_jax.data.blob import Blob, Range
from spiral_jax.data.remote.retry import FIRST_TIMEOUT, Retry, WrongAnswer
from spiral_jax.errors import SpiralError

_T = TypeVar("_T")
_IN_FLIGHT = 64  # requests of one read_many at a time
_PIECE = 2**23  # longest request: so that each ends well before its timeout
_SLOWEST = 2**20  # bytes per second that a request of many bytes may come down to
# What storages tell versions of a file from one another by.
_VERSION = ("ETag", "etag", "generation", "md5Hash", "Content-MD5", "Last-Modified", "LastModified", "mtime", "created")


class RemoteBlob(Blob):
    """A file behind an fsspec URL.

    What the storage said when it was opened (size, and over HTTP the ETag) is held against every answer: a file that
    changes under a running job is an error, not other tokens. No request but the reads is made after opening.

    Attributes:
      version: what the storage tells one version of the file from another by (ETag, generation, time), or "".
    """

    def __init__(self, url: str, retry_seconds: float = 300.0, first_timeout: float = FIRST_TIMEOUT):
        """Asks for the size.

        Args:
          url: any URL that fsspec has a file system for.
          retry_seconds: how long a failing request is tried again before it is an error.
          first_timeout: seconds after which a request of few bytes is first given up.

        Raises:
          SpiralError: it does not exist or cannot be read, or a package for this kind of URL is missing.
        """
        self.name = url
        self._file_system, self._path = file_system_of(url)
        self._retry = Retry(url, retry_seconds, first_timeout)
        try:
            info = _info(self._file_system, self._path, self._retry, "asking for its size")
        except FileNotFoundError:
            raise SpiralError(f"{url} does not exist") from None
        if info.get("type") == "directory":
            raise SpiralError(f"{url} is a folder; allowed: a file")
        if info.get("size") is None:
            raise SpiralError(f"{url} is of unknown length; allowed: a server that sends Content-Length")
        self.size = int(info["size"])
        self.version = next((str(info[name]) for name in _VERSION if info.get(name)), "")
        self._etag = _strong(info.get("ETag"))

    def read_many(self, ranges: Sequence[Range]) -> list[bytes]:
        for start, stop in ranges:
            if not 0 <= start <= stop <= self.size:
                raise IndexError(f"bytes {start}:{stop} of {self.name}, which has {self.size}")
        pieces = [[(at, min(at + _PIECE, stop)) for at in range(start, stop, _PIECE)] for start, stop in ranges]
        try:
            found = iter(_run(self._file_system, self._fetch_all([*itertools.chain(*pieces)])))
        except FileNotFoundError:
            raise SpiralError(f"{self.name} does not exist any more") from None
        parts = [[next(found) for _ in several] for several in pieces]
        return [several[0] if len(several) == 1 else b"".join(several) for several in parts]

    async def _fetch_all(self, ranges: Sequence[Range]) -> list[bytes]:
        free = asyncio.Semaphore(_IN_FLIGHT)

        async def fetch(start: int, stop: int) -> bytes:
            async with free:
                what, seconds = f"reading bytes {start}:{stop}", (stop - start) / _SLOWEST
                return await self._retry(what, lambda: self._fetch(start, stop), seconds)

        tasks = [asyncio.ensure_future(fetch(start, stop)) for start, stop in ranges]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:  # where one has failed for good, the others have nobody to come back to
                task.cancel()

    async def _fetch(self, start: int, stop: int) -> bytes:
        if not self._file_system.async_impl:
            content = await asyncio.to_thread(self._file_system.cat_file, self._path, start, stop)
        elif _is_http(self._file_system):

            async def check(response: Any) -> None:
                try:
                    self._check_headers(response, start, stop)
                except WrongAnswer:
                    response.close()  # before its body arrives, which may be everything there is
                    raise

            # Bytes packed for the journey would be counted packed.
            headers = {**self._file_system.kwargs.get("headers", {}), "Accept-Encoding": "identity"}
            content = await self._file_system._cat_file(
                self._path, start, stop, headers=headers, raise_for_status=check
            )
        else:
            content = await self._file_system._cat_file(self._path, start, stop)
        if len(content) != stop - start:
            raise WrongAnswer(f"{len(content)} bytes came instead of {stop - start}")
        return content

    def _check_headers(self, response: Any, start: int, stop: int) -> None:
        response.raise_for_status()
        found, etag = response.headers.get("Content-Range", ""), _strong(response.headers.get("ETag"))
        if response.status == 206:
            place, _, size = found.partition("/")
            if place != f"bytes {start}-{stop - 1}":
                raise WrongAnswer(f"Content-Range {found!r} came instead of {start}-{stop - 1}")
            if size not in ("*", str(self.size)):
                raise WrongAnswer(f"it has changed since it was opened: {size} bytes instead of {self.size}")
        elif (start, stop) != (0, self.size) or response.content_length not in (None, self.size):
            raise WrongAnswer(
                f"status {response.status} with {response.content_length} bytes of {response.content_type} came "
                "instead of 206: no range requests here, or a page about an error"
            )
        if self._etag and etag and etag != self._etag:
            raise WrongAnswer(f"it has changed since it was opened: ETag {etag} instead of {self._etag}")


def exists(url: str, retry_seconds: float) -> bool:
    """Whether there is a file behind a URL; a storage that does not answer is tried again.

    Raises:
      SpiralError: the storage cannot be asked, or refuses to say.
    """
    try:
        info = _info(*file_system_of(url), Retry(url, retry_seconds), "asking whether it exists")
    except FileNotFoundError:
        return False
    return info.get("type") != "directory"


def file_system_of(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it.

    Raises:
      SpiralError: fsspec has none, or a package for it is missing.
    """
    try:
        import fsspec.core

        if url.startswith(("gs://", "gcs://")):
            bucket.prepare()
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise SpiralError(
            f"{url} needs a package that is not installed ({' '.join(str(error).split())}); allowed: with it, "
            "pip install 'spiral_jax[remote]' brings those for http(s):// and gs://"
        ) from error
    except ValueError as error:
        raise SpiralError(f"{url} cannot be opened ({error}); allowed: a path, or a URL that fsspec knows") from error


def _run(file_system: Any, work: Coroutine[Any, Any, _T]) -> _T:
    """Runs a coroutine on fsspec's loop, which runs in a thread of fsspec's, and waits for it."""
    import fsspec.asyn

    loop = file_system.loop if file_system.async_impl else fsspec.asyn.get_loop()
    future = asyncio.run_coroutine_threadsafe(work, loop)
    try:
        return future.result()
    except BaseException:  # also Ctrl-C
        future.cancel()
        raise


def _info(file_system: Any, path: str, retry: Retry, what: str) -> dict[str, Any]:
    async def ask() -> dict[str, Any]:
        if not file_system.async_impl:
            return await asyncio.to_thread(file_system.info, path)
        try:
            return await file_system._info(path)
        except FileNotFoundError as error:
            # Over HTTP fsspec says so of a server that is down as well; the cause knows better.
            if _is_http(file_system) and isinstance(error.__cause__, Exception):
                raise error.__cause__ from None
            raise

    return _run(file_system, retry(what, ask))


def _is_http(file_system: Any) -> bool:
    # Its module is loaded if it is; loading it needs aiohttp. (Its `protocol` is not set in all versions.)
    module = sys.modules.get("fsspec.implementations.http")
    return module is not None and isinstance(file_system, module.HTTPFileSystem)


def _strong(etag: str | None) -> str:
    return (etag or "").removeprefix("W/")
