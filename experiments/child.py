"""Modules run as processes of their own, which end with the one that started them.

python -m experiments.child PARENT MODULE ARGUMENTS...
"""

import contextlib
import ctypes
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SAVED, HUNG = 42, 43
_PR_SET_PDEATHSIG = 1


class Killed(Exception):
    """A child that something outside ended, and that may go on."""


class ChildFailed(Exception):
    """A child that ended otherwise than with status 0; with its last words."""

    def __init__(self, status: int, words: str):
        super().__init__(words)
        self.status = status


class Stopped(Exception):
    """The runner was asked to stop."""

    def __init__(self, number: int):
        super().__init__(f"signal {number}")
        self.number = number


def run_module(arguments: Sequence[str], log: Path, environment: Mapping[str, str], look: Callable[[], None]) -> None:
    """Runs `python -m ARGUMENTS` to its end, in the folder of the repository.

    Args:
      arguments: the module, and what it is given.
      log: file that takes what it prints.
      environment: of the process.
      look: called every second; what it raises ends the process, which may save what it has.

    Raises:
      ChildFailed: it failed.
      Killed: something ended it.
    """
    with log.open("ab") as file:
        start = file.tell()
        child = subprocess.Popen(
            [sys.executable, "-u", "-m", "experiments.child", str(os.getpid()), *arguments], cwd=ROOT, env=environment,
            stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        while child.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(1)
            look()
    except BaseException:
        child.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(60)
        raise
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
    status = child.returncode
    if status == 0:
        return
    words = last_words(log, start)
    if status < 0 or status in (SAVED, HUNG) or status > 128:
        raise Killed(f"its process ended with status {status} ({words})")
    raise ChildFailed(status, words)


def last_words(log: Path, start: int = 0) -> str:
    """The line in which a child said what was wrong, or its last one."""
    with log.open("rb") as file:
        file.seek(start)
        lines = [line.strip() for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
    said = [line for line in lines if line.startswith(("error: ", "diverged: "))]
    return (said or lines or ["it said nothing"])[-1][:400]


if __name__ == "__main__":
    parent, module = int(sys.argv[1]), sys.argv[2]
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before this was known
        sys.exit(128 + signal.SIGKILL)
    sys.argv = sys.argv[2:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
