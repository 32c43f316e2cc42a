"""Several processes end together: with the status, and the last line, of the one that failed first.

A process that fails says so in jax's key-value store before it ends, and a thread of each of the others waits for just
that: nobody is left in a collective. A process that can say nothing any more is missed by its heartbeats. jax alone
would miss it after 100 seconds, and abort the others without saying which it was.
"""

import contextlib
import json
import os
import sys
import threading
import time
from typing import NoReturn

import jax

from spiral_jax.parallel.heartbeats import Heartbeats
from spiral_jax.parallel.leaving import HUNG, end_at_once
from spiral_jax.parallel.processes import Processes

_SECONDS_FOR_OTHERS = 5.0  # that process 0, which is the coordinator, outlives a failure
_SECONDS_TO_END = 1.0
_SECONDS_FOR_THE_CAUSE = 2.0
_SECONDS_AT_MOST = 15.0  # for all of it: the store may be gone


class Ending:
    """How this process ends with the others; does nothing where there are none."""

    def __init__(self, processes: Processes, silence: float = 60.0):
        """Starts to listen to the others; one that says nothing for so many seconds is gone, which ends all."""
        self._processes = processes
        self._lock = threading.Lock()  # taken by whichever thread ends this process, and never given back
        if processes.several:
            self._failure = processes.key("failure")  # of the first process that failed; "{}" when all have finished
            self._watcher = threading.Thread(target=self._watch, name="failures of other processes", daemon=True)
            self._watcher.start()
            self._heartbeats = Heartbeats(processes, silence, self.lost)
            if processes.lost is not None:
                processes.lost.act = self._lost_by_jax

    def finish(self) -> None:
        """Waits until every process has done its work; until then the failure of any of them still ends all."""
        if not self._processes.several:
            return
        self._processes.barrier("finished")
        self._heartbeats.close()
        if self._processes.is_main:
            self._tell({})
        self._watcher.join(_SECONDS_FOR_OTHERS)

    def leave(self, status: int, text: str, *, expected: bool) -> None:
        """Ends one of several processes and, with its last words, the others; returns where it is the only one.

        Args:
          status: the exit status, of all of them.
          text: for stderr; its last line is what the others print.
          expected: whether the cause is known to be here. Else a failure of another process, or its death, may have led
            to this one: if so, its news comes first, and ends this process.
        """
        if not self._processes.several:
            return
        if not expected:
            time.sleep(_SECONDS_FOR_THE_CAUSE)
            silent = self._heartbeats.find_silent()
            if silent is not None:
                self.lost(silent)
        self._lock.acquire()
        self._end_with_others(status, text)

    def at_once(self, status: int, line: str) -> None:
        """Ends this process, on any thread, and the others if there are any."""
        self.leave(status, line, expected=True)
        self.alone(status, line)

    def alone(self, status: int, line: str) -> None:
        """Ends this process, on any thread, without a word to the others."""
        self._lock.acquire()
        end_at_once(status, line)

    def lost(self, process: int) -> None:
        """Ends this process, as another one is gone, and the others that are not."""
        self._lock.acquire()
        line = f"error: process {process} is gone; the same command resumes"
        if process == 0:  # and the store with it, in which the others would be told
            end_at_once(HUNG, line)
        self._end_with_others(HUNG, line)

    def _lost_by_jax(self) -> None:
        """jax has lost process 0; there, it does not say which."""
        if not self._processes.is_main:
            self.lost(0)
        self.at_once(HUNG, "error: another process is gone; the same command resumes")

    def _end_with_others(self, status: int, text: str) -> NoReturn:
        self._in_time(status, text)
        line = text.strip().splitlines()[-1].removeprefix("error: ")
        self._tell({"status": status, "line": f"error: process {self._processes.id}: {line}"})
        self._end(status)

    def _tell(self, failure: dict[str, int | str]) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another one was first
            self._processes.client.key_value_set(self._failure, json.dumps(failure))

    def _watch(self) -> None:
        """Ends this process when another one has failed; this one may be in a collective that never returns."""
        try:
            while (text := self._processes.get(self._failure, seconds=3600)) is None:
                pass
        except jax.errors.JaxRuntimeError:
            return  # the coordinator is gone, which the heartbeats notice
        if failure := json.loads(text):
            self._lock.acquire()
            self._in_time(failure["status"], failure["line"])
            self._end(failure["status"])

    def _in_time(self, status: int, text: str) -> None:
        """Prints the last words, and sees to it that they are the last."""
        with contextlib.suppress(Exception):
            print(text.rstrip(), file=sys.stderr, flush=True)
        self._heartbeats.close()
        timer = threading.Timer(_SECONDS_AT_MOST, os._exit, (status,))
        timer.daemon = True
        timer.start()

    def _end(self, status: int) -> NoReturn:
        """Ends this process, the coordinator last: jax aborts a process that outlives it."""
        processes = self._processes
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            processes.client.key_value_set(f"{self._failure}/seen/{processes.id}", "")
            deadline = time.monotonic() + _SECONDS_FOR_OTHERS
            for other in range(1, processes.count) if processes.is_main else ():
                processes.get(f"{self._failure}/seen/{other}", max(0.01, deadline - time.monotonic()))
            if processes.is_main:
                time.sleep(_SECONDS_TO_END)  # they have said so, and now end
        end_at_once(status)
