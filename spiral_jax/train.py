"""Trains a model, or resumes the run in --workdir.

python -m spiral_jax.train --config=experiments/quickstart.py --workdir=runs/quickstart
python -m spiral_jax.train --config=experiments/pile.py:1.4b,spiral_b --workdir=DIR --config.mesh.fsdp=-1

What it leaves in --workdir is listed in spiral_jax/run/directory.py. The same command again resumes, or says that the
run is finished.

Several processes are one run: start the command on each, with a --workdir on a file system that all of them see. On TPU
pods and under Slurm they find each other; elsewhere each is told where process 0 is and which one it is itself:

python -m spiral_jax.train ... --coordinator_address=HOST:PORT --num_processes=2 --process_id=0    and 1 on the other
"""

import contextlib
import time
from typing import Any, NamedTuple

import jax
from absl import flags
from etils.epath import Path
from jax.sharding import Mesh

from spiral_jax import command
from spiral_jax.convert.upcycle import fresh_linears, place, upcycled
from spiral_jax.data import atomic
from spiral_jax.data.pipeline import WindowOrder
from spiral_jax.data.prepared import PreparedData
from spiral_jax.errors import SpiralError
from spiral_jax.evaluation.task_evaluation import OpenTasks, TaskEvaluation, TasksOfRun, open_tasks_of_run
from spiral_jax.evaluation.validation import Validation
from spiral_jax.parallel.mesh import make_mesh
from spiral_jax.parallel.process_flags import define_processes
from spiral_jax.parallel.processes import Processes
from spiral_jax.progress import duration
from spiral_jax.run import metrics, own_code, summary
from spiral_jax.run.checkpoint import Checkpoints
from spiral_jax.run.config import RunConfig
from spiral_jax.run.directory import (
    check_dtype,
    check_same_data,
    claim,
    load,
    open_workdir,
    read_model,
    tokenizer_of,
)
from spiral_jax.run.inputs import batches_of_process, check_data, prepare_data, window_order
from spiral_jax.run.provenance import save_start
from spiral_jax.run.record import Record
from spiral_jax.run.resume import Saved, newest_whole
from spiral_jax.run.returns import Returns
from spiral_jax.run.saves import Saves
from spiral_jax.training.divergence import Skips
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
    with command.joined(values) as processes:
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
        with claim(workdir) if processes.is_main else contextlib.nullcontext():
            processes.check_shared(workdir, "--workdir")
            run(config, workdir, profiled, processes)


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


def run(config: RunConfig, workdir: Path, profiled: range, processes: Processes) -> None:
    """The run in `workdir`, from wherever it stands."""
    mesh = make_mesh(config.mesh)
    opened = open_run(config, workdir, mesh, processes)
    program = make_program(config, mesh)
    state = first_state(config, workdir, program, opened, processes)
    if processes.is_main:
        save_start(workdir, config, opened.data, program.abstract_state.params, mesh)
    if opened.step < config.train.steps:
        train(config, workdir, program, state, opened, profiled, processes)
    opened.checkpoints.close()
    if processes.is_main:
        finish(config, workdir, opened.data, processes)


def open_run(config: RunConfig, workdir: Path, mesh: Mesh, processes: Processes) -> Opened:
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
    data = prepare_data(config, workdir, fingerprints, processes)
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
) -> None:
    """The steps that are left."""
    first, last, data = opened.step + 1, config.train.steps, opened.data
    started = time.perf_counter()
    train_step = program.train_step.lower(program.abstract_state, program.abstract_batch).compile()
    evaluations: list[Evaluation] = []
    if data.validation is not None:
        evaluations.append(Validation(config.evaluation, config, program.placed, data.validation, data.tokenizer))
    if opened.tasks is not None:
        tasks = TaskEvaluation(opened.tasks, config, program.placed, data.tokenizer)
        evaluations.append(TasksOfRun(config.evaluation, last, tasks))
    processes.say(f"compiled in {duration(time.perf_counter() - started)}")

    host_batches = batches_of_process(config, data, opened.order, program.abstract_batch.sharding, first)
    skips = Skips(config.divergence, config.train.skip_steps, opened.saved.divergence if opened.saved else None)
    saving = Saves(opened.checkpoints, last, {"config": config.to_dict()}, data.fingerprints, skips)
    record = Record(workdir, config, opened.order, first - 1, evaluations) if processes.is_main else None
    tracer = Tracer(workdir / "profile", profiled if processes.is_main else range(0))
    try:
        with command.StopRequest() as request, host_batches:
            stop = AgreedStop(lambda: request.signal, program.placed.mesh)
            _, done = fit(
                state,
                range(first, last + 1),
                train_step=train_step,
                batches=(program.put_rows_of_process(batch["tokens"]) for batch in host_batches),
                recorder=Recorder(skips.then(record)),
                evaluations=evaluations,
                saving=saving,
                returning=Returns(config, workdir, opened.checkpoints, program.abstract_state, skips, processes),
                before_step=tracer,
                should_stop=stop,
            )
    finally:
        tracer.stop()
        if record is not None:
            record.close()
    opened.checkpoints.wait()
    if stop.signal and done < last:
        raise command.Interrupted(f"stopped after step {done} of {last}, saved; the same command resumes", stop.signal)


def finish(config: RunConfig, workdir: Path, data: PreparedData, processes: Processes) -> None:
    """Says how the run ended and where everything is."""
    rows = metrics.read_rows(workdir / "metrics.jsonl")
    print(f"\nfinished: {config.train.steps} steps, {config.train.steps * config.train.tokens_per_step:,} tokens")
    skipped = [row["step"] for row in rows if row.get("skipped")]
    if skipped:
        print(f"skipped updates: {len(skipped)}, the last one of step {skipped[-1]}")
    evaluated = [row for row in rows if row.get("validation_loss") is not None]
    if evaluated:
        last = evaluated[-1]
        print(f"validation after step {last['step']}: {last['validation_bits_per_byte']:.4f} bits per byte, "
              f"{last['validation_loss']:.4f} nats per token")  # fmt: skip
    if config.summary.sample_tokens and processes.several:
        print(f"no sample: its parameters would have to fit one of the {processes.count} processes")
    elif config.summary.sample_tokens and data.validation is not None:
        model, params = load(workdir)
        text = summary.sample_continuation(model, params, config.summary, data.validation, data.tokenizer, config.seed)
        atomic.write_text(workdir / "sample.txt", text)
        print(f"\nthe validation text, and after [...] the model's continuation:\n{'-' * 80}\n{text}\n{'-' * 80}")
    if config.summary.plot:
        print(f"loss curve   {summary.plot_loss(workdir)}")
    print(f"metrics      {workdir / 'metrics.jsonl'}\ncheckpoints  {workdir / 'checkpoints'}")
    files = dict.fromkeys(code["file"] for code in own_code.own_code(config.to_dict()).values())
    more = [*(f" --import={file}" for file in files), "" if data.validation is not None else " --input=FILE"]
    print(f"evaluate it  python -m spiral_jax.evaluate --workdir={workdir}{''.join(more)}", flush=True)


if __name__ == "__main__":
    command.run("train", __doc__, define, main)
