"""Scores a run: exact loss, perplexity and bits per byte, or tasks of the LM Evaluation Harness.

Without --tasks, every token of a text is predicted once, after a separator:

python -m spiral_jax.evaluate --workdir=runs/quickstart                 on the run's own validation text
python -m spiral_jax.evaluate --workdir=runs/quickstart --input=FILE    on a UTF-8 text file, or a token store
python -m spiral_jax.evaluate --workdir=DIR --stride=64 --json          overlapping windows; JSON on stdout
python -m spiral_jax.evaluate --workdir=DIR --documents=FILE.json       also nats and tokens of each document

Of a run with data.examples, held-out examples are scored instead, --limit of them or 512: the loss, and how many
answers were right, by group. --documents has them by group, too; its tokens are the examples' sums of weights.

With --tasks (extra harness) the harness asks and this model answers. `paper` stands for the papers' nine tasks; data
comes from the Hugging Face hub, or from files in --tasks_data, which spiral_jax/evaluation/tasks names:

python -m spiral_jax.evaluate --workdir=DIR --tasks=paper --num_fewshot=5
python -m spiral_jax.evaluate --workdir=DIR --tasks=lambada_openai,piqa,wikitext --tasks_data=FILES --limit=100
python -m spiral_jax.evaluate --workdir=DIR --tasks=my_task.yaml    a task of your own, as the harness describes them

On several processes, started as those of spiral_jax.train are, all devices compute together and process 0 prints.
"""

import dataclasses
import functools
import json
import sys
import time

import jax
import numpy as np
from absl import flags
from etils import epath

from spiral_jax import command
from spiral_jax.corpus.sources import find_sources, read_text
from spiral_jax.data.bucket import is_bucket
from spiral_jax.data.json_files import finite, for_stdout, write_json
from spiral_jax.data.prepared import storage_of
from spiral_jax.data.storage import expanded, is_url, writable_path
from spiral_jax.data.store import TokenStore
from spiral_jax.data.tokenizers import Tokenizer
from spiral_jax.data.windows import TokensInMemory, TokenSource
from spiral_jax.errors import SpiralError, require
from spiral_jax.evaluation.held_out import ExampleScorer, score_examples
from spiral_jax.evaluation.perplexity import WindowScorer, nats_of_documents, score
from spiral_jax.evaluation.task_evaluation import TaskEvaluation, open_tasks
from spiral_jax.kernels.choose import backend_for
from spiral_jax.parallel.heap import keep_freed_memory
from spiral_jax.parallel.mesh import MeshConfig, abstract_mesh, make_mesh, rounded_to_mesh
from spiral_jax.parallel.placed_model import PlacedModel, place
from spiral_jax.parallel.process_flags import define_processes
from spiral_jax.parallel.processes import Processes
from spiral_jax.progress import Report
from spiral_jax.run.config import RunConfig
from spiral_jax.run.directory import run_directory, tokenizer_of, validation_store_of
from spiral_jax.run.inputs import open_examples
from spiral_jax.run.reading import SavedRun, reading

# Held-out examples that are scored where --limit does not say how many.
EXAMPLES = 512


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "directory of the run", flag_values=values)
    flags.DEFINE_string("input", "", "text file or token store; default: the run's validation text", flag_values=values)
    flags.DEFINE_integer("step", None, "checkpoint to score; default: the newest", flag_values=values)
    flags.DEFINE_integer("stride", None, "advance of the windows; default: the sequence length", flag_values=values)
    flags.DEFINE_integer("batch_size", None, "windows at a time; default: a micro-batch", flag_values=values)
    flags.DEFINE_bool("json", False, "print JSON only", flag_values=values)
    flags.DEFINE_string("documents", "", "JSON file for nats and tokens of each document", flag_values=values)
    flags.DEFINE_list("tasks", [], "tasks of the LM Evaluation Harness, or paper", flag_values=values)
    shots = "solved examples before each question of --tasks; default: a task's own number, or none"
    flags.DEFINE_integer("num_fewshot", None, shots, flag_values=values)
    flags.DEFINE_integer("limit", 0, "documents of each of --tasks, or examples; 0 for all, or 512", flag_values=values)
    flags.DEFINE_string("tasks_data", "", "folder with the data of --tasks; default: the hub", flag_values=values)
    flags.DEFINE_string("output", "", "JSON file for --tasks; default: one in WORKDIR/lm_eval", flag_values=values)
    define_processes(values)


def main(values: flags.FlagValues) -> None:
    check_flags(values)
    with command.joined(values) as processes:
        workdir = run_directory(values.workdir)
        with reading(workdir, values.step) as saved:
            if values.tasks:
                evaluate_tasks(values, saved, processes)
            elif not values.input and saved.config(processes).data.examples:
                evaluate_examples(values, saved, processes)
            else:
                evaluate_text(values, saved, processes)


def evaluate_text(values: flags.FlagValues, saved: SavedRun, processes: Processes) -> None:
    """Perplexity."""
    require(values.limit == 0, "--limit", values.limit, "only with --tasks, or for a run with data.examples")
    workdir, step = saved.workdir, saved.step
    config = on_these_devices(saved.config(processes), values.batch_size)
    tokenizer = tokenizer_of(workdir)
    source, utf8_bytes = open_input(values.input, workdir, tokenizer, config)
    documents = documents_of(values.documents)
    taken: list[np.ndarray] = []

    placed = placed_model(config)
    params = saved.restore(placed.abstract_params)
    result = score(
        WindowScorer(config, placed),
        params,
        source,
        utf8_bytes=utf8_bytes,
        separator_id=tokenizer.separator_id,
        sequence_length=config.train.sequence_length,
        batch_size=config.train.batch_size,
        stride=values.stride,
        report=progress_of(values, processes),
        take=taken.append if documents else lambda nats_N: None,
    )
    if not processes.is_main:
        return
    if documents:
        offsets_M = source.document_offsets_M if isinstance(source, TokenStore) else np.array([0, source.num_tokens])
        nats_D, tokens_D = nats_of_documents(np.concatenate(taken), offsets_M)
        write_json(documents, finite({"input": source.name, "nats": nats_D.tolist(), "tokens": tokens_D.tolist()}))
    report = {
        "input": source.name,
        "step": step,
        "tokens": result.tokens,
        "utf8_bytes": utf8_bytes,
        "loss": result.loss,
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
    }
    if values.json:
        print(json.dumps(finite(report), indent=2, allow_nan=False))
        return
    print(f"{source.name}: {result.tokens:,} tokens, {utf8_bytes:,} bytes, checkpoint of step {step}")
    print(f"loss {result.loss:.4f} nats per token")
    print(f"perplexity {result.perplexity:.4f}")
    print(f"bits per byte {result.bits_per_byte:.4f}")


def evaluate_examples(values: flags.FlagValues, saved: SavedRun, processes: Processes) -> None:
    """Loss and right answers on held-out examples."""
    require(values.stride is None, "--stride", values.stride, "none for data.examples")
    config = on_these_devices(saved.config(processes), values.batch_size)
    documents = documents_of(values.documents)
    stream = open_examples(config)
    placed = placed_model(config)
    params = saved.restore(placed.abstract_params)
    result = score_examples(
        ExampleScorer(config, placed),
        params,
        stream,
        values.limit or EXAMPLES,
        report=progress_of(values, processes),
    )
    if not processes.is_main:
        return
    by_group = {str(group): counts for group, counts in result.by_group.items()}
    if documents:
        found = {"nats": result.nats_N.tolist(), "tokens": result.weights_N.tolist(), "by_group": by_group}
        write_json(documents, finite({"input": config.data.examples} | found))
    report = {
        "examples": config.data.examples,
        "step": saved.step,
        "windows": len(result.nats_N),
        "answers": sum(asked for _, asked in result.by_group.values()),
        "loss": result.loss,
        "accuracy": result.accuracy,
        "by_group": by_group,
    }
    if values.json:
        print(json.dumps(finite(report), indent=2, allow_nan=False))
        return
    print(f"{stream.name}: {report['answers']:,} answers in {len(result.nats_N):,} windows, step {saved.step}")
    print(f"loss {result.loss:.4f} nats per answer")
    print(f"accuracy {result.accuracy:.2%}")
    for group, (correct, asked) in result.by_group.items():
        print(f"group {group:>3}: {correct / asked:7.2%} of {asked:,}")


def evaluate_tasks(values: flags.FlagValues, saved: SavedRun, processes: Processes) -> None:
    """Tasks of the LM Evaluation Harness."""
    workdir, step = saved.workdir, saved.step
    config = on_these_devices(saved.config(processes), values.batch_size)
    tokenizer = tokenizer_of(workdir)
    opened = open_tasks(
        values.tasks,
        tasks_data=values.tasks_data,
        num_fewshot=values.num_fewshot,
        limit=values.limit,
        max_length=config.train.sequence_length,
    )
    placed = placed_model(config)
    params = saved.restore(placed.abstract_params)
    about = {"model_args": {"workdir": str(workdir), "step": step}}
    results = TaskEvaluation(opened, config, placed, tokenizer, processes)(params, about=about)
    if not processes.is_main:
        return

    from spiral_jax.evaluation import harness

    shots = "-".join(map(str, sorted(set(results["n-shot"].values()))))
    name = f"step_{step:08d}_{shots}shot_{time.strftime('%Y-%m-%dT%H-%M-%S')}.json"
    path = writable_path("--output", values.output) if values.output else workdir / "lm_eval" / name
    harness.save(results, path)
    if values.json:
        print(for_stdout(harness.as_json(results)))
        return
    print(f"{workdir}, checkpoint of step {step}, {shots}-shot"
          + (f", the first {values.limit} documents of each task" if values.limit else ""))  # fmt: skip
    print(f"{harness.as_text(results)}\nresults      {path}")


def progress_of(values: flags.FlagValues, processes: Processes) -> Report:
    """What takes lines about the progress: standard error, but not beside --json."""
    return (lambda line: None) if values.json else functools.partial(processes.say, file=sys.stderr)


def documents_of(flag: str) -> epath.Path | None:
    """Where --documents go; None for nowhere.

    Raises:
      SpiralError: its folder is not there.
    """
    path = writable_path("--documents", flag) if flag else None
    there = path is None or is_bucket(path) or path.parent.is_dir()
    require(there, "--documents", flag, "a file in a folder that exists")
    return path


def check_flags(values: flags.FlagValues) -> None:
    """Raises SpiralError where flags contradict each other or are out of range."""
    for name in ("num_fewshot", "limit"):
        require((getattr(values, name) or 0) >= 0, f"--{name}", getattr(values, name), "0 or more")
    with_tasks, without_tasks = ("num_fewshot", "tasks_data", "output"), ("input", "stride", "documents")
    for name in without_tasks if values.tasks else with_tasks:
        if values[name].value not in ("", 0, None):
            other = "without" if values.tasks else "with"
            raise SpiralError(f"--{name} is {values[name].value}; allowed: only {other} --tasks")


def on_these_devices(config: RunConfig, batch_size: int | None) -> RunConfig:
    """The run's configuration with a mesh of the devices here and a batch that divides over it.

    Raises:
      SpiralError: a batch size below 1.
    """
    batch_size = config.train.micro_batch_size if batch_size is None else batch_size
    require(batch_size >= 1, "--batch_size", batch_size, "1 or more")

    def on(mesh: MeshConfig) -> RunConfig:
        rows = rounded_to_mesh(batch_size, abstract_mesh(mesh, jax.device_count()))
        # The attention that was asked for may be one that these devices do not have.
        train = dataclasses.replace(config.train, batch_size=rows, accumulation=1, attention="auto")
        changed = dataclasses.replace(config, mesh=mesh, train=train)
        changed.check_mesh(jax.device_count())
        return changed

    try:
        return on(config.mesh)
    except SpiralError:
        return on(MeshConfig())  # the run was trained on other devices: replicas fit any number


def placed_model(config: RunConfig) -> PlacedModel:
    """The run's model on the devices here."""
    command.compute_in(config.model.dtype)
    mesh = make_mesh(config.mesh)
    return place(config.model, mesh, backend_for(mesh, config.model, config.train.attention))


def open_input(
    place: str, workdir: epath.Path, tokenizer: Tokenizer, config: RunConfig, flag: str = "--input"
) -> tuple[TokenSource, int]:
    """The tokens to score and the UTF-8 bytes they stand for.

    Args:
      place: a text file or token store; "" for the run's validation text.
      workdir: of the run.
      tokenizer: of the model.
      config: of the run.
      flag: what named the place, for errors.

    Raises:
      SpiralError: no such input, empty or undecodable text, a store of another tokenizer.
    """
    path = expanded(flag, "" if is_url(place) else place)
    if place and not is_url(place) and not path.is_dir():
        sources = find_sources((place,), field=flag)
        if len(sources) > 1:
            raise SpiralError(f"{flag} matches {len(sources)} files; allowed: one text file or token store")
        if sources[0].format != "text":  # its braces and quotes would be scored, too
            allowed = "a text file, or a token store, which python -m spiral_jax.prepare makes of it"
            raise SpiralError(f"{flag} is {place!r}, which is {sources[0].format}; allowed: {allowed}")
        text = read_text(sources[0])
        tokens_N = tokenizer.encode(text)
        if not tokens_N.size:
            raise SpiralError(f"{flag} is {place!r}, which is empty; allowed: a file with text")
        return TokensInMemory(place, tokens_N), len(text.encode())
    storage = storage_of(config.data)
    if place:
        store = TokenStore.open(place if is_url(place) else path, storage)
    else:
        store = validation_store_of(workdir, storage, flag)
    store.check_tokenizer(tokenizer)
    store.check_vocab_size(config.model.vocab_size)
    return store, store.utf8_bytes


if __name__ == "__main__":
    keep_freed_memory()
    command.run("evaluate", __doc__, define, main)
