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
from tpu.job import Job, Parser, define, job_of
from tpu.memory import Store
from tpu.plan import START_MINUTES, Say, plan_unless_skipped

PAUSE = 30.0  # seconds before a launcher that died is replaced


class Run(NamedTuple):
    """A run as the budget sees it.

    Attributes:
      name: of the job.
      start: chip-hours that a start costs; with less there is no point in one.
      wanted: the most that it may spend by its own flags, None for no such bound.
      taken: chip-hours that it has spent, or while it is running may spend.
      state: waiting, running or done.
      status: with which it ended.
    """

    name: str
    start: float
    wanted: float | None
    taken: float
    state: str = "waiting"
    status: int | None = None


def next_start(runs: Sequence[Run], budget: float, side_by_side: int) -> tuple[Run, float] | None:
    """The run to start now, and its cap; None while nothing can be started.

    Runs start in their order: one that does not fit beside those that are running is not overtaken. What a running one
    may still spend is spoken for, so that the budget holds whatever they do. One without a bound of its own gets an
    equal share of what is left.
    """
    running = sum(run.state == "running" for run in runs)
    waiting = [run for run in runs if run.state == "waiting"]
    if not waiting or running >= side_by_side:
        return None
    first = waiting[0]
    room = budget - sum(run.taken for run in runs)
    shares = min(side_by_side - running, len(waiting))
    more = room / shares if first.wanted is None else first.wanted - first.taken
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
    parser, entries = Parser(prog="python -m tpu.launch babysit"), []
    define(parser)
    for (name, *own), _ in given:
        try:
            entries.append(Entry(job_of(*parser.parse_known_args([name, *common, *own])), [name, *common, *own]))
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
    over = not memory.billing and memory.phase in ("absent", "ended")
    return Spent(memory.chip_seconds / 3600, over, memory.result if memory.phase == "ended" else None)


def main(arguments: Sequence[str], say: Say = print) -> int:
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
        hours, _, status = before[job.name]
        runs[job.name] = Run(job.name, job.chips * START_MINUTES / 60, job.max_chip_hours, hours)
        if status in (0, 44):
            runs[job.name] = runs[job.name]._replace(state="done", status=status)
            say(f"{job.name}: ended before with status {status}, {hours:,.1f} chip-hours")
    try:
        _babysit({entry.job.name: entry for entry in entries}, runs, values, say)
    except KeyboardInterrupt:
        return 130
    left = [run.name for run in runs.values() if run.state == "waiting"]
    spoken_for = sum(run.taken for run in runs.values())
    say(f"{spoken_for:,.1f} of {values.max_chip_hours:,.1f} chip-hours spent or spoken for")
    if left:
        say(f"not started, as the budget does not hold them: {', '.join(left)}")
    return next((run.status for run in runs.values() if run.status), 42 if left else 0)


def _babysit(entries: Mapping[str, Entry], runs: dict[str, Run], values: argparse.Namespace, say: Say) -> None:
    """Starts and awaits launchers until no run can be started; `runs` say what came of them."""
    extra = ["--skip_plan"] * values.skip_plan + ["--dry_run"] * values.dry_run
    children = dict[str, subprocess.Popen[str]]()
    try:
        while True:
            while start := next_start(list(runs.values()), values.max_chip_hours, values.side_by_side):
                run, cap = start
                say(f"{run.name}: started, for at most {cap:,.1f} chip-hours")
                capped = f"--max_chip_hours={math.floor(cap * 1000) / 1000}"
                children[run.name] = _launcher([*entries[run.name].arguments, capped, *extra], say)
                runs[run.name] = run._replace(taken=cap, state="running")
            if not children:
                return
            for name in [name for name, child in children.items() if child.poll() is not None]:
                status = children.pop(name).returncode
                state, taken, how = "done", runs[name].taken, "at most "  # what may bill on keeps its share
                try:
                    spent = Spent() if values.dry_run else spent_by(entries[name].job)
                    if spent.over:
                        taken, how = spent.chip_hours, ""
                    elif spent.status is None and status not in (2, 130):
                        # Its launcher has died beside what bills: without another one nothing bounds that.
                        state, taken, how = "waiting", spent.chip_hours, "so far "
                except SpiralError as error:
                    say(f"{name}: {error}")
                say(f"{name}: ended with status {status}, {how}{taken:,.1f} chip-hours")
                if state == "waiting":
                    say(f"{name}: another launcher follows in {PAUSE:.0f} s, as the job has not ended")
                    time.sleep(PAUSE)
                runs[name] = runs[name]._replace(state=state, taken=taken, status=status)
            time.sleep(0.2)
    finally:
        for child in children.values():
            child.send_signal(signal.SIGINT)  # each says what of its own still bills
        for child in children.values():
            child.wait()


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
