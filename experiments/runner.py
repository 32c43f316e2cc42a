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
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from etils import epath

from experiments import record as records_
from experiments.child import ROOT, SAVED, ChildFailed, Killed, Stopped, run_module
from experiments.design import Run, Study, difference, is_over, run_config, shaping, validation_nats
from experiments.elsewhere import check_trained, job_name
from experiments.matching import train_flops
from experiments.record import Record, Status
from experiments.recording import check_comparable, code_of_tree, record_of, tasks_file
from spiral_jax.command import DIVERGED, FAILED, OK
from spiral_jax.corpus.prepare import prepare_folder
from spiral_jax.data.bucket import is_bucket
from spiral_jax.data.json_files import read_json, write_json
from spiral_jax.data.store import MANIFEST
from spiral_jax.errors import Diverged, SpiralError, shown
from spiral_jax.progress import Progress
from spiral_jax.run.config import RunConfig
from spiral_jax.run.metrics import rows_of

# How a run runs here, which changes nothing of what comes of it: the runner scores the whole validation text itself.
HERE = (
    "--config.evaluation.every_steps=0",
    "--config.evaluation.batches=1",
    "--config.checkpoint.keep=2",
    "--config.summary.sample_tokens=0",
    "--config.summary.plot=False",
)
ASKED = ("paper", "wikitext")  # of the LM Evaluation Harness: what the paper's tables have numbers of
_TAIL_BYTES = 8192
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Places:
    """Where a study's edition lies.

    Attributes:
      work: folder of what is needed while it runs.
      records: folder of its records.
      study: as the command line names it.
      bucket: where `launch` has trained the runs, which are then only scored and recorded; empty to train them here.
      tasks_data: folder with the data of the papers' tasks; empty for the Hugging Face hub.
    """

    work: Path
    records: Path
    study: str
    bucket: str = ""
    tasks_data: str = ""


class Runner:
    """One call of `run`."""

    def __init__(
        self,
        study: Study,
        places: Places,
        say: Say = print,
        commit: bool = False,
        overrides: Sequence[str] = (),
        train: str = "spiral_jax.train",
        evaluate: str = "spiral_jax.evaluate",
    ):
        """Nothing is started or written yet.

        Args:
          study: to run.
          places: where.
          say: takes lines.
          commit: whether each record is committed to git as soon as it is written.
          overrides: flags that say where the data is and how runs run, as `--config.mesh.data=2`.
          train: module that trains.
          evaluate: module that scores what was trained, with `--documents=`.
        """
        self.study, self.places, self._say, self._commit = study, places, say, commit
        self._overrides, self._train, self._evaluate = tuple(overrides), train, evaluate
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
            if self._commit and self.places.records.is_dir():  # of a runner that could not, or was killed before
                commit(self.places.records, f"Records of {self.study.name} {self.study.edition}")
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
            held = self.held(name, done)
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
            if self.places.bucket:
                check_trained(run, workdir)
            else:
                self._train_to_the_end(run, folder, advance)
            self._evaluate_all(run, folder, advance)
            if code_of_tree().package != code.package:
                status, reason = "failed", "the package's files were changed while it ran"
        except ChildFailed as failure:
            status = "diverged" if failure.status == DIVERGED else "failed"
            reason = str(failure)
        try:
            record = record_of(self.study, run, code, self.command(run), status, reason, workdir, folder)
            check_comparable(record, [other for other in others if other.run != run.name])
        except SpiralError as error:
            if status != "finished":
                raise
            record = record_of(self.study, run, code, self.command(run), "failed", str(error), workdir, folder)
        except Diverged as error:
            record = record_of(self.study, run, code, self.command(run), "diverged", str(error), workdir, folder)
        path = records_.write(record, self.places.records)
        progress.advance(max(0.0, base + work - progress.done))
        if self._commit:
            commit(path, f"Record {self.study.name} {self.study.edition}: {run.name}")
        if is_over(record) and run.name not in self.study.kept:
            shutil.rmtree(folder)
        return record

    def _train_to_the_end(self, run: Run, folder: Path, advance: Callable[[], None]) -> None:
        """Goes on once if something kills it, as what takes the memory may be gone by then."""
        arguments = [self._train, *self._arguments(run), f"--workdir={self._workdir(run)}"]
        try:
            self._wait_for(folder, arguments, advance)
        except Killed:
            self._say(f"{run.name}: was killed, and goes on")
            self._wait_for(folder, arguments, advance)

    def _evaluate_all(self, run: Run, folder: Path, advance: Callable[[], None]) -> None:
        """On the validation text, and on the study's tasks if the run's result counts."""
        of_run = [self._evaluate, f"--workdir={self._workdir(run)}"]
        self._wait_for(folder, [*of_run, f"--documents={folder / 'documents.json'}"], advance)
        data = [f"--tasks_data={self.places.tasks_data}"] * bool(self.places.tasks_data)
        for shots in self.study.shots if run.stage == "seed" else ():
            output = tasks_file(folder, shots)
            if not output.exists():
                tasks = ",".join(ASKED if shots == 0 else ASKED[:1])  # examples are for questions, not for texts
                asked = [f"--tasks={tasks}", f"--num_fewshot={shots}", f"--output={output}", *data]
                self._wait_for(folder, [*of_run, *asked], advance)

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
        if self.places.bucket:
            return "no record"
        steps = steps_done(self._workdir(run))
        return f"step {steps} of {run.arm.config.train.steps}" if steps else "not begun"

    def held(self, name: str, done: dict[str, Record]) -> str:
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

    def _workdir(self, run: Run) -> epath.Path:
        if self.places.bucket:
            return epath.Path(f"{self.places.bucket}/{job_name(self.study, run)}/run")
        return epath.Path(self._folder(run) / "run")

    def _arguments(self, run: Run) -> list[str]:
        """Of `train`, without --workdir."""
        store = self._store(run.arm.config)
        stores = [f"--config.data.stores=({str(store)!r},)"] if store else []
        return [*self.configured(run), *HERE, *stores, *self._overrides]

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
        """Runs a module to its end; raises as `run_module`, or Stopped."""

        def look() -> None:
            self._check_stop()
            advance()

        environment = {"JAX_COMPILATION_CACHE_DIR": str(self.places.work / "compiled")} | os.environ
        run_module(arguments, folder / "log", environment, look)

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
        with (self.places.work / ".lock").open("w", encoding="utf-8") as lock:
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


def steps_done(workdir: epath.Path) -> int:
    """By the last row of a run; 0 for one on a bucket."""
    rows = rows_of(workdir)
    if is_bucket(rows) or not rows.exists():
        return 0
    with rows.open("rb") as file:
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


def commit(path: Path, message: str) -> None:
    """Commits a file or folder, if there is anything new in it, whatever else is changed or staged.

    Raises:
      SpiralError: git refuses.
    """
    for _ in range(20):
        done = _git(path, "status", "--porcelain")
        if done.stdout.strip():
            done = _git(path, "add")
            if done.returncode == 0:
                done = _git(path, "commit", "--quiet", f"--message={message}")
        if "index.lock" not in done.stderr:
            break
        time.sleep(0.5)  # another runner commits
    if done.returncode:
        raise SpiralError(f"{path} cannot be committed ({' '.join(done.stderr.split())[:200]})")


def _git(path: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", "-C", str(ROOT), *command, "--", str(path)], capture_output=True, encoding="utf-8")
