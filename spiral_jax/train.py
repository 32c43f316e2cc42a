"""Trains a model, or resumes the run in --workdir.

python -m spiral_jax.train --config=experiments/quickstart.py --workdir=runs/quickstart
python -m spiral_jax.train --config=experiments/pile.py:1.4b,spiral_b --workdir=DIR --config.mesh.fsdp=-1

What it leaves in --workdir is listed in spiral_jax/run/directory.py. The same command again resumes, or says that the
run is finished.

Several processes are one run: start the command on each, with a --workdir on a file system that all of them see. On TPU
pods and under Slurm they find each other; elsewhere each is told where process 0 is and which one it is itself:

python -m spiral_jax.train ... --coordinator_address=HOST:PORT --num_processes=2 --process_id=0    and 1 on the other
"""

import os

from spiral_jax.parallel import signals

if __name__ == "__main__":
    signals.end_with_nothing_to_save()  # already during the imports, which take seconds
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # of a lost process C++ would say first what a line says better

# ruff: isort: split
import time
from typing import Any, NamedTuple

import jax
from absl import flags
from etils.epath import Path
from jax.sharding import Mesh

from spiral_jax import command
from spiral_jax.convert.upcycle import fresh_linears, place, upcycled
from spiral_jax.data.pipeline import WindowOrder
from spiral_jax.data.prepared import PreparedData
from spiral_jax.errors import SpiralError
from spiral_jax.evaluation.task_evaluation import OpenTasks, TaskEvaluation, TasksOfRun, open_tasks_of_run
from spiral_jax.evaluation.validation import Validation
from spiral_jax.parallel.deadlines import Watchdog
from spiral_jax.parallel.mesh import make_mesh
from spiral_jax.parallel.process_flags import define_processes
from spiral_jax.parallel.processes import Processes
from spiral_jax.parallel.signals import SAVED
from spiral_jax.progress import duration
from spiral_jax.run import metrics, own_code, summary
from spiral_jax.run.checkpoint import Checkpoints
from spiral_jax.run.claim import claim
from spiral_jax.run.config import RunConfig
from spiral_jax.run.directory import (
    check_dtype,
    check_same_data,
    open_workdir,
    read_model,
    tokenizer_of,
)
from spiral_jax.run.finish import finish
from spiral_jax.run.guards import Guards
from spiral_jax.run.inputs import batches_of_process, check_data, prepare_data, window_order
from spiral_jax.run.provenance import save_start
from spiral_jax.run.record import Record
from spiral_jax.run.resume import Saved, newest_whole
from spiral_jax.run.saves import Clock, Saves
from spiral_jax.training.loop import AgreedStop, Evaluation, Recorder, fit
from spiral_jax.training.step import Program, TrainState, abstract_state, make_program
from spiral_jax.training.tracer import Tracer, parse_profile


def define(values: flags.FlagValues) -> None:
    command.define_config(values)
    flags.DEFINE_string("workdir", None, "directory of the run", flag_values=values)
    flags.DEFINE_string("profile", "", "FIRST:LAST steps to trace into WORKDIR/profile", flag_values=values)
    define_processes(values)


def main(values: flags.FlagValues) -> None:
    # Everything that can be refused is refused before anything is compiled.
    config = command.config_of(values)
    profiled = parse_profile(values.profile)
    check_dtype(config.model.dtype, "model.dtype")
    # What may be wrong on one machine alone comes after this: its process can then tell the others.
    with (
        Guards(config.deadlines) as guards,
        command.joined(values, guards, silence=config.deadlines.silence_seconds) as processes,
    ):
        workdir = open_workdir(values.workdir)
        metrics.check_extras(config.logging)
        summary.check_extras(config.summary)
        config.check_mesh(jax.device_count())
        processes.check_same_config(config.to_dict() | {"--import": own_code.hashes(config.to_dict())})
        if config.evaluation.tasks and processes.several:
            raise SpiralError(
                f"evaluation.tasks is {', '.join(config.evaluation.tasks)} with {processes.count} processes; "
                "allowed: none, as tasks run in one process (python -m spiral_jax.evaluate --tasks)"
            )
        across = f" in {processes.count} processes" if processes.several else ""
        processes.say(
            f"{config.model.notation} {config.model.topology}, {config.model.total_parameters:,} parameters "
            f"({config.model.non_embedding_parameters:,} non-embedding) on {jax.device_count()} x "
            f"{jax.devices()[0].device_kind}{across}; run directory {workdir}"
        )
        with claim(workdir, processes, guards.end_alone) as guards.claim:
            processes.check_shared(workdir, "--workdir")
            run(config, workdir, profiled, processes, guards)


class Opened(NamedTuple):
    """What a run stands on: opened and checked before anything is compiled.

    Attributes:
      data: training and validation text, and the tokenizer.
      order: which windows come when.
      tasks: of the harness, None for none.
      checkpoints: of the run's directory.
      saved: the newest of them that is whole, restored; None if there is none.
      given: parameters to start from, of another model; None for none.
    """

    data: PreparedData
    order: WindowOrder
    tasks: OpenTasks | None
    checkpoints: Checkpoints
    saved: Saved | None
    given: dict[str, Any] | None

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.saved.step if self.saved else 0


def run(config: RunConfig, workdir: Path, profiled: range, processes: Processes, guards: Guards) -> None:
    """The run in `workdir`, from wherever it stands."""
    mesh = make_mesh(config.mesh)
    opened = open_run(config, workdir, mesh, processes, guards.watchdog)
    program = make_program(config, mesh)
    state = first_state(config, workdir, program, opened, processes)
    if processes.is_main:
        save_start(workdir, config, opened.data, program.abstract_state.params, mesh)
    if opened.step < config.train.steps:
        train(config, workdir, program, state, opened, profiled, processes, guards)
    guards.watchdog.expect("the end", "exit_minutes")
    guards.check_claim()
    opened.checkpoints.close()
    if processes.is_main:
        finish(config, workdir, opened.data, processes)


def open_run(config: RunConfig, workdir: Path, mesh: Mesh, processes: Processes, watchdog: Watchdog) -> Opened:
    """Opens what the run stands on, and checks it against its newest checkpoint that is whole.

    Raises:
      SpiralError: a configuration or data that does not continue the run, data that is missing or does not suit it, or
        an `upcycle.source` that does not.
    """
    checkpoints = Checkpoints(workdir, config.checkpoint)
    saved = newest_whole(config, workdir, checkpoints, abstract_state(config, mesh), processes)
    for line in own_code.changes(workdir, config.to_dict()) if saved else ():
        processes.say(line)
    fingerprints = saved.fingerprints if saved else None
    watchdog.expect_nothing()
    data = prepare_data(config, workdir, fingerprints, processes)
    watchdog.expect("the start", "start_minutes")
    check_data(config, data)
    if fingerprints:
        check_same_data(config.data, data, fingerprints, workdir)
    order = window_order(config, data)
    tasks = open_tasks_of_run(config.evaluation, config.train.sequence_length)
    given = None
    if saved is None and config.upcycle.source:
        given = upcycled(config.upcycle, config.model, *read_model(config.upcycle.source, processes=processes))
    return Opened(data, order, tasks, checkpoints, saved, given)


def first_state(config: RunConfig, workdir: Path, program: Program, opened: Opened, processes: Processes) -> TrainState:
    """Where the run starts: at its newest checkpoint, at parameters from elsewhere, or at random ones."""
    if opened.saved and opened.step:
        processes.say(f"resuming after step {opened.step} of {config.train.steps}")
        return opened.saved.arrays
    state = program.init(jax.random.key(config.seed))
    if opened.saved:
        state = state.replace(params=opened.saved.arrays)
        processes.say("starting from the imported parameters")
        if tokenizer_of(workdir).fingerprint != opened.data.tokenizer.fingerprint:
            processes.say("note: the data is in another tokenizer's ids than the one imported with them")
    elif opened.given is not None:
        state = state.replace(params=place(opened.given, state.params))
        processes.say(f"starting from the layers of {config.upcycle.source}")
        fresh = fresh_linears(config.model, opened.given)
        if fresh:
            processes.say(f"starting as always, as the source has none like them: {', '.join(fresh)}")
    return state


def train(
    config: RunConfig,
    workdir: Path,
    program: Program,
    state: TrainState,
    opened: Opened,
    profiled: range,
    processes: Processes,
    guards: Guards,
) -> None:
    """The steps that are left."""
    first, last, data = opened.step + 1, config.train.steps, opened.data
    clock = Clock(config.checkpoint)
    stop = AgreedStop(lambda: guards.request.signal, program.placed.mesh, clock.is_due)

    def between_batches() -> None:
        guards.watchdog.expect("a batch of the evaluation", "evaluation_minutes")
        stop.check()

    guards.watchdog.expect_nothing()
    started = time.perf_counter()
    train_step = program.train_step.lower(program.abstract_state, program.abstract_batch).compile()
    evaluations: list[Evaluation] = []
    if data.validation is not None:
        store, placed = data.validation, program.placed
        evaluations.append(Validation(config.evaluation, config, placed, store, data.tokenizer, between_batches))
    if opened.tasks is not None:
        tasks = TaskEvaluation(opened.tasks, config, program.placed, data.tokenizer)
        evaluations.append(TasksOfRun(config.evaluation, last, tasks, between_batches))
    processes.say(f"compiled in {duration(time.perf_counter() - started)}")

    host_batches = batches_of_process(config, data, opened.order, program.abstract_batch.sharding, first)
    saving = Saves(opened.checkpoints, last, {"config": config.to_dict()}, data.fingerprints,
                   guards=guards, clock=clock, asked=stop.take_save)  # fmt: skip
    writes = processes.is_main
    record = Record(workdir, config, opened.order, first - 1, evaluations, guards.check_claim) if writes else None
    tracer = Tracer(workdir / "profile", profiled if writes else range(0))

    def before_step(step: int) -> None:
        guards.watchdog.expect(f"step {step}", "step_minutes")
        tracer(step)

    guards.request.hold()
    try:
        with host_batches:
            _, done = fit(
                state,
                range(first, last + 1),
                train_step=train_step,
                batches=(program.put_rows_of_process(batch["tokens"]) for batch in host_batches),
                recorder=Recorder(record or (lambda row: None)),
                evaluations=evaluations,
                saving=saving,
                before_step=before_step,
                should_stop=stop,
            )
    finally:
        tracer.stop()
        if record is not None:
            record.close()
    guards.watchdog.expect(f"the save of step {done}", "save_minutes")
    opened.checkpoints.wait()
    guards.watchdog.expect("the end", "exit_minutes")
    guards.request.saved(answered=stop.signal is not None)
    if stop.signal:
        raise command.Interrupted(f"stopped after step {done} of {last}, saved; the same command resumes", SAVED)


if __name__ == "__main__":
    command.run("train", __doc__, define, main)
