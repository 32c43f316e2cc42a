"""JSON lines on a bucket, where nothing can be appended: a part every now and then."""

import json
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from etils.epath import Path

from spiral_jax.data.bucket import is_trouble, reason

SECONDS_OF_A_PART = 30.0
ATTEMPTS = 5  # where rows are not to be lost: each takes the libraries half a minute if the bucket does not answer
_SECONDS_BETWEEN_ATTEMPTS = 1.0


class RowParts:
    """Rows as objects FOLDER/<first step>.jsonl. Those that the bucket refuses are kept, and go into the next attempt.

    Attributes:
      failure: of the last attempt; None if it was none.
    """

    def __init__(self, folder: Path, check: Callable[[], None] = lambda: None):
        """Starts the thread that writes; `check` is called before each write, which it may prevent."""
        self.failure: str | None = None
        self._folder, self._check = folder, check
        self._unwritten: list[tuple[int, bytes]] = []  # steps and lines
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._write_now_and_then, name="metrics", daemon=True)
        self._thread.start()

    def write(self, row: Mapping[str, Any]) -> None:
        """Takes one row of JSON values, with its `step`."""
        self._unwritten.append((row["step"], json.dumps(row, allow_nan=False).encode() + b"\n"))

    @property
    def num_unwritten(self) -> int:
        """Rows that are kept."""
        return len(self._unwritten)

    def flush(self, attempts: int = 1) -> None:
        """Writes what there is; with several attempts, the bucket's libraries have given up so many times."""
        for attempt in range(attempts):
            if attempt:
                time.sleep(_SECONDS_BETWEEN_ATTEMPTS)
            self._write()
            if self.failure is None:
                break

    def _write(self) -> None:
        with self._lock:
            rows = list(self._unwritten)
            if not rows:
                return
            self._check()
            try:
                part = self._folder / f"{rows[0][0]:09}.jsonl"
                part.write_bytes(b"".join(line for _, line in rows))
            except Exception as error:
                if not is_trouble(error):
                    raise
                self.failure = reason(error)
                return
            del self._unwritten[: len(rows)]
            self.failure = None

    def close(self) -> None:
        self._closed.set()
        self.flush()

    def _write_now_and_then(self) -> None:
        while not self._closed.wait(SECONDS_OF_A_PART):
            self.flush()
