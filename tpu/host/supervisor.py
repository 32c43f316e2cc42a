"""Runs the job on one host, so that neither a dropped ssh nor a launcher that has died ends it.

python3 -m tpu.host.supervisor --root=gs://BUCKET/NAME --attempt=3                detaches
python3 -m tpu.host.supervisor --root=gs://BUCKET/NAME --attempt=3 --foreground   for a container: has the job's status
python3 -m tpu.host.supervisor --root=gs://BUCKET/NAME --end=30                   ends the one that runs

It needs Python 3.10 and its standard library. What it runs stands in attempts/000N/job.json; what becomes of it, in
host-I.json beside that (tpu/host/report.py).
"""

import argparse
import collections
import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
import traceback
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from spiral_jax.errors import SpiralError
from tpu.bucket import Bucket
from tpu.host import machine
from tpu.host.report import Reporter, Spool, attempt_folder

CODE = Path(__file__).resolve().parents[2]
HOME = Path.home() / "spiral_jax"
LOCK = HOME / "supervisor.json"
SETUP_SECONDS, READY_SECONDS, SMOKE_SECONDS, FREE_SECONDS = 1800.0, 1800.0, 300.0, 20.0
FILES = 100_000  # that tensorstore and the loaders may have open
PATIENCE = 330.0  # with the supervisor of an earlier attempt, whose job saves
LOST = 43  # the launcher starts the job again, and counts a failure
NOT_FAILURES = (0, 42)
_LATE = "not done after"
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


class Exit(NamedTuple):
    """How something ended: its status (128 + n by signal n), whether that was a signal, a line, the kernel's lines."""

    status: int
    signal: bool = False
    line: str = ""
    kernel: tuple[str, ...] = ()


class Supervisor:
    """One attempt on this host."""

    def __init__(self, bucket: Bucket, attempt: int, plan: dict, host: int):
        self._plan, self._host, self._hosts = plan, host, plan["hosts"]
        self._bucket, self._folder = bucket, attempt_folder(attempt)
        spools = HOME / "logs" / urllib.parse.quote(bucket.url, safe="")
        spool = Spool(bucket, f"{self._folder}/logs/host-{host}", spools / f"{attempt:04d}-{host}.txt")
        self._left = [path for path in sorted(spools.glob("*.txt")) if path != spool.path]
        self._reporter = Reporter(bucket, attempt, host, spool, plan["seconds"])
        self._environment = HOME / "venv" / hashlib.sha256((CODE / "tpu/lock.txt").read_bytes()).hexdigest()[:16]
        self._free_seconds = min(FREE_SECONDS, plan["stop_seconds"])
        self._terminated = False

    def run(self) -> int:
        """The exit status of the attempt on this host."""
        signal.signal(signal.SIGTERM, self._terminate)
        with self._reporter as reporter:
            reporter.say(code=self._plan["code"])
            self._send_what_was_left()
            try:
                machine.free(self._free_seconds)
                end = self._phases()
            except Exception as error:  # a bucket that is silent for too long, a disk that is full, a mistake here
                traceback.print_exc()
                end = Exit(LOST, line=f"supervisor: {type(error).__name__}: {error}")
            now = time.time()
            with contextlib.suppress(SpiralError):  # then host-I.json says so, as soon as the bucket answers
                reporter.claim_first_exit(**end._asdict(), time=now, phase=reporter.state["phase"])
            reporter.say(state="ended", first_exit=now, **end._asdict())
        return end.status

    def _phases(self) -> Exit:
        python, setup = str(self._environment / "bin/python"), str(CODE / "tpu/host/setup.sh")
        line = self._test("set-up", ["bash", setup, "environment", str(self._environment)], SETUP_SECONDS)
        if not line and not self._why_end():
            self._reporter.say(state="testing", phase="testing")
            line = self._agree() or self._test("smoke test", [python, *self._plan["smoke"]], SMOKE_SECONDS)
        if line:
            return Exit(LOST, line=line)
        if why := self._why_end():
            return Exit(143, line=f"{why}, before the job ran")
        if not self._plan["argv"]:
            return Exit(0)
        self._reporter.say(state="running", phase="running")
        return self._child([python, *self._plan["argv"]])

    def _test(self, what: str, command: Sequence[str], seconds: float) -> str:
        """What went wrong with a program that comes before the job; nothing if it was ended, too."""
        if self._why_end():
            return ""
        end = self._child(command, seconds)
        return f"{what}: {end.line}" if end.status and not self._why_end() else ""

    def _agree(self) -> str:
        """Waits until all hosts are set up; what is wrong with which of them, or nothing."""
        mine = json.dumps(machine.versions(self._environment, CODE))
        self._reporter.say(versions=json.loads(mine))
        digest, ready = hashlib.sha256(mine.encode()).hexdigest()[:16], f"{self._folder}/ready/"
        self._bucket.put(f"{ready}{self._host}-{digest}", mine.encode())
        found: dict[int, str] = {}

        def all_here() -> bool:
            # The names alone say enough: one question, however many hosts there are.
            names = [o.name.removeprefix(ready).split("-") for o in self._bucket.list(ready)]
            found.update({int(host): digest for host, digest in names})
            return len(found) >= self._hosts or bool(self._why_end())

        machine.wait_until(all_here, READY_SECONDS, every=min(2.0, self._plan["seconds"]))
        missing = [str(host) for host in range(self._hosts) if host not in found]
        if missing and self._why_end():
            return ""
        if missing:
            return f"smoke test: host {', '.join(missing)} is not set up {READY_SECONDS:.0f} s after this one"
        usual = collections.Counter(found[host] for host in sorted(found)).most_common(1)[0][0]
        one_with = {digest: host for host, digest in found.items()}
        versions = {digest: self._bucket.read(f"{ready}{host}-{digest}") or {} for digest, host in one_with.items()}
        differing = [
            f"host {host} has {name} {versions[digest].get(name)}, others {versions[usual].get(name)}"
            for host, digest in sorted(found.items())
            for name in sorted({*versions[digest], *versions[usual]})
            if versions[digest].get(name) != versions[usual].get(name)
        ]
        return f"smoke test: {'; '.join(differing)}" if differing else ""

    def _child(self, command: Sequence[str], seconds: float = float("inf")) -> Exit:
        """Runs a program to its end, or ends it: first SIGTERM, then SIGKILL."""
        spool, began = self._reporter.spool, self._reporter.spool.size()
        variables = os.environ | {"PYTHONPATH": str(CODE), "PYTHONUNBUFFERED": "1"} | self._plan["env"]
        deadline, asks_at, kills_at = time.monotonic() + seconds, float("inf"), float("inf")
        asked = ""  # why it was asked to end
        child = subprocess.Popen(command, cwd=CODE, env=variables, start_new_session=True, preexec_fn=_end_with_parent,
                                 stdin=subprocess.DEVNULL, stdout=spool.file, stderr=spool.file)  # fmt: skip
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(0.2)
                break
            now, why = time.monotonic(), self._why_end()
            if now > deadline:
                why = f"{_LATE} {seconds:.0f} seconds"
            if why:
                # A job that lost another ends by itself, and knows best how.
                asks_at = min(asks_at, now + (self._plan["grace"] if why.startswith("host ") else 0))
            if not asked and now >= asks_at:
                spool.note(f"{why}: SIGTERM")
                self._reporter.say(state="stopping")
                machine.send(child.pid, signal.SIGTERM)
                asked, kills_at = why, now + self._plan["stop_seconds"]
            if now > kills_at:
                spool.note(f"has not ended {self._plan['stop_seconds']:.0f} seconds after SIGTERM: SIGKILL")
                machine.send(child.pid, signal.SIGKILL, group=True)
                kills_at = float("inf")
        machine.send(child.pid, signal.SIGKILL, group=True)  # what it has left behind
        if not machine.free(self._free_seconds):
            spool.note(f"devices are still held by processes {sorted(machine.holders())}")
        return self._exit(child.returncode, spool.tail(began), asked)

    def _exit(self, code: int, output: str, asked: str) -> Exit:
        lines = [line.strip()[:500] for line in output.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error: ")]
        line = (errors or lines or [""])[-1] if code else ""
        if asked.startswith(_LATE):
            return Exit(LOST, line=asked)
        if code >= 0:
            return Exit(code, line=line)
        silent = not asked and not errors and not re.search(r"^Traceback ", output, re.M)
        kernel = tuple(machine.kernel_lines()) if silent else ()
        for told in kernel:
            self._reporter.spool.note(f"kernel: {told}")
        return Exit(128 - code, True, asked or f"killed by {signal.Signals(-code).name}, after: {line}", kernel)

    def _why_end(self) -> str:
        """Why what runs is to end, or nothing."""
        if self._terminated:
            return "SIGTERM"
        if self._reporter.stop_asked:
            return "asked to stop"
        first = self._reporter.first_exit
        if first and first["host"] != self._host and first["status"] not in NOT_FAILURES:
            return f"host {first['host']} ended with status {first['status']}"
        return ""

    def _terminate(self, *_) -> None:
        self._terminated = True

    def _send_what_was_left(self) -> None:
        """The output that a supervisor before this one, which was killed, had not sent yet."""
        for path in self._left:
            attempt, host = path.stem.split("-")
            try:
                Spool(self._bucket, f"{attempt_folder(int(attempt))}/logs/host-{host}", path).send()
                path.unlink()
            except SpiralError as error:
                print(error, flush=True)


def _end_with_parent() -> None:
    """In the child: a supervisor that is killed takes the job with it, which can still save."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@contextlib.contextmanager
def only_one(root: str, attempt: int) -> Iterator[None]:
    """Holds this host's lock; ends the supervisor of an earlier attempt that has it.

    Raises:
      SpiralError: this attempt, or a later one, is under way.
    """
    with LOCK.open("a+", encoding="utf-8") as file:
        while not _locked(file):
            holder = read_holder()
            if holder is None:
                time.sleep(0.1)
            elif holder["root"] == root and holder["attempt"] >= attempt:
                at, pid = holder["attempt"], holder["pid"]
                raise SpiralError(f"--attempt is {attempt}; allowed: one after {at}, which process {pid} runs")
            else:
                end_other(file, PATIENCE)
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "root": root, "attempt": attempt}))
        file.flush()
        yield


def end_other(file: IO[str], seconds: float) -> None:
    """Ends the supervisor that has the lock: asks, and after so many seconds kills.

    Several may wait for the end of one; which of them follows it is none of the others' to end.
    """
    first = read_holder()
    for number, patience in ((signal.SIGTERM, seconds), (signal.SIGKILL, 10.0)):
        if first and read_holder() == first:
            machine.send(first["pid"], number)
        if machine.wait_until(lambda: _locked(file) or read_holder() not in (None, first), patience):
            fcntl.flock(file, fcntl.LOCK_UN)
            return


def read_holder() -> dict | None:
    """What the lock says about the process that holds it; None if that has ended, or is just writing it."""
    try:
        holder = json.loads(LOCK.read_text(encoding="utf-8"))
        command = Path(f"/proc/{holder['pid']}/cmdline").read_bytes()
    except (ValueError, OSError):
        return None
    return holder if b"tpu.host.supervisor" in command else None


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(prog="supervisor")
    parser.add_argument("--root", required=True)
    parser.add_argument("--attempt", type=int, default=0)
    parser.add_argument("--foreground", action="store_true")
    parser.add_argument("--end", type=float, help="end whatever runs here; kill it after so many seconds")
    flags = parser.parse_args()
    HOME.mkdir(exist_ok=True)
    if flags.end is not None:
        with LOCK.open("a", encoding="utf-8") as file:
            if not _locked(file):
                end_other(file, flags.end)
        return 0 if machine.free(flags.end) else LOST
    if not flags.foreground:
        return detach()
    with only_one(flags.root, flags.attempt):
        bucket, folder = Bucket(flags.root, on_host=True), attempt_folder(flags.attempt)
        plan = bucket.read(f"{folder}/job.json")
        if plan is None:
            raise SpiralError(f"--attempt is {flags.attempt}; allowed: one with a job.json in {flags.root}")
        host = machine.index(plan["hosts"] // plan["slices"])
        before = bucket.read(f"{folder}/host-{host}.json")
        if before and before["state"] == "ended":
            raise SpiralError(f"--attempt is {flags.attempt}; allowed: a new one, as this one has ended here")
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (FILES if most == resource.RLIM_INFINITY else min(FILES, most), most)
        )
        return Supervisor(bucket, flags.attempt, plan, host).run()


def detach() -> int:
    """Starts a supervisor that outlives the ssh it was started by. If one is under way already, it ends at once."""
    command = [sys.executable, "-m", "tpu.host.supervisor", *sys.argv[1:], "--foreground"]
    with (HOME / "supervisor.log").open("ab") as log:
        started = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    print(f"{' '.join(sys.argv[1:])} is process {started.pid}", flush=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SpiralError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
