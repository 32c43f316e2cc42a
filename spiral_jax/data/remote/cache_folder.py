"""The folder of the cache: one process at a time, its bound, and which of its files may go."""

import fcntl
import io
import os
import sys
import threading
import weakref
from pathlib import Path

_DATA, _INDEX = ".data", ".index"
# A folder that several blobs of this process use is opened once, as the lock is the process's; it closes with the last.
_opened: "weakref.WeakValueDictionary[str, CacheFolder]" = weakref.WeakValueDictionary()
_opening = threading.Lock()
_said: set[str] = set()


class CacheFolder:
    """The cache's folder: its lock, its bound, and which of its files are in use.

    One process at a time, one object per process. Blobs of earlier runs stay until their room is needed.
    """

    @classmethod
    def open(cls, path: str, max_bytes: int) -> "CacheFolder | None":
        """The object for a folder, or None, said on stderr, if another process has it or it cannot be written."""
        with _opening:
            folder = _opened.get(path)
            if folder is None:
                try:
                    folder = _opened[path] = cls(path, max_bytes)
                except BlockingIOError:
                    _say_once(f"{path} is in use as the cache of another process; going on without one")
                    return None
                except OSError as error:
                    _say_once(f"{path} cannot be used as a cache ({error.strerror}); going on without one")
                    return None
            folder._bound(max_bytes)
            return folder

    def __init__(self, path: str, max_bytes: int):
        self._path = Path(path)
        self._path.mkdir(parents=True, exist_ok=True)
        # Held by the open file, and so for as long as this object lives, whatever becomes of the process.
        self._lock_file = open(self._path / "lock", "ab")
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock_file.close()
            raise
        self.lock = threading.RLock()
        self.is_full = False
        self._failed = False
        self._used = sum(_bytes_on_disk(file) for suffix in (_DATA, _INDEX) for file in self._path.glob(f"*{suffix}"))
        self._in_use: set[str] = set()
        self._max_bytes = max_bytes

    def _bound(self, max_bytes: int) -> None:
        """Sets the bound that whoever opens the folder last has given; a higher one makes room again."""
        with self.lock:
            if max_bytes > self._max_bytes and not self._failed:
                self.is_full = False
            self._max_bytes = max_bytes

    def add(self, blob: str, version: str, size: int, index_size: int) -> list[io.FileIO]:
        """Opens the two files of a version of a blob, and removes those of its other versions."""
        name = f"{blob}-{version}"
        with self.lock:
            for other in self._path.glob(f"{blob}-*{_DATA}"):
                if other.stem != name and other.stem not in self._in_use:
                    self._remove(other.stem)
            files = []
            for suffix, length in ((_DATA, size), (_INDEX, index_size)):
                path = self._path / (name + suffix)
                path.touch()  # also what says that it is in use
                file = open(path, "r+b", buffering=0)
                if os.fstat(file.fileno()).st_size != length:
                    file.truncate(0)  # of another layout, or cut short
                    file.truncate(length)
                files.append(file)
            if name not in self._in_use:
                # The index grows with the data, but not in order; its whole length is taken at once.
                self._used += max(index_size - _bytes_on_disk(self._path / (name + _INDEX)), 0)
                self._in_use.add(name)
            return files

    def take(self, num_bytes: int) -> int:
        """Takes room for some bytes; returns for how many there is. Call it with the lock held."""
        if self.is_full:
            return 0
        while self._used + num_bytes > self._max_bytes and self._remove_oldest():
            pass
        room = max(self._max_bytes - self._used, 0)
        self.is_full = room < num_bytes
        self._used += min(room, num_bytes)
        return min(room, num_bytes)

    def stop(self, error: OSError) -> None:
        """Takes no more from now on."""
        self._failed = True
        if not self.is_full:
            self.is_full = True
            _say_once(f"{self._path}: {error.strerror or error}; the cache stays as it is")

    def _remove_oldest(self) -> bool:
        """Removes what this process has not opened, the longest unused first."""
        others = [file for file in self._path.glob(f"*{_DATA}") if file.stem not in self._in_use]
        if not others:
            return False
        self._remove(min(others, key=lambda file: file.stat().st_mtime).stem)
        return True

    def _remove(self, name: str) -> None:
        for suffix in (_INDEX, _DATA):
            file = self._path / (name + suffix)
            if file.exists():
                self._used -= _bytes_on_disk(file)
                file.unlink()


def _bytes_on_disk(file: Path) -> int:
    return file.stat().st_blocks * 512


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        print(message, file=sys.stderr, flush=True)
