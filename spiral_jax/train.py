"""Trains a model, or resumes the run in --workdir.

python -m spiral_jax.train --config=experiments/quickstart.py --workdir=runs/quickstart
python -m spiral_jax.train --config=experiments/pile.py:1.4b,spiral_b --workdir=DIR --config.mesh.fsdp=-1

What it leaves in --workdir is listed in spiral_jax/run/directory.py. The same command again resumes, or says that the
run is finished.

Several processes are one run: start the command on each, with a --workdir on a file system that all of them see, or on
a bucket (gs://BUCKET/FOLDER). On TPU pods and under Slurm they find each other; elsewhere each is told where process 0
is and which one it is itself:

python -m spiral_jax.train ... --coordinator_address=HOST:PORT --num_processes=2 --process_id=0    and 1 on the other
"""

import os

from spiral_jax.parallel import signals

if __name__ == "__main__":
    signals.end_with_nothing_to_save()  # already during the imports, which take seconds
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # of a lost process C++ would say first what a line says better

# ruff: isort: split
import time

import jax
from absl import flags
from etils.epath import Path

from spiral_jax import command
from spiral_jax.data.bucket import is_bucket
from spiral_jax.parallel.heap import keep_freed_memory
from spiral_jax.parallel.mesh import make_mesh
from spiral_jax.parallel.process_flags import define_processes
from spiral_jax.parallel.processes import Processes
from spiral_jax.parallel.signals import SAVED
from spiral_jax.progress import duration
from spiral_jax.run import metrics, own_code, side_files, summary
from spiral_jax.run.claim import claim
from spiral_jax.run.config import RunConfig
from spiral_jax.run.directory import check_dtype, make_workdir, workdir_of
from spiral_jax.run.evaluations import catch_up, evaluations_of
from spiral_jax.run.finish import finish
from spiral_jax.run.guards import Guards
from spiral_jax.run.inputs import batches_of_process
from spiral_jax.run.metrics import MetricsWriter
from spiral_jax.run.opening import Opened, first_state, open_run
from spiral_jax.run.provenance import description, save_start
from spiral_jax.run.record import Record
from spiral_jax.run.refused import NothingLeft
from spiral_jax.run.returns import Returns
from spiral_jax.run.saves import Clock, Saves
from spiral_jax.training.divergence import Skips
from spiral_jax.training.loop import AgreedStop, Recorder, fit
from spiral_jax.training.step import Program, TrainState, make_program
from spiral_jax.training.tracer import Tracer, check_profile, parse_profile


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
    command.compute_in(config.model.dtype)
    # What may be wrong on one machine alone comes after this: its process can then tell the others.
    with (
        Guards(config.deadlines) as guards,
        command.joined(values, guards, silence=config.deadlines.silence_seconds) as processes,
    ):
        workdir = workdir_of(values.workdir)
        metrics.check_extras(config.logging)
        summary.check_extras(config.summary)
        config.check_mesh(jax.device_count())
        check_profile(profiled, config.train.steps)
        processes.check_same_config(config.to_dict() | {"--import": own_code.hashes(config.to_dict())})
        across = f" in {processes.count} processes" if processes.several else ""
        processes.say(
            f"{config.model.notation} {config.model.topology}, {config.model.total_parameters:,} parameters "
            f"({config.model.non_embedding_parameters:,} non-embedding) on {jax.device_count()} x "
            f"{jax.devices()[0].device_kind}{across}; run directory {workdir}"
        )
        with NothingLeft(workdir, processes.is_main) as started:
            make_workdir(workdir)
            if is_bucket(workdir):  # there another start is waited for, for as long as it trains
                guards.watchdog.expect_nothing()
            with claim(workdir, processes, guards.end_alone) as guards.claim, started.claimed(guards.claim):
                guards.watchdog.expect("the start", "start_minutes")
                processes.check_shared(workdir, "--workdir")
                run(config, workdir, profiled, processes, guards, started)


def run(
    config: RunConfig, workdir: Path, profiled: range, processes: Processes, guards: Guards, started: NothingLeft
) -> None:
    """The run in `workdir`, from wherever it stands."""
    mesh = make_mesh(config.mesh)
    opened = open_run(config, workdir, mesh, processes, guards)
    started.keep()
    program = make_program(config, mesh)
    state = first_state(config, workdir, program, opened, processes)
    if processes.is_main:
        for line in side_files.mend(workdir):
            processes.say(line)
        save_start(workdir, config, opened.data, program.abstract_state.params, mesh)
    if opened.step < config.train.steps or opened.owed:
        train(config, workdir, program, state, opened, profiled, processes, guards)
    guards.watchdog.expect("the end", "exit_minutes")
    guards.check_claim()
    opened.checkpoints.close()
    if processes.is_main:
        finish(config, workdir, opened.data, processes)


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
    """The steps that are left, after what the one before them still owes."""
    first, last, data = opened.step + 1, config.train.steps, opened.data
    clock = Clock(config.checkpoint)
    stop = AgreedStop(lambda: guards.request.signal, program.placed.mesh, clock.is_due)

    def between_batches() -> None:
        guards.watchdog.expect("a batch of the evaluation", "evaluation_minutes")
        stop.check()

    guards.watchdog.expect_nothing()
    writer = None
    if processes.is_main:  # before the compilation: W&B may refuse the run
        about = description(config, program.placed.mesh)
        writer = MetricsWriter(workdir, config.logging, last_step=first - 1, about=about, check=guards.check_claim)
    started = time.perf_counter()
    train_step = program.lowered().compile()
    evaluations = evaluations_of(config, data, opened.tasks, program.placed, processes, between_batches)
    processes.say(f"compiled in {duration(time.perf_counter() - started)}")

    host_batches = batches_of_process(config, data, opened.order, program.placed.batch, first)
    skips = Skips(config.divergence, config.train.skip_steps, opened.saved.divergence if opened.saved else None)
    record = Record(writer, config, opened.order, first - 1, evaluations, guards.check_claim) if writer else None
    saving = Saves(opened.checkpoints, config, data.fingerprints, processes,
                   skips=skips, guards=guards, clock=clock, asked=stop.take_save,
                   flush=record.flush if record else lambda: None)  # fmt: skip
    tracer = Tracer(workdir / "profile", profiled if writer else range(0))

    def before_step(step: int) -> None:
        guards.watchdog.expect(f"step {step}", "step_minutes")
        tracer(step)

    guards.request.hold()
    try:
        with host_batches:
            owed = [evaluation for evaluation in evaluations if evaluation.values in opened.owed]
            goes_on = catch_up(owed, first - 1, state, record.complete if record else lambda values: None)
            _, done = fit(
                state,
                range(first, last + 1 if goes_on else first),
                train_step=train_step,
                batches=(program.put_rows_of_process(batch) for batch in host_batches),
                recorder=Recorder(skips.then(record)),
                evaluations=evaluations,
                saving=saving,
                returning=Returns(config, workdir, opened.checkpoints, program.abstract_state, skips, processes),
                before_step=before_step,
                should_stop=stop,
            )
    finally:
        tracer.stop()
        if record is not None:
            record.close()
    saving.finish(done)
    guards.watchdog.expect("the end", "exit_minutes")
    guards.request.saved(answered=stop.signal is not None)
    failure = next((one.failure for one in evaluations if one.failure is not None), None)
    if failure is not None:
        processes.say(f"saved after step {done} of {last}, which was not evaluated; the same command resumes there")
        raise failure
    if stop.signal:
        raise command.Interrupted(f"stopped after step {done} of {last}, saved; the same command resumes", SAVED)


if __name__ == "__main__":
    keep_freed_memory()
    command.run("train", __doc__, define, main)
