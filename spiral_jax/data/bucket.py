"""Places on a bucket, `gs://BUCKET/FOLDER`: `etils.epath` gives them the methods of a path.

An object is there whole or not at all, and a write can ask for the generation that it replaces. There are no folders,
no locks and no renames (but copies), and nothing can be appended.
"""

import base64
import concurrent.futures
import contextlib
import datetime
import functools
import hashlib
import importlib
import logging
import os
import pathlib
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from etils import epath

from spiral_jax.errors import SpiralError, Unreachable, is_of_bucket, is_refusal

SCHEME = "gs://"
COMMITTED = "commit_success.txt"  # with which orbax says that a folder is whole
_PACKAGES = ("gcsfs", "google.cloud.storage")
_SECONDS_OF_A_REQUEST = 10.0
_SECONDS_OF_RETRIES = 30.0
_AT_ONCE = 8  # files copied side by side


def is_bucket(place: str | os.PathLike) -> bool:
    """Whether a place is on a bucket."""
    return str(place).startswith(SCHEME)


def bucket_path(field: str, place: str | os.PathLike) -> epath.Path:
    """The path of a folder on a bucket. Nothing is asked of the bucket yet.

    Args:
      field: what to call it in errors.
      place: `gs://BUCKET/FOLDER`.

    Raises:
      SpiralError: another spelling, or a package is missing.
    """
    # gcsfs takes the characters left out for patterns, also where it removes; and so do listings.
    found = re.fullmatch(r"gs://[a-z0-9][a-z0-9._-]*[a-z0-9]/([^*?\[\]{}]+?)/*", str(place))
    if found is None or {"", ".", ".."} & set(found[1].split("/")):
        allowed = "a path, or a folder as gs://BUCKET/FOLDER, the bucket in lower case, without any of *?[]{}"
        raise SpiralError(f"{field} is {str(place)!r}; allowed: {allowed}")
    for package in _PACKAGES:
        try:
            prepare()  # gcsfs looks at the environment when it is imported
            importlib.import_module(package)
        except ImportError:
            raise SpiralError(
                f"{field} is {str(place)!r}, which needs {package}; allowed: with pip install 'spiral_jax[remote]'"
            ) from None
    return epath.Path(str(place).rstrip("/"))


def check_reachable(field: str, path: epath.Path) -> None:
    """Whether there is such a bucket, which may be used from here; seconds, not minutes, if it does not answer.

    Raises:
      SpiralError: there is not.
    """
    allowed = "a bucket that is there and may be used from here (storage.buckets.get and its objects)"
    with refusals(
        path, lambda why: f"{field} is {str(path)!r}, whose bucket cannot be used ({why}); allowed: {allowed}"
    ):
        # What orbax asks, too: it takes the permission `storage.buckets.get`.
        _client().get_bucket(_split(path)[0], timeout=_SECONDS_OF_A_REQUEST, retry=_retry())


def is_trouble(error: BaseException) -> bool:
    """Whether an error is a disk's or a bucket's."""
    return isinstance(error, OSError) or is_of_bucket(error)


@contextlib.contextmanager
def despite_trouble() -> Iterator[None]:
    """What a disk or a bucket refuses in here does not matter."""
    try:
        yield
    except Exception as error:
        if not is_trouble(error):
            raise


@contextlib.contextmanager
def refusals(path: pathlib.Path | epath.Path, line: Callable[[str], str]) -> Iterator[None]:
    """What a disk or a bucket refuses in here is a SpiralError; one of a bucket's that may pass is `Unreachable`.

    Where `path` is on a disk, errors of a bucket are about something else, and are let through.

    Args:
      path: of what is used in the block.
      line: makes the error of the reason.
    """
    try:
        yield
    except Exception as error:
        if not is_trouble(error) or (is_of_bucket(error) and not is_bucket(path)):
            raise
        kind = Unreachable if is_bucket(path) and not is_refusal(error) else SpiralError
        raise kind(line(reason(error))) from error


def reason(error: BaseException) -> str:
    """What an error of a disk or a bucket says, in one line."""
    said = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return said.splitlines()[0][:300]


class Found(NamedTuple):
    """An object as it was read.

    Attributes:
      content: of the object.
      generation: of this content.
      written: when that was written, by the bucket's clock.
    """

    content: bytes
    generation: int
    written: datetime.datetime


class Versioned:
    """An object that is replaced only where nobody else has replaced it since it was read. One thread at a time."""

    def __init__(self, path: epath.Path):
        self._bucket, self._name = _split(path)
        self._lock = threading.RLock()

    def read(self) -> Found | None:
        """The object; None if there is none."""
        from google.api_core import exceptions

        with self._lock:
            while (blob := self._blob(fresh=True)) is not None:
                try:
                    content = blob.download_as_bytes(
                        if_generation_match=blob.generation, timeout=_SECONDS_OF_A_REQUEST, retry=_retry()
                    )
                    return Found(content, blob.generation, blob.updated)
                except (exceptions.PreconditionFailed, exceptions.NotFound):  # replaced in between
                    continue
        return None

    def write(self, content: bytes, generation: int) -> int | None:
        """Replaces the object.

        Args:
          content: one that no other process writes.
          generation: of what it replaces; 0 for nothing.

        Returns:
          Its generation; None if there is another one than the caller thinks.
        """
        from google.api_core import exceptions

        with self._lock:
            blob = self._blob()
            try:
                blob.upload_from_string(
                    content, if_generation_match=generation, timeout=_SECONDS_OF_A_REQUEST, retry=_retry()
                )
                return blob.generation
            except exceptions.PreconditionFailed:
                # Perhaps by this write itself, whose first answer was lost.
                found = self.read()
                return found.generation if found is not None and found.content == content else None

    def now(self) -> datetime.datetime:
        """The bucket's clock, which is that of `Found.written`: by an object that is written for it."""
        with self._lock:
            blob = _client().bucket(self._bucket).blob(f"{self._name}.now-{os.urandom(8).hex()}")
            blob.upload_from_string(b"", timeout=_SECONDS_OF_A_REQUEST, retry=_retry())
            written = blob.updated
            with despite_trouble():  # of a first try that was done, although its answer was lost, among others
                blob.delete(timeout=_SECONDS_OF_A_REQUEST, retry=_retry())
            return written

    def _blob(self, fresh: bool = False) -> Any:
        bucket = _client().bucket(self._bucket)
        if not fresh:
            return bucket.blob(self._name)
        return bucket.get_blob(self._name, timeout=_SECONDS_OF_A_REQUEST, retry=_retry())


def folders_with(folder: epath.Path, name: str) -> set[str]:
    """Names of the folders in `folder` that hold an object `name`.

    Raises:
      Exception: of the bucket's library, where epath's `is_dir` would take some of them for "no".
    """
    bucket, place = _split(folder)
    listed = _client().list_blobs(
        bucket, prefix=f"{place}/", match_glob=f"{place}/*/{name}", timeout=_SECONDS_OF_A_REQUEST, retry=_retry()
    )
    below = (blob.name.removeprefix(f"{place}/").split("/") for blob in listed)
    return {names[0] for names in below if names[1:] == [name]}  # an emulator lists others, too


def is_folder(path: pathlib.Path | epath.Path) -> bool:
    """Whether a folder is there; on a bucket, whether something is in it.

    Raises:
      Exception: of the bucket's library, where epath's `is_dir` would take some of them for "no".
    """
    if not is_bucket(path):
        return path.is_dir()
    bucket, place = _split(epath.Path(path))
    listed = _client().list_blobs(
        bucket, prefix=f"{place}/", max_results=1, timeout=_SECONDS_OF_A_REQUEST, retry=_retry()
    )
    return any(True for _ in listed)


def read_all(paths: Sequence[epath.Path]) -> list[bytes]:
    """The contents of objects, many at once."""
    names = [str(path).removeprefix(SCHEME) for path in paths]
    found: dict[str, bytes] = _file_system().cat(names) if names else {}
    return [found[name] for name in names]


def remove(path: pathlib.Path | epath.Path) -> None:
    """Removes a file, if it is there. A bucket says so at a second try, too, if only the first answer was lost."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()


def _remove(name: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        _file_system().rm_file(name)


def upload(
    folder: pathlib.Path, to: epath.Path, *, alone: bool = False, copied: Callable[[int], None] = lambda size: None
) -> None:
    """Copies a folder's files, those that say what others hold last: who finds one finds what it speaks of.

    A file that is there already, by size and MD5, is not copied again.

    Args:
      folder: of this machine.
      to: on the bucket.
      alone: whether other files that are there are removed at the end.
      copied: told of bytes that have been copied, or are there, by many threads; an Exception that it
        raises ends the copying.
    """
    from fsspec.callbacks import Callback

    class Told(Callback):
        value: int

        def absolute_update(self, value: int) -> None:
            before, self.value = self.value, value
            copied(value - before)

    files = {
        path: str(to / path.relative_to(folder).as_posix()).removeprefix(SCHEME)
        for path in folder.rglob("*")
        if path.is_file()
    }
    there: dict[str, dict[str, Any]] = _file_system().find(str(to), detail=True)
    others = there.keys() - set(files.values())
    last = [path for path in files if path.suffix == ".json" or path.name == COMMITTED]
    last.sort(key=lambda path: (-len(path.parts), path))

    def put(path: pathlib.Path) -> None:
        size = path.stat().st_size
        found = there.get(files[path], {})
        if found.get("size") == size and found.get("md5Hash") == _md5(path):
            copied(size)
        else:
            _file_system().put_file(str(path), files[path], callback=Told())

    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(put, files.keys() - set(last)))
        for path in last:
            put(path)
        if alone:
            says = {name for name in others if name.endswith(".json")}  # among them, that not all is there yet
            list(pool.map(_remove, others - says))
            list(pool.map(_remove, says))


def download(files: Sequence[epath.Path], folder: pathlib.Path) -> None:
    """Copies objects into a folder of this machine."""

    def get(path: epath.Path) -> None:
        _file_system().get_file(str(path), str(folder / path.name))

    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(get, files))


def _md5(path: pathlib.Path) -> str:
    """Of a file, as Google Cloud Storage writes it."""
    with path.open("rb") as file:
        return base64.b64encode(hashlib.file_digest(file, "md5").digest()).decode("ascii")


@functools.cache
def prepare() -> None:
    """Before anything asks a bucket: settings of the libraries that do."""
    import fsspec.config

    # etils would take TensorFlow's way where that is installed, which nobody has tried here.
    os.environ["EPATH_USE_TF"] = "false"
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # asks for a minute, and warns at each call
    # What tensorstore or another process has written has to be seen.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # tracebacks of what it also raises


def _file_system() -> Any:
    import fsspec

    return fsspec.filesystem("gcs")


@functools.cache
def _client() -> Any:
    from google.cloud import storage

    # Objects take no project, which credentials need not have; asked for none, the library would refuse them then.
    return storage.Client(project=os.environ.get("GOOGLE_CLOUD_PROJECT", "none"))


def _retry() -> Any:
    from google.cloud.storage.retry import DEFAULT_RETRY

    return DEFAULT_RETRY.with_timeout(_SECONDS_OF_RETRIES)


def _split(path: epath.Path) -> tuple[str, str]:
    bucket, _, name = str(path).removeprefix(SCHEME).partition("/")
    return bucket, name
