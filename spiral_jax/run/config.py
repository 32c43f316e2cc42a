"""One run's configuration: the rooms' frozen dataclasses, composed from an ml_collections ConfigDict and checked.

An experiment file starts from `default_config()`, a ConfigDict with every field at its default, and sets what it
wants; `RunConfig.from_dict` turns it into dataclasses whose construction validates each field.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

import ml_collections
from etils.epath import Path
from ml_collections import config_dict

from spiral_jax.convert.architecture import architecture
from spiral_jax.convert.upcycle import UpcycleConfig
from spiral_jax.data.config import DataConfig
from spiral_jax.data.examples import check_examples
from spiral_jax.data.json_files import write_json
from spiral_jax.errors import SpiralError, require
from spiral_jax.evaluation.config import EvaluationConfig
from spiral_jax.model.config import ModelConfig
from spiral_jax.model.declarations import check_operators
from spiral_jax.parallel.deadlines import DeadlineConfig
from spiral_jax.run.checkpoint import CheckpointConfig
from spiral_jax.run.metrics import LoggingConfig
from spiral_jax.run.summary import SummaryConfig
from spiral_jax.training.config import StepConfig
from spiral_jax.training.optimizers import check_optimizer
from spiral_jax.training.schedules import schedules

# What may differ between the run in a directory and the command that resumes it: where and how it runs and what is
# watched, not what is computed. `train.steps` and the mixture have rules of their own (`check_resume`).
MUTABLE = (
    "mesh.",
    "checkpoint.",
    "deadlines.",
    "evaluation.",
    "logging.",
    "summary.",
    "divergence.",
    "train.accumulation",
    "train.attention",
    "train.gather_core",
    "model.remat",
    # Where the tokens are; that they are the same ones is checked by their fingerprints.
    "data.stores",
    "data.validation_store",
    "data.workers",
    "data.longest_record",
    "data.retry_seconds",
    "data.cache_dir",
    "data.cache_gigabytes",
    "data.read_threads",
    "data.prefetch_batches",
)
# Of any field: integers that NumPy holds, and no more entries than a configuration can mean.
_LARGEST_INTEGER, _LONGEST = 2**63 - 1, 100_000


@dataclasses.dataclass(frozen=True)
class RunConfig(StepConfig):
    """Everything that decides a run.

    Attributes:
      seed: of the initial parameters, the order of the data and the sample at the end.
    """

    seed: int = 0
    upcycle: UpcycleConfig = UpcycleConfig()
    data: DataConfig = DataConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    deadlines: DeadlineConfig = DeadlineConfig()
    logging: LoggingConfig = LoggingConfig()
    summary: SummaryConfig = SummaryConfig()

    def __post_init__(self):
        require(0 <= self.seed < 2**32, "seed", self.seed, f"0 to {2**32 - 1}")
        schedules[self.optimizer.schedule](self.optimizer, self.train.steps).check()
        if self.data.examples and self.evaluation.batches == 0:
            require(False, "evaluation.batches", 0, "1 or more with data.examples, which do not end")
        length = self.train.sequence_length
        for t, level in enumerate(self.model.schedule):
            for field, value, most in (("chunks", level.chunk, length), ("shifts", level.shift, length - 1)):
                allowed = f"up to {most}, as train.sequence_length is {length}"
                require(value <= most, f"model.{field}[{t}]", value, allowed)

    @property
    def brings_targets(self) -> bool:
        return bool(self.data.examples)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RunConfig":
        """Builds and validates.

        Args:
          values: nested mapping (ConfigDict, or parsed `config.json`); fields left out keep their default.

        Raises:
          SpiralError: an unknown field, a value of the wrong type or outside what is allowed.
        """
        config = _from_mapping(cls, values, "")
        check_operators(config.model)
        check_examples(config.data)
        check_optimizer(config.optimizer, config.train.steps, config.model)
        return config

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionary that JSON can hold."""
        return dataclasses.asdict(self)

    def save(self, path: Path) -> None:
        """Writes `config.json`, whole or not at all."""
        write_json(path, self.to_dict())

    def check_resume(self, saved: "RunConfig", step: int) -> None:
        """Whether this configuration continues a run that was saved after `step` steps.

        Raises:
          SpiralError: naming the field that differs, its saved and its given value.
        """
        if step == 0:
            self._check_start(saved.model)
            return
        before, now = flatten(saved.to_dict()), flatten(self.to_dict())
        for field in sorted(before.keys() | now.keys()):
            was, given = before.get(field), now.get(field)
            if was == given or field.startswith(MUTABLE):
                continue
            if field == "train.steps":
                self._check_steps(saved, step)
                continue
            if field == "train.skip_steps":
                self._check_skipped(saved, step)
                continue
            if field in ("data.weights", "data.stage_starts"):
                self._check_stages(saved, step)
                continue
            raise SpiralError(f"{field} is {given!r}; allowed: {was!r}, which the run was saved with")

    def _check_start(self, imported: ModelConfig) -> None:
        """At step 0 parameters were imported and nothing is trained: all but the architecture is free."""
        if self.upcycle.source:
            raise SpiralError(
                f"upcycle.source is {self.upcycle.source!r}; allowed: nothing, as the run has imported parameters"
            )
        before, now = architecture(imported), architecture(self.model)
        for field, was in before.items():
            if now.get(field) != was:
                raise SpiralError(f"model.{field} is {now.get(field)!r}; allowed: {was!r}, as in the imported model")

    def _check_steps(self, saved: "RunConfig", step: int) -> None:
        was, given = saved.train.steps, self.train.steps
        found = f"train.steps is {given}; allowed: {was}, which the run was saved with"
        if given < step:
            raise SpiralError(f"{found}, or {step} or more, as {step} steps are done")
        if self.optimizer.stable_until(was) == 0:
            others = [name for name in schedules if schedules[name](self.optimizer, was).stable_until() > 0]
            raise SpiralError(
                f"{found}, as the {self.optimizer.schedule} schedule depends on it from the first step; others with "
                f"{', '.join(others)}"
            )
        for steps in (was, given):
            low, high = self.optimizer.resolved_warmup(steps), self.optimizer.stable_until(steps)
            if not low <= step <= high:
                raise SpiralError(
                    f"{found}: after step {step} it may change only where the learning rate is constant, which with "
                    f"{steps} steps is from step {low} to {high}"
                )

    def _check_skipped(self, saved: "RunConfig", step: int) -> None:
        was, given = ({n for n in config.train.skip_steps if n <= step} for config in (saved, self))
        if was != given:
            raise SpiralError(
                f"train.skip_steps names {sorted(given) or 'none'} of the {step} steps that are done; allowed: "
                f"{sorted(was) or 'none'}, as the run was saved with, and any that come"
            )

    def _check_stages(self, saved: "RunConfig", step: int) -> None:
        was, given = saved.data.stages_before(step), self.data.stages_before(step)
        if was != given:
            raise SpiralError(
                f"data.weights with data.stage_starts is {given} (first step, weights) for the {step} steps that are "
                f"done; allowed: {was}, which the run was saved with"
            )


def default_config() -> ml_collections.ConfigDict:
    """Every field at its default, as experiments and command lines change it."""
    return _to_config_dict(RunConfig())


def _to_config_dict(config) -> ml_collections.ConfigDict:
    values = ml_collections.ConfigDict()
    for field, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, field)
        if dataclasses.is_dataclass(value):
            value = _to_config_dict(value)
        elif value is None:
            (kind,) = (option for option in typing.get_args(hint) if option is not type(None))
            value = config_dict.placeholder(typing.get_origin(kind) or kind)
        values[field] = value
    return values


def _from_mapping(cls, values: Mapping[str, Any], prefix: str):
    hints = typing.get_type_hints(cls)
    arguments = {}
    for name, value in values.items():
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else f"; allowed: {', '.join(hints)}"
            raise SpiralError(f"{prefix}{str(name)[:100]} is not a field of the configuration{hint}")
        if dataclasses.is_dataclass(hints[name]):
            is_room = isinstance(value, Mapping | ml_collections.ConfigDict)
            require(is_room, f"{prefix}{name}", value, "fields and their values")
            arguments[name] = _from_mapping(hints[name], value, f"{prefix}{name}.")
        else:
            arguments[name] = _checked(hints[name], value, f"{prefix}{name}")
    return cls(**arguments)


def _checked(hint, value, field: str):
    """The value as its annotated type, or an error; int counts as float, a list as a tuple."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        (hint,) = (option for option in options if option is not type(None))
        return _checked(hint, value, field)
    if origin is tuple:
        require(isinstance(value, list | tuple), field, value, "a tuple")
        if len(value) > _LONGEST:
            raise SpiralError(f"{field} has {len(value)} entries; allowed: up to {_LONGEST}")
        return tuple(_checked(options[0], entry, f"{field}[{i}]") for i, entry in enumerate(value))
    if origin is typing.Literal:
        hint = str
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        require(abs(value) <= _LARGEST_INTEGER, field, value, f"a number of at most {_LARGEST_INTEGER}")
        return float(value)
    is_kind = isinstance(value, hint) and not (hint is int and isinstance(value, bool))
    require(is_kind, field, value, f"a value of type {hint.__name__}")
    match value:
        case float():
            require(math.isfinite(value), field, value, "a finite number")
        case int():
            require(abs(value) <= _LARGEST_INTEGER, field, value, f"a number of at most {_LARGEST_INTEGER}")
        case str():
            require("\0" not in value, field, value, "a text without NUL characters")
    return value


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields by their dotted names, as command lines have them."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
