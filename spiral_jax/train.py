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
import functools
import os
import time
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags

from spiral_jax import command
from spiral_jax.convert.upcycle import fresh_linears, place, upcycled
from spiral_jax.data.pipeline import WindowOrder, train_batches
from spiral_jax.data.prepared import PreparedData, open_folder, open_stores
from spiral_jax.data.text.prepare import prepare_stores
from spiral_jax.data.windows import num_windows
from spiral_jax.errors import SpiralError
from spiral_jax.evaluation.perplexity import score
from spiral_jax.evaluation.task_evaluation import OpenTasks, TaskEvaluation, open_tasks_of_run
from spiral_jax.hardware import peak_flops
from spiral_jax.parallel import processes
from spiral_jax.parallel.mesh import batch_sharding, make_mesh
from spiral_jax.run import metrics, own_code, summary
from spiral_jax.run.checkpoint import Checkpoints
from spiral_jax.run.config import RunConfig
from spiral_jax.run.directory import check_same_data, claim, load, open_data, read_model, save_data, tokenizer_of
from spiral_jax.run.provenance import parameter_table, write_environment
from spiral_jax.training.loop import AgreedStop, Recorder, fit
from spiral_jax.training.step import Program, make_program


def define(values: flags.FlagValues) -> None:
    command.define_config(values)
    flags.DEFINE_string("workdir", None, "directory of the run", flag_values=values)
    flags.DEFINE_string("profile", "", "FIRST:LAST steps to trace into WORKDIR/profile", flag_values=values)
    processes.define(values)


def main(values: flags.FlagValues) -> None:
    # Everything that can be refused is refused before anything is compiled.
    config = command.config_of(values)
    profiled = parse_profile(values.profile)
    if config.model.dtype == "float64" and not jax.config.jax_enable_x64:
        raise SpiralError("model.dtype is 'float64', which needs JAX_ENABLE_X64=1 in the environment")
    # What may be wrong on one machine alone comes after this: its process can then tell the others.
    processes.initialize(values)
    workdir = open_workdir(values.workdir)
    metrics.check_extras(config.logging)
    summary.check_extras(config.summary)
    config.check_mesh(jax.device_count())
    processes.check_same_config(config.to_dict() | {"--import": own_code.hashes(config.to_dict())})
    check_processes(config)
    across = f" in {jax.process_count()} processes" if processes.is_several() else ""
    processes.say(
        f"{config.model.notation} {config.model.topology}, {config.model.total_parameters:,} parameters "
        f"({config.model.non_embedding_parameters:,} non-embedding) on {jax.device_count()} x "
        f"{jax.devices()[0].device_kind}{across}; run directory {workdir}"
    )
    with claim(workdir) if processes.is_main() else contextlib.nullcontext():
        processes.check_shared(workdir, "--workdir")
        run(config, workdir, profiled)


def run(config: RunConfig, workdir: Path, profiled: range) -> None:
    """The run in `workdir`, from wherever it stands."""
    checkpoints = Checkpoints(workdir, config.checkpoint)
    # 0: imported parameters, not trained here yet.
    saved_step = processes.from_main("the newest checkpoint", checkpoints.latest_step)
    start_step = saved_step or 0
    fingerprints = None
    if saved_step is not None:
        meta = checkpoints.load_meta(saved_step)
        own_code.check_registered(workdir, meta["config"])
        config.check_resume(RunConfig.from_dict(meta["config"]), saved_step)
        for line in own_code.changes(workdir, config.to_dict()):
            processes.say(line)
        fingerprints = meta["data"]["fingerprints"]
    data = prepare(config, workdir, fingerprints)
    check_data(config, data)
    if fingerprints:
        check_same_data(config.data, data, fingerprints, workdir)
    order = window_order(config, data)
    tasks = open_tasks_of_run(config.evaluation, config.train.sequence_length)

    given = None
    if saved_step is None and config.upcycle.source:
        given = upcycled(config.upcycle, config.model, *read_model(config.upcycle.source))

    mesh = make_mesh(config.mesh)
    program = make_program(config, mesh)
    if start_step:
        state = checkpoints.restore(start_step, program.abstract_state)
        processes.say(f"resuming after step {start_step} of {config.train.steps}")
    else:
        state = program.init(jax.random.key(config.seed))
        if saved_step is not None:
            state = state.replace(params=checkpoints.restore_params(0, program.abstract_state.params))
            processes.say("starting from the imported parameters")
            if tokenizer_of(workdir).fingerprint != data.tokenizer.fingerprint:
                processes.say("note: the data is in another tokenizer's ids than the one imported with them")
        elif given is not None:
            state = state.replace(params=place(given, state.params))
            processes.say(f"starting from the layers of {config.upcycle.source}")
            fresh = fresh_linears(config.model, given)
            if fresh:
                processes.say(f"starting as always, as the source has none like them: {', '.join(fresh)}")
    if processes.is_main():
        config.save(workdir / "config.json")
        own_code.save(workdir, config.to_dict())
        save_data(workdir, data)
        (workdir / "parameters.txt").write_text(parameter_table(program.abstract_state.params))
        write_environment(workdir / "environment.json", mesh)

    if start_step < config.train.steps:
        train(config, workdir, program, state, data, order, checkpoints, start_step, profiled, tasks)
    checkpoints.close()
    if processes.is_main():
        finish(config, workdir, data)


def prepare(config: RunConfig, workdir: Path, fingerprints: Sequence[str] | None) -> PreparedData:
    """Opens the stores of the configuration, or makes them of its text: on process 0, while the others wait.

    Args:
      config: the run's.
      workdir: the run's.
      fingerprints: of the stores that a resumed run began with.

    Raises:
      SpiralError: data that is missing or broken, or that a process does not see.
    """
    if config.data.stores:
        return open_stores(config.data)

    def make() -> PreparedData:
        return (fingerprints and open_data(workdir, fingerprints)) or prepare_stores(config.data, workdir / "cache")

    if not processes.is_several():
        return make()
    data = make() if processes.is_main() else None
    folder, made = processes.from_main(
        "preparation of data.paths", lambda: (str(Path(data.train[0].name).parent), data.fingerprints)
    )
    if data is None:
        data = open_folder(folder)
        if list(data.fingerprints) != made:
            raise SpiralError(f"{folder}: its tokens on process {processes.process_id()} are not those of process 0")
    return data


def train(config: RunConfig, workdir: Path, program: Program, state, data: PreparedData, order: WindowOrder,
          checkpoints: Checkpoints, start_step: int, profiled: range, tasks: OpenTasks | None) -> None:  # fmt: skip
    """Steps start_step + 1 .. train.steps."""
    started = time.perf_counter()
    train_step = program.train_step.lower(program.abstract_state, program.abstract_batch).compile()
    # Now rather than when it is first due: what does not fit is known before anything is trained.
    eval_step = None if data.validation is None else program.compile_eval_step(*eval_shape(config))
    processes.say(f"compiled in {metrics.duration(time.perf_counter() - started)}")

    is_main = processes.is_main()
    writer = metrics.MetricsWriter(workdir, config.logging, last_step=start_step) if is_main else None
    tracer = Tracer(workdir / "profile", profiled if is_main else range(0))
    progress = metrics.Progress(config.train.steps, config.logging.seconds)
    complete = functools.partial(complete_row, config, order)

    def record(row):
        if writer is None:
            return
        row = complete(row)
        last = row["step"] == config.train.steps
        if last or row["step"] % config.logging.every_steps == 0 or evaluate_due(row["step"]):
            writer.write(row)
        progress.update(row)

    def validation_due(step):
        every = config.evaluation.every_steps
        return data.validation is not None and ((every and step % every == 0) or step == config.train.steps)

    task_evaluation = None if tasks is None else TaskEvaluation(tasks, config, program, data.tokenizer)

    def tasks_due(step):
        return task_evaluation is not None and config.evaluation.tasks_due(step, config.train.steps)

    def evaluate_due(step):
        return validation_due(step) or tasks_due(step)

    def evaluate_state(state):
        step, values = int(state.step), {}
        if validation_due(step):
            values |= evaluate(config, program, eval_step, state.params, data)
        if tasks_due(step):
            found = task_evaluation.metrics(state.params)
            print("  ".join([f"tasks after step {step}:", *(f"{k} {v:.4f}" for k, v in found.items())]), flush=True)
            values |= found
        return values

    def save(step, state):
        saved_data = {"step": step, "fingerprints": list(data.fingerprints)}
        checkpoints.save(step, state, {"config": config.to_dict(), "data": saved_data})

    sharding = batch_sharding(program.mesh)
    part, parts = processes.rows_of_process(sharding, config.train.batch_size)
    host_batches = train_batches(
        data.train,
        order,
        sequence_length=config.train.sequence_length,
        vocab_size=config.model.vocab_size,
        start_step=start_step,
        process_index=part,
        process_count=parts,
        read_threads=config.data.read_threads,
        prefetch_batches=config.data.prefetch_batches,
    )
    shape = program.abstract_batch.shape
    device_batches = (jax.make_array_from_process_local_data(sharding, b["tokens"], shape) for b in host_batches)
    try:
        with command.StopRequest() as request, host_batches:
            stop = AgreedStop(lambda: request.signal, program.mesh)
            _, last_step = fit(
                state,
                train_step=train_step,
                batches=device_batches,
                first_step=start_step + 1,
                last_step=config.train.steps,
                recorder=Recorder(record),
                evaluate=evaluate_state,
                evaluate_due=evaluate_due,
                save=save,
                save_due=lambda step: checkpoints.due(step, config.train.steps),
                before_step=tracer,
                should_stop=stop,
            )
    finally:
        tracer.stop()
        if writer is not None:
            writer.close()
    checkpoints.wait()
    if stop.signal and last_step < config.train.steps:
        raise command.Interrupted(
            f"stopped after step {last_step} of {config.train.steps}, saved; the same command resumes", stop.signal
        )


def complete_row(config: RunConfig, order: WindowOrder, row: dict) -> dict:
    """Adds what follows from a step's number and time: tokens, epochs, speed, MFU."""
    tokens_per_second = config.train.tokens_per_step / row["step_time"]
    row |= {
        "tokens": row["step"] * config.train.tokens_per_step,
        "tokens_per_second": tokens_per_second,
        "epoch": order.epoch(row["step"]),
    }
    epochs_of_stores = order.epochs_of_sources(row["step"])
    if epochs_of_stores is not None:
        row["epochs_of_stores"] = epochs_of_stores
    peak = config.logging.peak_flops or peak_flops(jax.devices()[0].device_kind)
    if peak is not None:
        for name, causal in (("mfu", True), ("mfu_full_attention", False)):
            flops = config.model.train_flops_per_token(config.train.sequence_length, causal=causal)
            row[name] = flops * tokens_per_second / (peak * jax.device_count())
    memory = jax.local_devices()[0].memory_stats()
    if memory:
        row["device_memory_bytes"] = memory["peak_bytes_in_use"]
    return row


def eval_shape(config: RunConfig) -> tuple[int, int]:
    """Windows per evaluation call and their length: a micro-batch, as what fits in training fits in evaluation."""
    return config.train.batch_size // config.train.accumulation, config.train.sequence_length


def evaluate(config: RunConfig, program: Program, eval_step, params, data: PreparedData) -> dict[str, float]:
    """Loss on the validation store."""
    batch_size, sequence_length = eval_shape(config)
    result = score(
        eval_step,
        params,
        data.validation,
        utf8_bytes=data.validation.utf8_bytes,
        separator_id=data.tokenizer.separator_id,
        sequence_length=sequence_length,
        batch_size=batch_size,
        put=program.put,
        max_batches=config.evaluation.batches * config.train.accumulation,
    )
    return {"validation_loss": result.loss, "validation_bits_per_byte": result.bits_per_byte}


def finish(config: RunConfig, workdir: Path, data: PreparedData) -> None:
    """Says how the run ended and where everything is."""
    rows = metrics.read_rows(workdir / "metrics.jsonl")
    print(f"\nfinished: {config.train.steps} steps, {config.train.steps * config.train.tokens_per_step:,} tokens")
    evaluated = [row for row in rows if "validation_loss" in row]
    if evaluated:
        last = evaluated[-1]
        print(f"validation after step {last['step']}: {last['validation_bits_per_byte']:.4f} bits per byte, "
              f"{last['validation_loss']:.4f} nats per token")  # fmt: skip
    if config.summary.sample_tokens and processes.is_several():
        print(f"no sample: its parameters would have to fit one of the {jax.process_count()} processes")
    elif config.summary.sample_tokens and data.validation is not None:
        model, params = load(workdir)
        text = summary.sample_continuation(model, params, config.summary, data.validation, data.tokenizer, config.seed)
        (workdir / "sample.txt").write_text(text)
        print(f"\nthe validation text, and after [...] the model's continuation:\n{'-' * 80}\n{text}\n{'-' * 80}")
    if config.summary.plot:
        print(f"loss curve   {summary.plot_loss(workdir)}")
    print(f"metrics      {workdir / 'metrics.jsonl'}\ncheckpoints  {workdir / 'checkpoints'}")
    files = dict.fromkeys(code["file"] for code in own_code.own_code(config.to_dict()).values())
    more = [*(f" --import={file}" for file in files), "" if data.validation is not None else " --input=FILE"]
    print(f"evaluate it  python -m spiral_jax.evaluate --workdir={workdir}{''.join(more)}", flush=True)


def check_processes(config: RunConfig) -> None:
    """Raises SpiralError for what a run on several processes cannot do."""
    if config.evaluation.tasks and processes.is_several():
        raise SpiralError(
            f"evaluation.tasks: found {', '.join(config.evaluation.tasks)} with {jax.process_count()} processes; "
            "allowed: none, as tasks run in one process (python -m spiral_jax.evaluate --tasks)"
        )


class Tracer:
    """Profiles a range of steps: from before the first to after the last, or to where the run ends."""

    def __init__(self, folder: Path, profiled: range):
        self._folder, self._profiled = folder, profiled
        self._running = False

    def __call__(self, step: int) -> None:
        """Before a step is dispatched. When step n is, n - 2 is known to be done: its metrics were read."""
        if step in self._profiled and not self._running:
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        if step > self._profiled.stop:
            self.stop()

    def stop(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
            print(f"trace        {self._folder}", flush=True)


def check_data(config: RunConfig, data: PreparedData) -> None:
    """Raises SpiralError if the data does not suit the model."""
    needed = data.tokenizer.vocab_size
    if config.model.vocab_size < needed:
        raise SpiralError(
            f"model.vocab_size: found {config.model.vocab_size}, but the tokenizer of {data.train[0].name} has "
            f"{needed} ids; allowed: at least {needed}"
        )


def window_order(config: RunConfig, data: PreparedData) -> WindowOrder:
    """Which window of which source the run takes when.

    Raises:
      SpiralError: a source shorter than a window, or weights that cannot be kept exactly.
    """
    return WindowOrder(
        [num_windows(source, config.train.sequence_length) for source in data.train],
        batch_size=config.train.batch_size,
        seed=config.seed,
        weights=config.data.weights,
        stage_starts=config.data.stage_starts,
    )


def open_workdir(flag: str | None) -> Path:
    """The run's directory as an absolute path, created if need be.

    Raises:
      SpiralError: not given, or not writable.
    """
    if not flag:
        raise SpiralError("--workdir is missing: the directory to keep the run in")
    workdir = Path(flag).expanduser().resolve()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".probe-{os.getpid()}"
        probe.write_text("")
        probe.unlink(missing_ok=True)  # the processes of a run may have one id on their hosts
    except OSError as error:
        raise SpiralError(f"--workdir {workdir} is not writable: {error.strerror}") from None
    return workdir


def parse_profile(flag: str) -> range:
    """FIRST:LAST to the range of steps to trace."""
    if not flag:
        return range(0)
    first, _, last = flag.partition(":")
    if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        raise SpiralError(f"--profile is {flag!r}; allowed: FIRST:LAST, two steps with 1 <= FIRST <= LAST")
    return range(int(first), int(last) + 1)


if __name__ == "__main__":
    command.run("train", __doc__, define, main)
