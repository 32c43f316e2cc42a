"""Several named runs, one after another or side by side, within one budget of chip-hours.

python -m tpu.launch babysit --jobs=FILE.json --max_chip_hours=5000 --side_by_side=2 --zone=us-east5-a --bucket=gs://...

FILE.json is a list of {"name": NAME, "flags": ["--accelerator=v5p-128", "--config=...", ...]}, to which the flags of
the command line are added. All are checked and planned before the first is started; then each is babysat by a launcher
of its own, under a cap that is its share of the budget.
"""

import argparse
import json
import math
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from spiral_jax.errors import SpiralError, require
from tpu.bucket import Bucket
from tpu.code import pack
from tpu.job import Job, Parser, define, job_of
from tpu.memory import Store
from tpu.plan import ROOT, START_MINUTES, Say, check_files, plan_unless_skipped
from tpu.telling import tell

PAUSE, LONGEST_PAUSE = 30.0, 300.0  # seconds before a launcher that died is replaced: at first, and after some


class Run(NamedTuple):
    """A run as the budget sees it.

    Attributes:
      name: of the job.
      start: chip-hours that a start costs; with less there is no point in one.
      wanted: the most that it may spend by its own flags, None for no such bound.
      taken: chip-hours that it has spent, or while it is running may spend.
      state: waiting, running or done.
      status: with which it ended.
      bills: whether something of it is there, for all that is known.
      resume_at: Unix time before which it gets no other launcher.
      tries: launchers in a row that left it unfinished.
    """

    name: str
    start: float
    wanted: float | None
    taken: float
    state: str = "waiting"
    status: int | None = None
    bills: bool = False
    resume_at: float = 0.0
    tries: int = 0


def next_start(runs: Sequence[Run], budget: float, side_by_side: int, now: float) -> tuple[Run, float] | None:
    """The run to start now, and its cap; None while nothing can be started.

    Runs start in their order: one that does not fit beside those that are running is not overtaken. What a running one
    may still spend is spoken for, so that the budget holds whatever they do. One without a bound of its own gets an
    equal share of what is left. What bills without a launcher gets one whatever is left: nothing else would end it.
    """
    running = sum(run.state == "running" for run in runs)
    waiting = [run for run in runs if run.state == "waiting"]
    first = next((run for run in waiting if run.bills), waiting[0] if waiting else None)
    if first is None or now < first.resume_at or (running >= side_by_side and not first.bills):
        return None
    room = budget - sum(run.taken for run in runs)
    shares = max(1, min(side_by_side - running, len(waiting)))
    more = room / shares if first.wanted is None else first.wanted - first.taken
    if first.bills:
        return first, max(first.taken + min(more, room), first.taken, 0.001)
    return (first, first.taken + more) if first.start <= more <= room else None


class Entry(NamedTuple):
    """A job, and the arguments that give it."""

    job: Job
    arguments: list[str]


def read_entries(path: str, common: Sequence[str]) -> list[Entry]:
    """The jobs of a file, each with the command line's flags added.

    Raises:
      SpiralError: no such list, or a job that is not allowed.
    """
    try:
        listed = json.loads(Path(path).read_text(encoding="utf-8"))
        given = [([entry["name"], *entry["flags"]], len(entry)) for entry in listed]
        ok = bool(given) and all(size == 2 and all(isinstance(a, str) for a in arguments) for arguments, size in given)
    except OSError as error:
        raise SpiralError(f"--jobs is {path!r}, which cannot be read ({error.strerror}); allowed: a file") from None
    except (ValueError, TypeError, KeyError):
        ok = False
    if not ok:
        raise SpiralError(
            f'{path} is something else; allowed: a list of {{"name": NAME, "flags": ["--flag=value", ...]}}'
        )
    parser, entries, code = Parser(prog="python -m tpu.launch babysit"), list[Entry](), pack(ROOT)
    define(parser)
    for (name, *own), _ in given:
        try:
            entry = Entry(job_of(*parser.parse_known_args([name, *common, *own])), [name, *common, *own])
            check_files(entry.job, code)
            entries.append(entry)
        except SpiralError as error:
            raise SpiralError(f"{path}, {name}: {error}") from None
    names = [entry.job.name for entry in entries]
    for job, _ in entries:
        require(names.count(job.name) == 1, f"{path}: a name", job.name, "each once")
        require(job.delete_at_success, f"{path}, {job.name}: --delete_at_success", False, "true, as others pay for it")
        require(job.provider != "gke", f"{path}, {job.name}: --provider", job.provider, "qr or vm")
    return entries


class Spent(NamedTuple):
    """Of a job so far: chip-hours, whether nothing of it bills any more, and its exit status once it has ended."""

    chip_hours: float = 0.0
    over: bool = True
    status: int | None = None


def spent_by(job: Job) -> Spent:
    """What a job has spent, whichever launchers looked after it, by their memory on the bucket."""
    memory = Store(Bucket(job.root)).load()
    over = not (memory.billing or memory.may_have_slice)
    return Spent(memory.chip_seconds / 3600, over, memory.result if memory.phase == "ended" else None)


def main(arguments: Sequence[str], say: Say = tell) -> int:
    """The verb `babysit` with `--jobs`; the arguments are what follows the verb.

    Returns:
      0 if all runs finished; otherwise the status of the first that did not, 42 if some were not started.

    Raises:
      SpiralError: a flag, a job or a plan of one that is not allowed.
    """
    parser = Parser(prog="python -m tpu.launch babysit")
    parser.add_argument("--jobs", required=True, help="JSON file with names and flags")
    parser.add_argument("--max_chip_hours", type=float, required=True, help="of all of them together")
    parser.add_argument("--side_by_side", type=int, default=1, help="how many at a time")
    parser.add_argument("--skip_plan", action="store_true")
    parser.add_argument("--dry_run", action="store_true")
    values, common = parser.parse_known_args(list(arguments))
    require(0 < values.max_chip_hours < float("inf"), "--max_chip_hours", values.max_chip_hours, "a number above 0")
    require(values.side_by_side >= 1, "--side_by_side", values.side_by_side, "1 or more")
    entries = read_entries(values.jobs, common)
    for entry in entries:
        if values.skip_plan or not values.dry_run:
            plan_unless_skipped(entry.job, values.skip_plan, lambda url: Bucket(url).location(), say)
    before = {job.name: Spent() if values.dry_run else spent_by(job) for job, _ in entries}
    entries.sort(key=lambda entry: before[entry.job.name].over)  # what bills already comes first
    runs = {}
    for job, _ in entries:
        hours, over, status = before[job.name]
        runs[job.name] = Run(job.name, job.chips * START_MINUTES / 60, job.max_chip_hours, hours, bills=not over)
        own = job.max_chip_hours
        is_spent = over and own is not None and hours > 0 and own - hours < runs[job.name].start
        if status in (0, 44) or is_spent:
            status = 2 if status is None else status
            runs[job.name] = runs[job.name]._replace(state="done", status=status)
            say(f"{job.name}: ended before with status {status}, {hours:,.1f} chip-hours")
    try:
        _babysit({entry.job.name: entry for entry in entries}, runs, values, say)
    except KeyboardInterrupt:
        _say_what_may_bill(runs, say)
        return 130
    left = [run.name for run in runs.values() if run.state == "waiting"]
    spoken_for = sum(run.taken for run in runs.values())
    say(f"{spoken_for:,.1f} of {values.max_chip_hours:,.1f} chip-hours spent or spoken for")
    _say_what_may_bill(runs, say)
    if left:
        say(f"not started, as the budget does not hold them: {', '.join(left)}")
    status = next((run.status for run in runs.values() if run.status), 42 if left else 0)
    return 1 if status < 0 else status


def _say_what_may_bill(runs: Mapping[str, Run], say: Say) -> None:
    for run in runs.values():
        if run.bills:
            say(f"{run.name}: may bill; ask `python -m tpu.launch status`, give it back with `delete`")


def _babysit(entries: Mapping[str, Entry], runs: dict[str, Run], values: argparse.Namespace, say: Say) -> None:
    """Starts and awaits launchers until no run can be started; `runs` say what came of them."""
    extra = ["--skip_plan"] * values.skip_plan + ["--dry_run"] * values.dry_run
    children = dict[str, subprocess.Popen[str]]()
    try:
        while True:
            while start := next_start(list(runs.values()), values.max_chip_hours, values.side_by_side, time.time()):
                run, cap = start
                say(f"{run.name}: started, for at most {cap:,.1f} chip-hours")
                capped = f"--max_chip_hours={math.floor(cap * 1000) / 1000}"
                children[run.name] = _launcher([*entries[run.name].arguments, capped, *extra], say)
                runs[run.name] = run._replace(taken=cap, state="running")
            if not children and not any(map(_comes, runs.values())):
                return
            for name in [name for name, child in children.items() if child.poll() is not None]:
                status = children.pop(name).returncode
                runs[name] = _ended(runs[name], entries[name].job, status, values.dry_run, say)
            time.sleep(0.2)
    finally:
        for child in children.values():
            # Each says what of its own still bills; SIGINT is ignored in what a script starts in the background.
            child.send_signal(signal.SIGTERM)
        for child in children.values():
            child.wait()


def _comes(run: Run) -> bool:
    """Whether a launcher of a waiting run follows later, whatever is left of the budget, or to see whether it fits."""
    return run.state == "waiting" and (run.bills or time.time() < run.resume_at)


def _ended(run: Run, job: Job, status: int, dry_run: bool, say: Say) -> Run:
    """A run whose launcher has ended: done, or waiting for another one, which alone can end what may bill."""
    try:
        spent = Spent() if dry_run else spent_by(job)
    except SpiralError as error:
        say(f"{run.name}: {error}")
        spent = Spent(run.taken, over=False)
    if spent.over and (status >= 0 or spent.status is not None):
        say(f"{run.name}: ended with status {status}, {spent.chip_hours:,.1f} chip-hours")
        return run._replace(state="done", taken=spent.chip_hours, status=status, bills=False)
    run = run._replace(status=status, bills=not spent.over)
    if spent.status is not None or status == 130:  # what may bill on keeps its share
        say(f"{run.name}: ended with status {status}, at most {run.taken:,.1f} chip-hours")
        return run._replace(state="done")
    pause = min(PAUSE * 2**run.tries, LONGEST_PAUSE)
    say(f"{run.name}: ended with status {status}, so far {spent.chip_hours:,.1f} chip-hours")
    say(f"{run.name}: another launcher follows in {pause:.0f} s, as the job has not ended")
    resume_at, tries = time.time() + pause, run.tries + 1
    return run._replace(state="waiting", taken=spent.chip_hours, resume_at=resume_at, tries=tries)


def _launcher(arguments: list[str], say: Say) -> subprocess.Popen[str]:
    """Babysits one job in a process of its own, whose lines are said with its name."""
    command = [sys.executable, "-u", "-m", "tpu.launch", "babysit", *arguments]
    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,  # Ctrl-C reaches it once, from us
    )
    output = child.stdout
    assert output is not None

    def pass_on() -> None:
        for line in output:
            say(f"{arguments[0]}: {line.rstrip()}")

    threading.Thread(target=pass_on, daemon=True).start()
    return child
