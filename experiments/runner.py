"""Runs a study's runs one after another, each in child processes of its own, and leaves a record of each.

WORK/STUDY/EDITION/        WORK is the flag --work, runs/studies
  data-HASH/               the token stores that all its runs read, made once
  compiled/                jax's cache of compiled programs
  RUN/run/                 the run's --workdir, until its record is written
  RUN/log                  what its processes printed
  RUN/begun.json           with what code and configuration the run began
  .lock                    which runner works here

A runner that is killed takes its child with it; the next one goes on from the run's newest checkpoint.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from etils import epath

from experiments import record as records_
from experiments.design import Run, Study, difference, is_over, run_config, shaping, validation_nats
from experiments.matching import train_flops
from experiments.record import Record, Status
from experiments.recording import ROOT, check_comparable, code_of_tree, record_of
from spiral_jax.corpus.prepare import prepare_folder
from spiral_jax.data.json_files import read_json, write_json
from spiral_jax.data.store import MANIFEST
from spiral_jax.errors import SpiralError, shown
from spiral_jax.progress import Progress
from spiral_jax.run.config import RunConfig
from spiral_jax.run.metrics import rows_of

OK, FAILED, SAVED, DIVERGED = 0, 1, 42, 44
# How a run runs here, which changes nothing of what comes of it: the runner scores the whole validation text itself.
HERE = (
    "--config.evaluation.every_steps=0",
    "--config.evaluation.batches=1",
    "--config.checkpoint.keep=1",
    "--config.summary.sample_tokens=0",
    "--config.summary.plot=False",
)
_TAIL_BYTES = 8192
Say = Callable[[str], None]


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


@dataclasses.dataclass(frozen=True)
class Places:
    """Where a study's edition lies.

    Attributes:
      work: folder of what is needed while it runs.
      records: folder of its records.
      study: as the command line names it.
    """

    work: Path
    records: Path
    study: str


class Runner:
    """One call of `run`."""

    def __init__(self, study: Study, places: Places, say: Say = print, commit: bool = False):
        """Nothing is started or written yet.

        Args:
          study: to run.
          places: where.
          say: takes lines.
          commit: whether each record is committed to git as soon as it is written.
        """
        self.study, self.places, self._say, self._commit = study, places, say, commit
        self._child: subprocess.Popen[bytes] | None = None
        self._stop = 0

    def run(self, names: Sequence[str]) -> int:
        """Runs those that have no record yet, in the study's order.

        Args:
          names: of runs.

        Returns:
          Exit status: 0 if all have ended well, 1 if one failed, 42 if one is unfinished or was not started, 44 if one
          whose result counts diverged.

        Raises:
          SpiralError: a record that is damaged or of another declaration, data that cannot be made, another runner.
          Stopped: by a signal; everything is kept.
        """
        with self._alone(), self._signals():
            return self._run(names)

    def _run(self, names: Sequence[str]) -> int:
        order = [run.name for run in self.study.runs() if run.name in names]
        flops = {run.name: train_flops(run.arm.config) for run in self.study.runs()}
        progress = Progress(f"{self.study.name} {self.study.edition}", sum(flops[name] for name in order) / 1e12,
                            unit="TFLOP", report=self._say, seconds=20.0)  # fmt: skip
        left: dict[str, str] = {}
        for number, name in enumerate(order, 1):
            done = self.records()
            if name in done and is_over(done[name]):
                progress.skip(flops[name] / 1e12)
                continue
            run = self._find(name, list(done.values()))
            held = self._held(name, done)
            if held or run.learning_rate is None:
                left[name] = held or f"the trials of {run.arm.name} have no result"
                self._say(f"{name}: not started, as {left[name]}")
                continue
            self._say(f"{name}: run {number} of {len(order)}, {self._workdir(run)}")
            try:
                record = self._one(run, progress, flops[name] / 1e12, list(done.values()))
            except Killed as killed:
                left[name] = f"{killed}; the same command goes on"
                self._say(f"{name}: {left[name]}")
                continue
            self._say(f"{name}: {outcome(record)}")
        return self._end(order, left)

    def _one(self, run: Run, progress: Progress, work: float, others: list[Record]) -> Record:
        """One run, from wherever it stands, to its record."""
        folder, workdir, code = self._folder(run), self._workdir(run), code_of_tree()
        begun = {"package": code.package, "config": shaping(run_config(run))}
        if folder.exists() and (not (folder / "begun.json").is_file() or read_json(folder / "begun.json") != begun):
            self._say(f"{run.name}: {folder} is of other code or another configuration, and is begun anew")
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "begun.json", begun)
        base = progress.done

        def advance() -> None:
            share = steps_done(workdir) / run.arm.config.train.steps
            progress.advance(max(0.0, base + share * work - progress.done))

        status: Status = "finished"
        reason = ""
        try:
            arguments = self._arguments(run)
            for attempt in (1, 2):
                try:
                    self._wait_for(folder, ["spiral_jax.train", *arguments, f"--workdir={workdir}"], advance)
                    break
                except Killed:
                    if attempt == 2:
                        raise
                    self._say(f"{run.name}: was killed, and goes on")
            files = {"spiral_jax.evaluate": "documents", self.study.by_depth: "by_depth"}
            for module, name in files.items():
                if module:
                    output = f"--{'documents' if name == 'documents' else 'output'}={folder / name}.json"
                    self._wait_for(folder, [module, f"--workdir={workdir}", output], advance)
        except ChildFailed as failure:
            status = "diverged" if failure.status == DIVERGED else "failed"
            reason = str(failure)
        try:
            record = record_of(self.study, run, code, self.command(run), status, reason, workdir)
            check_comparable(record, [other for other in others if other.run != run.name])
        except SpiralError as error:
            if status != "finished":
                raise
            record = record_of(self.study, run, code, self.command(run), "failed", str(error), workdir)
        path = records_.write(record, self.places.records)
        progress.advance(max(0.0, base + work - progress.done))
        if self._commit:
            commit(path, f"Record {self.study.name} {self.study.edition}: {run.name}")
        if is_over(record) and run.name not in self.study.kept:
            shutil.rmtree(folder)
        return record

    def records(self) -> dict[str, Record]:
        """Those that are there, by run.

        Raises:
          SpiralError: one is damaged, or of another declaration of the study.
        """
        found, damaged = records_.read_all(self.places.records)
        if damaged:
            raise SpiralError(damaged[0])
        runs = {run.name: run for run in self.study.runs(found)}
        for record in found:
            if record.run in runs and is_over(record) and (why := difference(record, runs[record.run])):
                path = self.places.records / f"{record.run}.json"
                raise SpiralError(f"{path}: {why}; allowed: records of the study as it is declared, so move it away")
        return {record.run: record for record in found}

    def command(self, run: Run) -> str:
        """That makes the run's record."""
        return f"python -m experiments.study run {self.places.study} --edition={self.study.edition} --only={run.name}"

    def configured(self, run: Run) -> list[str]:
        """The flags that give a run's configuration to any command."""
        given = f"--config=experiments/arm.py:{self.places.study},{self.study.edition},{run.arm.name}"
        return [given, f"--config.seed={run.seed}", f"--config.optimizer.peak_learning_rate={run.learning_rate!r}"]

    def begun(self, run: Run) -> str:
        """How far a run without a record is."""
        steps = steps_done(self._workdir(run))
        return f"step {steps} of {run.arm.config.train.steps}" if steps else "not begun"

    def _held(self, name: str, done: dict[str, Record]) -> str:
        """Why a run may not start yet: a gate that it is not part of."""
        if name in [gate.run for gate in self.study.gates]:
            return ""
        for gate in self.study.gates:
            record = done.get(gate.run)
            if record is None:
                return f"the gate {gate.run} has no record"
            if not validation_nats(record) <= gate.most_nats:
                ended = f"at {validation_nats(record):.4f} nats" if record.status == "finished" else record.status
                return f"the gate {gate.run} ended {ended}; allowed: up to {gate.most_nats:g} ({gate.why})"
        return ""

    def _find(self, name: str, records: list[Record]) -> Run:
        return next(run for run in self.study.runs(records) if run.name == name)

    def _folder(self, run: Run) -> Path:
        return self.places.work / run.name

    def _workdir(self, run: Run) -> Path:
        return self._folder(run) / "run"

    def _arguments(self, run: Run) -> list[str]:
        """Of `train`, without --workdir."""
        store = self._store(run.arm.config)
        return [*self.configured(run), *HERE, *([f"--config.data.stores=({str(store)!r},)"] if store else [])]

    def _store(self, config: RunConfig) -> Path | None:
        """The stores made of a configuration's text, once for all runs; None where it names stores itself."""
        data = config.data
        if data.stores or not data.paths:
            return None
        digest = hashlib.sha256(json.dumps(dataclasses.asdict(data)).encode()).hexdigest()[:8]
        folder = self.places.work / f"data-{digest}"
        if not (folder / "train" / MANIFEST).is_file():
            prepare_folder(data, folder, report=self._say, check=self._check_stop)
        return folder

    def _wait_for(self, folder: Path, arguments: list[str], advance: Callable[[], None]) -> None:
        """Runs `python -m ARGUMENTS` to its end.

        Raises:
          ChildFailed: it failed.
          Killed: something ended it.
          Stopped: this process was asked to stop; the child has saved what it had.
        """
        with (folder / "log").open("ab") as log:
            start = log.tell()
            environment = {"JAX_COMPILATION_CACHE_DIR": str(self.places.work / "compiled")} | os.environ
            self._child = subprocess.Popen(
                [sys.executable, "-u", "-m", "experiments.child", str(os.getpid()), *arguments], cwd=ROOT,
                env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        try:
            while (status := self._wait(1.0)) is None:
                self._check_stop()
                advance()
        except BaseException:
            self._child.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(60)
            raise
        finally:
            if self._child.poll() is None:
                self._child.kill()
                self._child.wait()
        self._check_stop()
        if status == OK:
            return
        words = last_words(folder / "log", start)
        if status < 0 or status in (SAVED, 43) or status > 128:
            raise Killed(f"its process ended with status {status} ({words})")
        raise ChildFailed(status, words)

    def _wait(self, seconds: float) -> int | None:
        assert self._child is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._child.wait(seconds)
        return None

    def _check_stop(self) -> None:
        if self._stop:
            raise Stopped(self._stop)

    def _end(self, order: Sequence[str], left: dict[str, str]) -> int:
        """Says how it went, and names what did not go well."""
        done = self.records()
        ended = [done[name] for name in order if name in done]
        well = [record for record in ended if record.status == "finished"]
        self._say(f"{self.study.name} {self.study.edition}: {len(well)} of {len(order)} runs finished")
        for record in ended:
            if record.status != "finished":
                self._say(f"  {record.run}: {outcome(record)}")
        for name, why in left.items():
            self._say(f"  {name}: {why}")
        if any(record.status == "failed" for record in ended):
            return FAILED
        if left:
            return SAVED
        return DIVERGED if any(r.status == "diverged" and r.stage == "seed" for r in ended) else OK

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Raises SpiralError if another runner works here."""
        self.places.work.mkdir(parents=True, exist_ok=True)
        with (self.places.work / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise SpiralError(f"{self.places.work} is in use by another runner; allowed: one at a time") from None
            yield

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """While runs run, a signal to stop is noted, and acted on between two looks at the child."""

        def note(number: int, _frame: object) -> None:
            self._stop = number

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def steps_done(workdir: Path) -> int:
    """By the last row of a run."""
    rows = rows_of(epath.Path(workdir))
    if not rows.exists():
        return 0
    with open(rows, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
        whole = file.read().split(b"\n")[1:-1]  # the first may lack its beginning, the last its end
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return int(json.loads(whole[-1])["step"]) if whole else 0
    return 0


def outcome(record: Record) -> str:
    """How a run ended, in a line."""
    if record.status != "finished":
        return f"{record.status} ({shown(record.reason)})"
    return f"{validation_nats(record):.4f} nats, {record.seconds.train:,.0f} s of training"


def last_words(log: Path, start: int = 0) -> str:
    """The line in which a child said what was wrong, or its last one."""
    with log.open("rb") as file:
        file.seek(start)
        lines = [line.strip() for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
    said = [line for line in lines if line.startswith(("error: ", "diverged: "))]
    return (said or lines or ["it said nothing"])[-1][:400]


def commit(path: Path, message: str) -> None:
    """Commits one file, whatever else is changed or staged.

    Raises:
      SpiralError: git refuses.
    """
    for command in (["add", "--", str(path)], ["commit", "--quiet", f"--message={message}", "--", str(path)]):
        done = subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True)
        if done.returncode:
            raise SpiralError(f"{path} cannot be committed ({' '.join(done.stderr.split())[:200]})")
