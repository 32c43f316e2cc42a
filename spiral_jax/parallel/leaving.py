"""How a process ends that cannot wait for Python's usual way out."""

import contextlib
import os
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

End = Callable[[int, str], None]  # ends the process with a status and a line
HUNG = 43  # the status of a process that did not get on, or lost another one
_SECONDS_TO_PRINT = 2.0


def end_at_once(status: int, line: str = "") -> NoReturn:
    """Ends this process, on any thread, without the usual way out, on which jax would wait for the others, or complain.

    Args:
      status: the exit status.
      line: for stderr; "" for none.
    """

    def last_words() -> None:
        with contextlib.suppress(Exception):
            if line:
                print(line.rstrip(), file=sys.stderr, flush=True)
            sys.stdout.flush()

    # A reader of ours that has stopped must not keep the process.
    printing = threading.Thread(target=last_words, daemon=True)
    printing.start()
    printing.join(_SECONDS_TO_PRINT)
    os._exit(status)
