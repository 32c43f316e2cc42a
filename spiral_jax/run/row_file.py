"""A file of JSON lines on a disk that may be full for a while."""

import contextlib
import json
from collections.abc import Mapping
from typing import Any

from etils.epath import Path


class RowFile:
    """Appends rows. Those that the disk refuses are kept, and written before the next one when it takes them."""

    def __init__(self, path: Path):
        """Opens `path`, behind what is there."""
        self.failure: str | None = None  # of the last write
        opened: Any = path.open("ab")
        self._file = opened.detach()  # not buffered: it is known to the byte what has been written
        self._unwritten = b""

    def write(self, row: Mapping[str, Any]) -> None:
        """Writes one row of JSON values, or keeps it."""
        self._unwritten += json.dumps(row, allow_nan=False).encode() + b"\n"
        self._drain()

    @property
    def num_unwritten(self) -> int:
        """Rows that are kept."""
        return self._unwritten.count(b"\n")

    def close(self) -> None:
        self._drain()
        with contextlib.suppress(OSError):
            self._file.close()

    def _drain(self) -> None:
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
            self.failure = None
        except OSError as error:
            self.failure = error.strerror or str(error)
