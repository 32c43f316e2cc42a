"""A disk that is full when a test wants it to be: a tmpfs of its own."""

import contextlib
import errno
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


class Disk:
    """A mounted file system of a few MB, and a file in it that takes the room."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._filler = folder / "filler"

    def leave(self, size: int) -> None:
        """Leaves as many bytes, to the page."""
        self.free()
        room = shutil.disk_usage(self.folder).free - size
        with self._filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while room > 0:
                room -= file.write(bytes(min(room, 1 << 16)))

    def free(self) -> None:
        self._filler.unlink(missing_ok=True)

    def used(self) -> int:
        return shutil.disk_usage(self.folder).used


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Disk]:
    """Mounts one; skips the test where that is not permitted."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted: {mounted.stderr.decode().strip()}")
    try:
        disk = Disk(folder)
        disk.leave(0)
        with pytest.raises(OSError) as error, (folder / "full").open("wb", buffering=0) as file:
            file.write(bytes(1 << 16))
        assert error.value.errno == errno.ENOSPC
        (folder / "full").unlink()
        disk.free()
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
