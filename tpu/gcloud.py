"""Runs gcloud: argument lists in, JSON out, and "there is no such thing" told apart from every other failure."""

import contextlib
import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

from spiral_jax.errors import SpiralError
from tpu.telling import tell

# Of names of flags and variables whose values nobody is to see.
_SECRET = re.compile(
    r"(?i)([\w.-]*(?:token|secret|password|passwd|credential|api_?key|_key)[\w.-]*\s*[=:]\s*)[^\s,'\"]+"
)
_SECRET_NAME = re.compile(r"(?i)(token|secret|password|passwd|credential|api_?key|_key$)")

# What an answer means, by the first that matches. gcloud prints either a status word, or the JSON of an operation that
# failed, which has google.rpc.Code as a number.
_KINDS = (
    ("exists", r"\bALREADY_EXISTS\b|\"code\": 6\b"),
    ("quota", r"(?i)\bquota (limit )?'|quota exceeded|exceeded quota"),
    ("capacity", r"\bRESOURCE_EXHAUSTED\b|\"code\": 8\b|no more capacity|(?i:insufficient (reserved )?capacity)"),
    ("denied", r"\b(PERMISSION_DENIED|UNAUTHENTICATED)\b|\"code\": (7|16)\b|do not currently have an active account"),
    ("invalid", r"\bINVALID_ARGUMENT\b|\"code\": 3\b|unrecognized arguments|Invalid value for \["),
)


class GcloudError(Exception):
    """A command that failed.

    Attributes:
      kind: `not_found` only where gcloud said so of the very resource; `exists`, `quota`, `capacity`, `denied`,
        `invalid`, or `unknown` (network, timeout, anything else), after which nobody knows what has happened.
    """

    def __init__(self, kind: str, line: str) -> None:
        super().__init__(line)
        self.kind = kind


Execute = Callable[[Sequence[str], float], tuple[int, str, str]]


def execute(arguments: Sequence[str], timeout: float) -> tuple[int, str, str]:
    """Runs a program to its end: exit status, output, errors.

    It has a session of its own, so that Ctrl-C reaches the launcher, which says what bills, and not a half-done create.

    Raises:
      subprocess.TimeoutExpired: it was ended.
      SpiralError: there is no such program.
    """
    try:
        child = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
    except FileNotFoundError:
        raise SpiralError(
            f"{arguments[0]} is not on PATH; allowed: an installed Google Cloud CLI (https://cloud.google.com/sdk)"
        ) from None
    try:
        out, err = child.communicate(timeout=timeout)
    except BaseException:
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        raise
    return child.returncode, out, err


@dataclasses.dataclass
class Gcloud:
    """The CLI, for one project.

    Attributes:
      project: empty in dry runs only, where it was not given.
      dry_run: print commands, and run none; each answers nothing, `{}` as JSON.
      say: where they are printed.
      execute: runs a program.
      clock: of Unix time.
      deadline: Unix time at which a command that still runs is ended.
      ran: whether a command has run: from then on, that there is no gcloud passes.
    """

    project: str = ""
    dry_run: bool = False
    say: Callable[[str], None] = tell
    execute: Execute = execute
    clock: Callable[[], float] = time.time
    deadline: float = float("inf")
    ran: bool = False

    def command(self, *arguments: str) -> list[str]:
        """The whole argument list. Flags come after positionals, and after `--` nothing is added."""
        project = [f"--project={self.project}"] if self.project else []
        return ["gcloud", *arguments, *project, "--quiet"]

    def run(self, *arguments: str, timeout: float = 300, resource: str = "") -> str:
        """Standard output of a command.

        Args:
          arguments: after `gcloud`.
          timeout: seconds, after which it is ended.
          resource: as in `nodes/NAME`, of which `not_found` is to speak.

        Raises:
          GcloudError: it failed.
        """
        command = self.command(*arguments)
        if self.dry_run:
            self.say(shown(command))
            return ""
        verb = " ".join(word for word in arguments[:6] if not word.startswith("-"))
        seconds = min(timeout, self.deadline - self.clock())
        if seconds <= 0:
            raise GcloudError("unknown", f"gcloud {verb}: no time is left for it")
        try:
            status, out, err = self.execute(command, seconds)
        except subprocess.TimeoutExpired:
            raise GcloudError("unknown", f"gcloud {verb}: no answer in {seconds:.0f} s") from None
        except (OSError, SpiralError) as error:  # no memory for a process, or gcloud is being updated
            if isinstance(error, SpiralError) and not self.ran:
                raise
            raise GcloudError("unknown", f"gcloud {verb}: it cannot be run ({error})") from None
        self.ran = True
        if status:
            raise GcloudError(kind_of(err, resource), redacted(f"gcloud {verb}: {_message(err) or f'status {status}'}"))
        return out

    def json(self, *arguments: str, resource: str = "") -> Any:
        """The answer of a command that reads.

        Raises:
          GcloudError: it failed, or what it printed is no JSON (then `unknown`).
        """
        out = self.run(*arguments, "--format=json", resource=resource)
        if self.dry_run:
            return {}
        try:
            return json.loads(out)
        except ValueError:
            raise GcloudError("unknown", f"gcloud {' '.join(arguments[:5])}: not JSON: {out[:100]!r}") from None


def configured_project(execute: Execute) -> str:
    """Of gcloud's own settings. A launch keeps to it, whatever they are later.

    Raises:
      SpiralError: it has none.
    """
    command = ["gcloud", "config", "get-value", "project", "--quiet"]
    try:
        _, out, _ = execute(command, 60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SpiralError(f"--project is missing, and {shown(command)} failed ({error}); allowed: its id") from None
    if not out.strip():
        raise SpiralError("--project is missing; allowed: its id, here or by `gcloud config set project`")
    return out.strip()


def kind_of(err: str, resource: str = "") -> str:
    """What the errors of a command mean, as in `GcloudError.kind`.

    A project or a zone that is not there is NOT_FOUND, too, and says nothing about the resource; so a message that
    names something else does not count.
    """
    if resource and re.search(r"\bNOT_FOUND\b", err):
        named = re.findall(r"projects/[^\s'\"?>,]+", err)
        return "not_found" if not named or any(name.endswith(resource) for name in named) else "unknown"
    return next((kind for kind, pattern in _KINDS if re.search(pattern, err)), "unknown")


def shown(command: Sequence[str]) -> str:
    """A command as it could be typed, without secrets."""
    return redacted(shlex.join(command))


def redacted(text: str) -> str:
    """Text in which values of secrets, those of the environment among them, are stars."""
    for name, value in os.environ.items():
        if len(value) >= 8 and _SECRET_NAME.search(name):
            text = text.replace(value, "***")
    return _SECRET.sub(r"\1***", text)


def _message(err: str) -> str:
    """The errors of gcloud in one line: from `ERROR:` on, or the last of them."""
    start = err.rfind("ERROR: ")
    return " ".join(err[max(start, 0) :].removeprefix("ERROR: ").split())[:400]
