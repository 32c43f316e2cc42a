"""Several processes as one run: process 0 prints and writes, and the others take its word.

Words go through the key-value store that jax's coordinator keeps on process 0. `jax.experimental.multihost_utils` has a
broadcast, a barrier and an `assert_equal`, too, but they are computations on all devices: of arrays that have one shape
everywhere, without a line while process 0 prepares data for hours, and without a way out when another process fails.
"""

import contextlib
import dataclasses
import itertools
import json
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import jax
from flax.traverse_util import flatten_dict

from spiral_jax.errors import SpiralError
from spiral_jax.parallel.coordinator import CoordinatorLost

_LONG_MS = 7 * 24 * 3600 * 1000  # a process that dies ends such a wait: the coordinator misses its heartbeats
_SECONDS_TO_SEE_A_FILE = 10.0  # network file systems cache directories
_SECONDS_BETWEEN_LINES = 60


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes of a run, as one of them sees them. All of them make the same calls in the same order.

    Attributes:
      id: which one this is, from 0.
      count: how many there are.
      client: of jax's key-value store; None where there is one process.
      lost: what jax calls when process 0 is gone; None where there is one process.
    """

    id: int = 0
    count: int = 1
    client: Any = None
    lost: CoordinatorLost | None = None

    @property
    def several(self) -> bool:
        return self.count > 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.id == 0

    def say(self, line: str, file: TextIO | None = None) -> None:
        """Prints on process 0 alone, on stdout unless told otherwise."""
        if self.is_main:
            print(line, file=file, flush=True)

    def from_main(self, what: str, make: Callable[[], Any]) -> Any:
        """What `make` returns on process 0, on every process; the others wait for it as long as it takes.

        Args:
          what: what is waited for, in a word or two.
          make: called on process 0 alone; returns JSON values.
        """
        if not self.several:
            return make()
        key = self.key(what)
        if self.is_main:
            value = make()
            self.client.key_value_set(key, json.dumps(value))
            return value
        return self._said(key, 0, what)

    def first_of(self, what: str, value: Any) -> Any:
        """The value of the first process that has one, on every process; None if none has.

        Args:
          what: as for `from_main`.
          value: of this process: JSON, or None.
        """
        if not self.several:
            return value
        key = self.key(what)
        self.client.key_value_set(f"{key}/{self.id}", json.dumps(value))
        values = [self._said(f"{key}/{process}", process, what) for process in range(self.count)]
        return next((value for value in values if value is not None), None)

    def _said(self, key: str, process: int, what: str) -> Any:
        """The value of a key that a process is to set."""
        for seconds in itertools.count(1):
            # By the second: Python sees Ctrl-C only between two calls.
            if (text := self.get(key, seconds=1)) is not None:
                return json.loads(text)
            if seconds % _SECONDS_BETWEEN_LINES == 0:
                line = f"process {self.id}: waiting for process {process}: {what} ({seconds} s)"
                print(line, file=sys.stderr, flush=True)

    def barrier(self, what: str) -> None:
        """Returns when every process has come here."""
        if self.several:
            self.client.wait_at_barrier(self.key(what), _LONG_MS)

    def check_same_config(self, config: Mapping[str, Any]) -> None:
        """Whether every process was given the configuration of process 0: others would hang in their first collective.

        Raises:
          SpiralError: naming the field that differs.
        """
        as_json = json.loads(json.dumps(config))  # tuples as lists
        theirs = flatten_dict(self.from_main("configuration", lambda: as_json), sep=".")
        ours = flatten_dict(as_json, sep=".")
        for field in sorted(theirs.keys() | ours.keys()):
            if theirs.get(field) != ours.get(field):
                raise SpiralError(
                    f"{field} is {ours.get(field)!r} on process {self.id}; allowed: the same on every process "
                    f"({theirs.get(field)!r})"
                )

    def check_shared(self, folder: Path, flag: str) -> None:
        """Whether all processes see the same folder.

        Raises:
          SpiralError: naming `flag`.
        """
        if not self.several:
            return
        file = folder / ".shared"

        def write() -> str:
            word = uuid.uuid4().hex
            file.write_text(word, encoding="utf-8")
            return word

        word = self.from_main(flag, write)
        deadline = time.monotonic() + _SECONDS_TO_SEE_A_FILE
        while not (file.exists() and file.read_text(encoding="utf-8") == word):
            if time.monotonic() > deadline:
                raise SpiralError(
                    f"{flag} is '{folder}', which process {self.id} does not share with process 0; "
                    "allowed: the same folder on a file system that all processes see"
                )
            time.sleep(0.1)
        self.barrier("folder seen")
        if self.is_main:
            with contextlib.suppress(FileNotFoundError):  # by a first try whose answer a bucket has lost
                file.unlink()

    def key(self, what: str) -> str:
        """A key that is new, and the same on every process: each counts its calls, in the store itself."""
        number = self.client.key_value_increment(f"spiral_jax/keys_of_process/{self.id}", 1)
        return f"spiral_jax/{number}/{what}"

    def get(self, key: str, seconds: float) -> str | None:
        """A key's value once it has one; None if it has none for so long."""
        try:
            return self.client.blocking_key_value_get(key, int(1000 * seconds))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            return None


ALONE = Processes()
