"""Signals that ask a process to end.

Python runs a handler between two instructions of its main thread, which may be in a compilation for minutes, and the
KeyboardInterrupt of one that runs in a callback of jax is lost. So the handlers here do nothing: Python's own C code
writes the number of each signal to a socket, whatever the main thread does, and a thread reads it.
"""

import enum
import signal
import socket
import threading
import time
from collections.abc import Callable

from spiral_jax.parallel.leaving import End, end_at_once

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
SAVED = 42  # the status of what is saved but not finished
_NOTHING = "stopped with nothing to save"
_SECONDS_OF_REPEATS = 2.0  # a terminal, a launcher and a cluster may each send the one signal that is meant


def end_with_nothing_to_save() -> None:
    """While a program imports what it needs: signals end it, with the status that a `StopRequest` gives them."""
    for number in STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _frame: end_at_once(128 + number, _NOTHING))


class _Meaning(enum.Enum):
    """What a signal does now."""

    END = enum.auto()  # nothing can be saved: the process ends
    REQUEST = enum.auto()  # whoever can save reads `signal`
    SAVED = enum.auto()  # everything is saved: the process ends, and the same command goes on


class StopRequest:
    """In a `with` statement: signals end the process at once until `hold` is called, from then on they are a request.

    A signal that was ignored when the process started (`nohup`) stays ignored. Outside the main thread nothing is done.

    Attributes:
      signal: the one that asks the process to stop; None before it has come.
    """

    def __init__(self, end: End = end_at_once, continued: Callable[[], None] = lambda: None):
        """Hears nothing yet.

        Args:
          end: ends the process.
          continued: called when the process goes on after it was stopped (SIGSTOP, Ctrl-Z).
        """
        self.signal: int | None = None
        self._end, self._continued = end, continued
        self._meaning, self._asked, self._lock = _Meaning.END, 0.0, threading.Lock()

    def __enter__(self) -> "StopRequest":
        self._before: dict[int, Callable | int | None] = {}
        if threading.current_thread() is not threading.main_thread():
            return self
        self._numbers, written = socket.socketpair()
        written.setblocking(False)
        self._written, self._fd_before = written, signal.set_wakeup_fd(written.fileno())
        for number in (*STOPPING, signal.SIGCONT):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, lambda *_: None)
        threading.Thread(target=self._read, name="signals", daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        # After a request the process is about to end, with a status that a repeat of the signal must not change.
        if self._before and self.signal is None:
            signal.set_wakeup_fd(self._fd_before)
            for number, handler in self._before.items():
                if handler is not None:  # of C code, which Python cannot put back
                    signal.signal(number, handler)
            self._written.close()  # ends the thread

    def hold(self) -> None:
        """From here on something can be saved."""
        with self._lock:
            self._meaning = _Meaning.REQUEST

    @property
    def is_held(self) -> bool:
        """Whether `hold` was called."""
        return self._meaning is not _Meaning.END

    def saved(self, *, answered: bool = False) -> None:
        """From here on everything is saved. A request that nobody has `answered` ends the process."""
        with self._lock:
            self._meaning = _Meaning.SAVED
        if self.signal is not None and not answered:
            self._act(self.signal)

    def _read(self) -> None:
        while numbers := self._numbers.recv(64):
            for number in numbers:
                if number == signal.SIGCONT:
                    self._continued()
                elif number in self._before:
                    self._take(number)
        self._numbers.close()

    def _take(self, number: int) -> None:
        now = time.monotonic()
        with self._lock:
            if self.signal is None:
                self._asked = now
                if self._meaning is _Meaning.REQUEST:
                    self.signal = number
                    return
            elif now - self._asked < _SECONDS_OF_REPEATS:
                return
        self._act(number)

    def _act(self, number: int) -> None:
        match self._meaning:
            case _Meaning.END:
                self._end(128 + number, _NOTHING)
            case _Meaning.REQUEST:
                self._end(128 + number, "stopped again, before it was saved; the same command resumes")
            case _Meaning.SAVED:
                self._end(SAVED, "stopped, and everything is saved; the same command goes on")
