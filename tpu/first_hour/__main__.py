"""One TPU chip, twenty minutes, one JSON file: whether what this package assumes of TPUs is true of a real one.

python -m tpu.first_hour --workdir=gs://BUCKET/first_hour --output=first_hour.json
python -m tpu.first_hour --compare=first_hour.json

Any host with a TPU will do; one chip of it is used. Each section runs in a process of its own, and none needs another.
Nobody has run this on a TPU yet: send the file back, whatever is in it. Without a TPU it is a rehearsal on the CPU, at
tiny sizes, which takes a minute or two. The file is written anew after every section; what is in it, schema.json in
this folder says.

Exit status: 0 all sections ran and all checks passed; 1 a section broke down or a check failed; 2 no device, or a wrong
flag; 42 all that ran passed, but not all ran, for lack of time; 128 + signal if stopped. --compare: 0 if everything was
as expected, 1 if not.
"""

import argparse
import contextlib
import importlib.metadata
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from spiral_jax.data import atomic
from spiral_jax.data.storage import reachable_path
from spiral_jax.errors import SpiralError, escape_unprintable
from tpu.first_hour import compare
from tpu.first_hour.agenda import SECTIONS, SIZES, Section

FORMAT = 1
REPOSITORY = Path(__file__).resolve().parents[2]
PREDICTIONS = Path(__file__).with_name("predictions.json")
# A section is ended after this many times the seconds that it should take.
PATIENCE = 4
# The process before has ended, and the driver may not have noticed yet.
BUSY = "Unable to initialize backend 'tpu'|already in use|resource busy"
TRIES, SECONDS_TO_FREE = 4, 10.0


class Stopped(Exception):
    """A signal asked for an end."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        sys.exit(_usage(message))


def parser() -> Parser:
    """The flags."""
    made = Parser(prog="python -m tpu.first_hour", description=__doc__, allow_abbrev=False,
                  formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    made.add_argument("--output", default="first_hour.json", help="file to write")
    made.add_argument("--workdir", default="", help="folder or gs://BUCKET/... for a checkpoint; else a temporary one")
    made.add_argument("--minutes", type=_minutes, default=20.0, help="what is not done by then is skipped, and said so")
    made.add_argument("--size", choices=("auto", *SIZES), default="auto", help="auto: full on a TPU, else tiny")
    made.add_argument("--sections", type=_sections, default=SECTIONS, help="some of them, as in attention,decoding")
    made.add_argument(
        "--compare", default="", metavar="FILE", help="a file to compare with what was predicted; runs nothing"
    )
    made.add_argument("--predictions", default=str(PREDICTIONS), help="with --compare: file with what was predicted")
    return made


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    escape_unprintable()
    flags = parser().parse_args(argv)
    if flags.compare:
        try:
            return compare.main(flags.compare, flags.predictions)
        except OSError as error:
            found = f"{error.filename} cannot be read ({error.strerror})"
            return _usage(f"--compare: {found}; allowed: a file that --output made")
        except ValueError as error:
            return _usage(f"--compare: {error}")
    output = Path(os.path.expanduser(flags.output)).resolve()
    if output.is_dir() or not os.access(output.parent, os.W_OK):
        return _usage(f"--output is {flags.output!r}; allowed: a file in a folder that can be written to")
    if flags.workdir:
        try:
            reachable_path("--workdir", flags.workdir)
        except SpiralError as error:
            return _usage(str(error))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop)
    with tempfile.TemporaryDirectory() as scratch:
        return Hour(flags, output, scratch).run()


class Hour:
    """One run of all sections."""

    def __init__(self, flags: argparse.Namespace, output: Path, scratch: str):
        self._flags, self._output, self._scratch = flags, output, Path(scratch)
        self._workdir = flags.workdir or scratch
        self._began = time.monotonic()
        self._found: dict[str, Any] = {
            "format": FORMAT,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "minutes": flags.minutes,
            "size": flags.size,
            "commit": _commit(),
            "sections": {},
        }

    def run(self) -> int:
        """Runs what fits, and returns the exit status."""
        wanted = self._flags.sections
        device = SECTIONS[0]  # always: it says what the other numbers are of, and which size to take
        stopped = None
        try:
            size = self._flags.size
            found = self._section(device, "tiny" if size == "auto" else size)
            if found["status"] == "broken":
                return _usage(f"no device ({found['why']}); allowed: a TPU that no other process uses, or no TPU")
            if size == "auto":
                size = "full" if found["measured"]["platform"] == "tpu" else "tiny"
            self._found["size"] = size
            for section in wanted:
                if section is device:
                    continue
                if self._left() < section.seconds(size):
                    why = f"{section.seconds(size):.0f} s at least, and {_clock(self._left())} are left"
                    self._keep(section, {"status": "skipped", "why": why})
                    self._say(f"{section.name}: skipped ({why})")
                else:
                    self._section(section, size)
        except Stopped as error:
            stopped = error
            for section in wanted:
                if section.name not in self._found["sections"]:
                    self._keep(section, {"status": "skipped", "why": f"stopped by {error}"})
        status = self._status(stopped)
        self._found["exit_status"] = status
        self._write()
        self._say(f"wrote {self._output}" + ("; send it back" if self._found["size"] == "full" else ""))
        return status

    def _status(self, stopped: Stopped | None) -> int:
        found = [section["status"] for section in self._found["sections"].values()]
        counts = ", ".join(f"{found.count(status)} {status}" for status in dict.fromkeys(found))
        self._say(f"sections: {counts}")
        if stopped is not None:
            return stopped.status
        if {"failed", "broken"} & set(found):
            return 1
        return 42 if "skipped" in found else 0

    def _section(self, section: Section, size: str) -> dict[str, Any]:
        """Runs a section in its process, and returns what is kept of it."""
        limit, began = _limit(section, size, self._left()), time.monotonic()
        self._say(f"{section.name}: about {section.seconds(size):.0f} s, {limit:.0f} s at most")
        for tries in range(1, TRIES + 1):
            found = self._try(section, size, limit)
            is_busy = found["why"] and re.search(BUSY, "\n".join(found["log"]))
            if not is_busy or tries == TRIES or self._left() < SECONDS_TO_FREE + section.seconds(size):
                break
            self._say(f"{section.name}: the chip is not free yet ({found['why']}), tried again")
            time.sleep(SECONDS_TO_FREE)
        found["tries"] = tries
        is_ok = all(check["ok"] for check in found["checks"])
        found["status"] = "broken" if found["why"] else "passed" if is_ok else "failed"
        found["seconds"] = round(time.monotonic() - began, 1)
        self._keep(section, found)
        self._say(f"{section.name}: {found['status']}" + (f" ({found['why']})" if found["why"] else ""))
        return found

    def _try(self, section: Section, size: str, limit: float) -> dict[str, Any]:
        """What a process of its own found, and why it did not end well."""
        result, log = self._scratch / f"{section.name}.json", self._scratch / f"{section.name}.log"
        result.unlink(missing_ok=True)
        why, found = "", dict[str, Any]({"checks": [], "measured": {}, "why": ""})
        command = [sys.executable, "-m", "tpu.first_hour.section", section.name, size, self._workdir, str(result)]
        with open(log, "wb") as errors, _child(command, errors, self._scratch / "compiled") as child:
            lines = threading.Thread(target=self._forward, args=(section.name, child.stdout), daemon=True)
            lines.start()
            try:
                status = child.wait(limit)
            except subprocess.TimeoutExpired:
                status, why = None, f"not done after {limit:.0f} s"
        lines.join(1)
        if result.exists():
            found = json.loads(result.read_text(encoding="utf-8"))
        if status and not found["why"]:
            signalled = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
            why = f"its process ended {signalled}"
        found["why"] = why or found["why"]
        if found["why"]:
            found["log"] = log.read_text(encoding="utf-8", errors="replace").splitlines()[-30:]
        return found

    def _forward(self, name: str, lines: Any) -> None:
        for line in lines:
            self._say(f"{name}: {line.rstrip()}")

    def _keep(self, section: Section, found: dict[str, Any]) -> None:
        self._found["sections"][section.name] = {"checks": [], "measured": {}, "seconds": 0.0} | found
        self._write()

    def _write(self) -> None:
        """The file as it is so far, whole at any time."""
        self._found["seconds"] = round(time.monotonic() - self._began, 1)
        atomic.write_text(self._output, json.dumps(self._found, indent=1) + "\n")

    def _left(self) -> float:
        return 60 * self._flags.minutes - (time.monotonic() - self._began)

    def _say(self, line: str) -> None:
        print(f"[{_clock(time.monotonic() - self._began)}, {_clock(self._left())} left] {line}", flush=True)


@contextlib.contextmanager
def _child(command: list[str], errors: Any, cache: Path) -> Iterator[subprocess.Popen]:
    """A process that is gone afterwards, with its own.

    Args:
      command: to run.
      errors: file for its stderr.
      cache: folder for what a rehearsal compiles several times.
    """
    environment = dict(os.environ)
    if _has_tpu():
        # Else jax passes over a TPU that it cannot use, and takes the CPU.
        given = environment.get("JAX_PLATFORMS", "") or "tpu"
        environment["JAX_PLATFORMS"] = given if "cpu" in given.split(",") else f"{given},cpu"
    else:
        # Interpreted kernels call Python from XLA's threads: on a machine with one core they would wait for each other.
        environment.setdefault("NPROC", "8")
        # Most of a rehearsal is compiling.
        environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
        quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
        environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {quick}".strip()
    child = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=errors,
                             encoding="utf-8", errors="replace", start_new_session=True)  # fmt: skip
    try:
        yield child
    finally:
        for number, seconds in ((signal.SIGTERM, 10), (signal.SIGKILL, 30)):
            if child.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(seconds)


def _limit(section: Section, size: str, left: float) -> float:
    """Seconds after which a section is ended: long before, it hangs."""
    return min(left, max(300, PATIENCE * section.seconds(size)))


def _has_tpu() -> bool:
    """Whether this host has a TPU and the library for it."""
    chips = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
    try:
        return bool(chips) and bool(importlib.metadata.version("libtpu"))
    except importlib.metadata.PackageNotFoundError:
        return False


def _stop(number: int, frame: Any) -> None:
    signal.signal(number, signal.SIG_IGN)  # once is enough
    raise Stopped(number)


def _usage(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def _commit() -> str:
    """Of the code, with `-dirty` where it was changed; empty where git does not say."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(
            command, cwd=REPOSITORY, capture_output=True, encoding="utf-8", errors="replace", check=True
        ).stdout.strip()
    return ""


def _clock(seconds: float) -> str:
    return f"{max(0, seconds) // 60:.0f}m{max(0, seconds) % 60:02.0f}s"


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not 0 < minutes < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; allowed: a positive number of minutes")
    return minutes


def _sections(text: str) -> tuple[Section, ...]:
    names = text.split(",")
    for name in names:
        if name not in [section.name for section in SECTIONS]:
            allowed = ", ".join(section.name for section in SECTIONS)
            raise argparse.ArgumentTypeError(f"{name!r} is no section; allowed: {allowed}")
    return tuple(section for section in SECTIONS if section.name in names)


if __name__ == "__main__":
    sys.exit(main())
