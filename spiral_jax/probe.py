"""Looks into the core of a looped model: what its heads attend to, and how its states change from pass to pass.

python -m spiral_jax.probe --workdir=runs/quickstart                        on the run's own validation text
python -m spiral_jax.probe --workdir=DIR --data=FILE --samples=500          on a UTF-8 text file, or a token store
python -m spiral_jax.probe --workdir=EXPORTED --data=FILE --output=DIR      an exported folder; where to write
python -m spiral_jax.probe --workdir=SPIRAL --beside=LOOPED --data=FILE     two models, and a figure of both

Writes arrays (probes.npz), tables (CSV) and figures (PNG) into a folder; docs/probes.md says what each number is. On
several processes, started as those of spiral_jax.train are, all devices compute together and process 0 writes.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from etils import epath

from spiral_jax import __version__, command
from spiral_jax.convert.folder import is_huggingface, output_folder, read_config, read_params
from spiral_jax.data.json_files import read_json_object, write_json
from spiral_jax.data.staging import whole_folder
from spiral_jax.data.storage import writable_path
from spiral_jax.data.tokenizers import load_tokenizer
from spiral_jax.data.windows import TokenSource, num_windows
from spiral_jax.errors import SpiralError, Unreachable, require
from spiral_jax.evaluate import on_these_devices, open_input, placed_model
from spiral_jax.model.config import ModelConfig
from spiral_jax.parallel.heap import keep_freed_memory
from spiral_jax.parallel.placed_model import PlacedModel
from spiral_jax.parallel.process_flags import define_processes
from spiral_jax.parallel.processes import Processes
from spiral_jax.probes import figures, files
from spiral_jax.probes.measure import Findings, measure
from spiral_jax.progress import Report
from spiral_jax.run.config import RunConfig
from spiral_jax.run.directory import RUN_OR_EXPORT, run_directory, tokenizer_of
from spiral_jax.run.reading import reading
from spiral_jax.training.config import TrainConfig

# Says that a folder is a probe's, which another one may replace.
ABOUT, FORMAT = "about.json", "spiral_jax.probe"
# Within the folder of the first model, that of the second.
OTHER = "beside"
FILES = (ABOUT, files.ARRAYS, *files.TABLES, figures.HEADS, figures.STATES, figures.WEIGHTS, figures.BESIDE, OTHER)
# Sequences at a time of a model that is no run, which would say.
BATCH_SIZE = 8


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "directory of the run, or an exported folder", flag_values=values)
    flags.DEFINE_integer("step", None, "checkpoint of --workdir; default: the newest", flag_values=values)
    flags.DEFINE_string("data", "", "text file or token store; default: the run's validation text", flag_values=values)
    flags.DEFINE_integer("samples", 500, "sequences to look at", flag_values=values)
    flags.DEFINE_integer("sequence_length", None, "tokens of a sequence; default: as in training", flag_values=values)
    flags.DEFINE_integer("seed", 0, "of the choice of sequences and tokens", flag_values=values)
    flags.DEFINE_integer("batch_size", None, "sequences at a time; default: a micro-batch", flag_values=values)
    flags.DEFINE_string("beside", "", "another run or exported folder to set beside it", flag_values=values)
    flags.DEFINE_string("output", "", "folder to make; default: probes/ and the model's name", flag_values=values)
    define_processes(values)


def main(values: flags.FlagValues) -> None:
    check_flags(values)
    with command.joined(values) as processes:
        subjects = [open_subject(values, "workdir", values.step, processes)]
        if values.beside:
            subjects.append(open_subject(values, "beside", None, processes))
            same = subjects[0].folder == subjects[1].folder
            require(not same, "--beside", values.beside, "another folder than --workdir")
        place = values.output or str(Path("probes", subjects[0].folder.name))
        output = output_folder("output", place, files_of_probe(place))
        # Made before anything is computed, so that a place that cannot be written is known.
        with whole_folder(output) if processes.is_main else contextlib.nullcontext() as made:
            findings = [
                probe(subject, values, lambda line: processes.say(line, file=sys.stderr)) for subject in subjects
            ]
            if made is not None:
                write(made, subjects, findings, values)
        if processes.is_main:
            print("\n\n".join(map(as_text, subjects, findings)))
            print(
                f"\nfigures      {output / (figures.BESIDE if values.beside else figures.HEADS)}\nthe rest     {output}"
            )


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model to look into, and the text to do it on.

    Attributes:
      folder: its run, or the exported folder.
      step: of its checkpoint; None for an exported folder.
      config: on the devices here.
      source: the text.
      length: tokens of a sequence.
    """

    folder: epath.Path
    step: int | None
    config: RunConfig
    source: TokenSource
    length: int

    @property
    def title(self) -> str:
        return self.folder.name if self.step is None else f"{self.folder.name}, step {self.step:,}"


def check_flags(values: flags.FlagValues) -> None:
    """Raises SpiralError where flags are out of range or matplotlib is missing."""
    for name, least in (("samples", 1), ("seed", 0), ("sequence_length", 1)):
        value = values[name].value
        require(value is None or value >= least, f"--{name}", value, f"{least} or more")
    figures.check_matplotlib()


def open_subject(values: flags.FlagValues, flag: str, step: int | None, processes: Processes) -> Subject:
    """Opens all but the parameters of the model that a flag names.

    Raises:
      SpiralError: no such model, or none with a core; no such text, of another tokenizer or too short.
    """
    folder = run_directory(values[flag].value, f"--{flag}", RUN_OR_EXPORT)
    if is_huggingface(folder):
        require(step is None, "--step", step, f"none, as {folder} is no run")
        if not values.data:
            raise SpiralError(f"--data is missing; allowed: a text file or token store, as {folder} is no run with one")
        model, longest = read_config(folder)
        check_core(folder, model)
        tokenizer = load_tokenizer(folder)
        allowed = f"{tokenizer.vocab_size} or more, the ids of its tokenizer"
        require(tokenizer.vocab_size <= model.vocab_size, f"{folder}: vocab_size", model.vocab_size, allowed)
        config = RunConfig(model=model, train=TrainConfig(batch_size=BATCH_SIZE, sequence_length=longest))
    else:
        with reading(folder, step) as saved:
            config, step = saved.config(processes), saved.step
        check_core(folder, config.model)
        tokenizer = tokenizer_of(folder)
    config = on_these_devices(config, values.batch_size)
    length = config.train.sequence_length if values.sequence_length is None else values.sequence_length
    shortest = max(level.chunk - level.offset for level in config.model.schedule)
    require(length >= shortest, "--sequence_length", length, f"{shortest} or more, for a chunk in every iteration")
    source, _ = open_input(values.data, folder, tokenizer, config, flag="--data")
    if source.num_tokens <= length:
        raise SpiralError(
            f"{source.name} has {source.num_tokens} tokens; allowed: at least {length + 1}, a sequence and one more"
        )
    windows = num_windows(source, length)
    allowed = f"1 to {windows}, the sequences of {length} tokens in {source.name}"
    require(values.samples <= windows, "--samples", values.samples, allowed)
    return Subject(folder, step, config, source, length)


def check_core(folder: epath.Path, model: ModelConfig) -> None:
    """Raises SpiralError for a model whose core has no heads to look at."""
    if not model.chunks or not model.core_layers:
        found = f"{model.notation}, which has no core"
        raise SpiralError(f"the model of {folder} is {found}; allowed: a model with a loop of 1 layer or more")


def probe(subject: Subject, values: flags.FlagValues, report: Report) -> Findings:
    """What is found out about a model."""
    placed = placed_model(subject.config)
    return measure(
        placed,
        read_placed(subject, placed),
        subject.source,
        length=subject.length,
        samples=values.samples,
        batch_size=subject.config.train.batch_size,
        seed=values.seed,
        report=report,
    )


def read_placed(subject: Subject, placed: PlacedModel) -> Any:
    """The parameters, on the devices.

    Raises:
      SpiralError: they are damaged.
    """
    if subject.step is None:
        return jax.device_put(read_params(subject.folder, subject.config.model), placed.param_shardings)
    with reading(subject.folder, subject.step) as saved:
        return saved.restore(placed.abstract_params)


def write(made: Path, subjects: Sequence[Subject], findings: Sequence[Findings], values: flags.FlagValues) -> None:
    """Fills the folder; that of a second model is within it."""
    for folder, subject, found in zip((made, made / OTHER), subjects, findings, strict=False):
        folder.mkdir(exist_ok=True)
        write_json(folder / ABOUT, about(subject, values))
        files.write_findings(found, folder)
        figures.draw_findings(found, subject.title, folder)
    if len(subjects) > 1:
        titles = [subject.title for subject in subjects]
        if titles[0] == titles[1]:
            titles = [f"{subject.folder.parent.name}/{subject.title}" for subject in subjects]
        figures.draw_beside(list(zip(titles, findings, strict=True)), made)


def about(subject: Subject, values: flags.FlagValues) -> dict[str, Any]:
    """What the numbers are of."""
    model = subject.config.model
    return {
        "format": FORMAT,
        "folder": str(subject.folder),
        "step": subject.step,
        "model": model.notation,
        "topology": model.topology,
        "dtype": model.dtype,
        "parameters": model.total_parameters,
        "data": subject.source.name,
        "data_fingerprint": subject.source.fingerprint,
        "samples": values.samples,
        "sequence_length": subject.length,
        "seed": values.seed,
        "spiral_jax": __version__,
    }


def files_of_probe(place: str) -> frozenset[str]:
    """The files that a probe before left in a folder, which another one may replace."""
    try:
        is_probe = read_json_object(writable_path("--output", place) / ABOUT).get("format") == FORMAT
    except Unreachable:
        raise
    except SpiralError:
        is_probe = False
    return frozenset(FILES if is_probe else ())


def as_text(subject: Subject, findings: Findings) -> str:
    """The means over heads, as lines."""
    lines = [
        f"{subject.title}: {findings.config.notation} {findings.config.topology}, {findings.samples:,} sequences of "
        f"{findings.length:,} tokens",
        "                              key-marginal entropy      local attention mass",
        "iteration  resolution  length  all heads  dynamic        all heads  dynamic",
    ]
    for t, level in enumerate(findings.config.schedule):
        means = []
        for metric, value_TxCxH in findings.metrics.items():
            means += [value_TxCxH[t].mean(), value_TxCxH[t][findings.dynamic[metric]].mean()]
        lines.append(
            f"{t:<9}  {findings.resolutions[t]:<10}  {level.num_chunks(findings.length):<6}  "
            "{:<9.4f}  {:<13.4f}  {:<9.4f}  {:.4f}".format(*means)
        )
    return "\n".join(lines)


if __name__ == "__main__":
    keep_freed_memory()
    command.run("probe", __doc__, define, main)
