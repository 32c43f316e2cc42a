"""The record of one finished run: one JSON file, written whole by the runner and read by the report.

It is `experiments/results/STUDY/EDITION/records/RUN.json`, under 100 kB, and committed: what the run was (study, arm,
seed, code, data, configuration), what it took and what came of it. This file is the one place that knows its form.
"""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from spiral_jax.data.atomic import write_text
from spiral_jax.data.json_files import read_json_object
from spiral_jax.errors import SpiralError, require

RESULTS = Path(__file__).parent / "results"
FORMAT = 1
MOST_BYTES, MOST_ROWS, MOST_DOCUMENTS = 100_000, 200, 4_000

Stage = Literal["tune", "seed"]
Status = Literal["finished", "diverged", "failed"]
Entry = str | int | float | bool


@dataclasses.dataclass(frozen=True)
class Code:
    """The tree that ran.

    Attributes:
      commit: of git, 40 digits; empty outside a checkout.
      changes: hash of `git diff HEAD`; empty where nothing differed.
      package: hash of the files of the package that training and evaluation import: equal in runs of the same code,
        whatever else was committed between them.
    """

    commit: str
    changes: str
    package: str


@dataclasses.dataclass(frozen=True)
class Parameters:
    """How many the model has; `total` counts input and output embedding."""

    non_embedding: int
    total: int


@dataclasses.dataclass(frozen=True)
class Flops:
    """Of training, forward and backward, causal attention counted in full: `ModelConfig.train_flops_per_token`."""

    per_token: float
    total: float


@dataclasses.dataclass(frozen=True)
class Seconds:
    """What the run's training takes.

    Attributes:
      train: measured: steps x the median step, without compilation, evaluation and checkpoints; 0 where no step ended.
      predicted: of all steps, by slice, as `v5e:4x4`; None where the slice cannot hold the run.
    """

    train: float
    predicted: dict[str, float | None]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The trained model on texts that it was not trained on.

    Attributes:
      nats: mean over all tokens, float64.
      documents: nats per token of each document, rounded to float16, in the order of the store: paired across runs.
      tokens: that were predicted in each document; of examples, the sum of the weights of what was asked.
    """

    nats: float
    documents: tuple[float, ...]
    tokens: tuple[int | float, ...]


@dataclasses.dataclass(frozen=True)
class Record:
    """One run of a study.

    Attributes:
      study, edition, run: names; `run` is also the file's.
      arm: which of the things that are compared.
      factors: what the arm stands for, for axes of plots and columns of tables, as {"size": "410m", "ratio": 0.5}.
      seed: of parameters and data order; runs of one seed read the same batches.
      stage: "tune", a trial of a learning rate, or "seed", a run whose result counts.
      learning_rate: the peak.
      status: how it ended; `reason` says why where it is not "finished", in a line.
      command: that makes it.
      code, data: what it was made of; `data` has a hash by name, as {"train": ..., "validation": ...}.
      config_hash: of all fields that shape a run but seed, learning rate, steps and the model: equal in runs that may
        be compared (`design.comparable_hash`).
      config: dotted fields that differ from their defaults.
      machine, versions: it ran on, and with.
      parameters, flops, seconds: counts and times.
      tokens: trained on.
      curve: rows (step, tokens, nats of training), at most 200 of the run's; nats are means of the steps between.
      evaluation: by name of the texts, as "validation"; empty unless the run finished.
      by_depth: correct answers and questions by task and depth of what they depend on; empty for most studies.
      tasks: by number of solved examples before each question, the numbers of the LM Evaluation Harness, as
        {"5": {"piqa/acc_norm": 0.7}}; empty where the study asks none.
    """

    study: str
    edition: str
    run: str
    arm: str
    factors: dict[str, Entry]
    seed: int
    stage: Stage
    learning_rate: float
    status: Status
    reason: str
    command: str
    code: Code
    data: dict[str, str]
    config_hash: str
    config: dict[str, Any]
    machine: str
    versions: dict[str, str]
    parameters: Parameters
    flops: Flops
    tokens: int
    seconds: Seconds
    curve: tuple[tuple[int, int, float], ...]
    evaluation: dict[str, Evaluation]
    by_depth: dict[str, dict[str, tuple[int, int]]] = dataclasses.field(default_factory=dict)
    tasks: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for name, evaluation in self.evaluation.items():
            same = len(evaluation.documents) == len(evaluation.tokens)
            require(same, f"evaluation.{name}.documents", len(evaluation.documents), "as many as tokens")
        require(len(self.curve) <= MOST_ROWS, "curve", f"{len(self.curve)} rows", f"up to {MOST_ROWS}")


def folder_of(study: str, edition: str, results: Path = RESULTS) -> Path:
    """Where the records of a study's edition lie."""
    return results / study / edition / "records"


def write(record: Record, folder: Path) -> Path:
    """Writes FOLDER/RUN.json, whole or not at all.

    Raises:
      SpiralError: it would be larger than a record may be, or cannot be written.
    """
    fields = {"format": FORMAT} | dataclasses.asdict(record)
    for evaluation in fields["evaluation"].values():
        evaluation["documents"] = [_half(nats) for nats in evaluation["documents"]]
    # A field a line, so that people can read it and a diff is short.
    text = "{\n" + ",\n".join(f"{json.dumps(n)}: {json.dumps(v, allow_nan=False)}" for n, v in fields.items()) + "\n}\n"
    path = folder / f"{record.run}.json"
    size = len(text.encode("utf-8"))
    require(size < MOST_BYTES, f"{path}", f"{size} bytes", f"under {MOST_BYTES}")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    return path


def read(path: Path) -> Record:
    """A record.

    Raises:
      SpiralError: naming the file and the field that is missing, unknown or something else.
    """
    fields = read_json_object(path)
    try:
        found = fields.pop("format", None)
        require(found == FORMAT, "format", found, str(FORMAT))
        record = _value(Record, fields, "")
        require(record.run == path.stem, "run", record.run, f"{path.stem!r}, as the file is named")
    except SpiralError as error:
        raise SpiralError(f"{path}: {error}") from None
    return record


def read_all(folder: Path) -> tuple[list[Record], list[str]]:
    """All records of a folder by name, and a line for every file that holds none."""
    records, damaged = [], []
    for path in sorted(folder.glob("*.json")):
        try:
            records.append(read(path))
        except SpiralError as error:
            damaged.append(str(error))
    return records, damaged


def thinned(rows: Sequence[tuple[int, int, float]], most: int = MOST_ROWS) -> tuple[tuple[int, int, float], ...]:
    """At most so many rows: of neighbours the last step and tokens, and the mean of the nats that are finite."""
    groups = [group for group in np.array_split(np.arange(len(rows)), min(most, len(rows)) or 1) if group.size]
    curve = []
    for group in groups:
        nats = [rows[i][2] for i in group if math.isfinite(rows[i][2])]
        if nats:
            step, tokens, _ = rows[group[-1]]
            curve.append((step, tokens, round(sum(nats) / len(nats), 5)))
    return tuple(curve)


def _half(nats: float) -> float:
    """The shortest decimal that float16 reads as the same number."""
    return float(str(np.float16(nats)))


def _value(hint: Any, value: Any, field: str) -> Any:
    """JSON as its annotated type.

    Raises:
      SpiralError: naming the field.
    """
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        require(isinstance(value, Mapping), field or "the record", value, "a JSON object")
        hints, prefix = typing.get_type_hints(hint), f"{field}." if field else ""
        needed = {field.name for field in dataclasses.fields(hint) if field.default_factory is dataclasses.MISSING}
        unknown, missing = sorted(value.keys() - hints.keys()), sorted(needed - value.keys())
        if unknown or missing:
            raise SpiralError(f"{prefix}{(unknown or missing)[0]} is {'unknown' if unknown else 'missing'}; "
                              f"allowed: all of {', '.join(hints)}")  # fmt: skip
        return typing.cast(Any, hint)(**{n: _value(hints[n], v, f"{prefix}{n}") for n, v in value.items()})
    if origin is dict:
        require(isinstance(value, Mapping), field, value, "a JSON object")
        return {name: _value(options[1], entry, f"{field}.{name}") for name, entry in value.items()}
    if origin is tuple:
        require(isinstance(value, list), field, value, "a JSON array")
        if options[1:] == (...,):
            return tuple(_value(options[0], entry, f"{field}[{i}]") for i, entry in enumerate(value))
        require(len(value) == len(options), field, value, f"{len(options)} entries")
        return tuple(_value(o, entry, f"{field}[{i}]") for i, (o, entry) in enumerate(zip(options, value, strict=True)))
    if origin is Literal:
        require(value in options, field, value, ", ".join(options))
        return value
    if hint is Any:
        return tuple(value) if isinstance(value, list) else value
    kinds = options if origin in (typing.Union, types.UnionType) else (hint,)
    if float in kinds and isinstance(value, int) and int not in kinds and not isinstance(value, bool):
        value = float(value)
    ok = any(type(value) is kind for kind in kinds)
    require(ok, field, value, " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds))
    require(not isinstance(value, float) or math.isfinite(value), field, value, "a finite number")
    return value
