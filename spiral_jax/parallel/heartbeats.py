"""Which of several processes are still there.

Every process counts up a number in jax's key-value store once a second. Process 0, which keeps the store, looks at all
numbers; the others look at whether it answers. jax has heartbeats of its own, but only process 0 learns from them which
process it is, after longer, and all are aborted.
"""

import concurrent.futures
import contextlib
import threading
import time
from collections.abc import Callable

import jax

from spiral_jax.parallel.processes import Processes

_SECONDS = 1.0  # between two beats
_SECONDS_OF_SILENCE = 5.0  # of a process that is not there any more, where there is another sign of that
_SECONDS_OF_A_STOP = 5.0  # a beat that comes so late is that of a process that did not run
_FOLDER = "spiral_jax/alive"


class Heartbeats:
    """Says that this process is there, and hears the others."""

    def __init__(self, processes: Processes, silence: float, gone: Callable[[int], None]):
        """Starts.

        Args:
          processes: of the run.
          silence: seconds after which a process that says nothing is gone.
          gone: called once with the number of such a process, on a thread.
        """
        self._processes, self._silence, self._gone = processes, silence, gone
        self._closed = threading.Event()
        others = range(1, processes.count) if processes.is_main else (0,)
        now = time.monotonic()
        self._heard = {other: now for other in others}  # when
        self._counts: dict[int, str] = {}
        for work in (self._talk, self._listen):
            threading.Thread(target=work, name=f"heartbeats: {work.__name__}", daemon=True).start()

    def close(self) -> None:
        """Says and hears nothing more."""
        self._closed.set()

    def find_silent(self) -> int | None:
        """A process that says nothing for a few seconds from now; None if all do."""
        asking = concurrent.futures.ThreadPoolExecutor(1)
        try:
            before = asking.submit(self._all_counts).result(_SECONDS_OF_SILENCE)
            time.sleep(_SECONDS_OF_SILENCE)
            after = asking.submit(self._all_counts).result(_SECONDS_OF_SILENCE)
        except (jax.errors.JaxRuntimeError, TimeoutError):
            return 0
        finally:
            asking.shutdown(wait=False)
        others = (other for other in range(self._processes.count) if other != self._processes.id)
        return next((other for other in others if before.get(other) == after.get(other)), None)

    def _talk(self) -> None:
        """In a thread of its own: an answer never comes while process 0 is stopped."""
        client, beats = self._processes.client, 0
        while not self._closed.wait(_SECONDS):
            beats += 1
            try:
                client.key_value_set(f"{_FOLDER}/{self._processes.id}", str(beats), allow_overwrite=True)
                counts = self._all_counts() if self._processes.is_main else {0: str(beats)}
            except jax.errors.JaxRuntimeError:
                continue  # it may be the network
            for other in self._heard:
                if counts.get(other) != self._counts.get(other):
                    self._heard[other] = time.monotonic()
            self._counts = counts

    def _listen(self) -> None:
        before = time.monotonic()
        while not self._closed.wait(_SECONDS):
            now = time.monotonic()
            stopped, before = now - before, now
            if stopped > _SECONDS_OF_A_STOP:
                for other in self._heard:
                    self._heard[other] += stopped
            silent = [other for other, heard in self._heard.items() if now - heard > self._silence]
            if silent and not self._closed.is_set():
                self._gone(silent[0])
                return

    def _all_counts(self) -> dict[int, str]:
        """The numbers of all processes that have said something."""
        found = {}
        for key, count in self._processes.client.key_value_dir_get(_FOLDER):
            with contextlib.suppress(ValueError):
                found[int(key.rpartition("/")[2])] = count
        return found
