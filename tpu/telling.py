"""Lines for whoever watches."""

import contextlib
import os
import sys


def tell(line: str) -> None:
    """Prints a line now; where nobody reads any more, or the disk is full, whoever says it lives on.

    A launcher that died of what it says would leave behind what it was about to delete. What a pipe without a reader
    does not take goes to stderr, as does all that follows.
    """
    try:
        print(line, flush=True)
    except BrokenPipeError:
        for instead in (sys.stderr.fileno(), os.open(os.devnull, os.O_WRONLY)):
            os.dup2(instead, sys.stdout.fileno())
            with contextlib.suppress(OSError):
                print(line, flush=True)
                return
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            print(line, file=sys.stderr, flush=True)
