"""A model's architecture, to and from Hugging Face's `config.json`, and what we refuse (docs/spec.md section 7)."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from spiral_jax.errors import SpiralError, shown
from spiral_jax.model.config import MOST_ITERATIONS, PROGRAM, ModelConfig
from spiral_jax.model.topology import topologies

# Spellings under which `transformers` computes the exact (erf) GELU; its "gelu_accurate" is the tanh approximation.
EXACT_GELU = ("gelu", "gelu_python")

_LARGEST = 2**63  # of a number; an integer of JSON can be of any size, and more than a float holds
_KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "a text", list: "a list", dict: "an object"}


# Fields of every `config.json`, with our names and types; then those that only looped models have.
_COMMON: dict[str, tuple[str, type]] = {
    "vocab_size": ("vocab_size", int),
    "hidden_size": ("d_model", int),
    "num_attention_heads": ("num_heads", int),
    "layer_norm_eps": ("layer_norm_epsilon", float),
}
_LOOPED: dict[str, type] = {
    **dict.fromkeys(("prelude_layers", "core_layers", "coda_layers"), int),
    **dict.fromkeys(("pooling", "allocation", "update_scale"), str),
}


def is_vanilla(config: ModelConfig) -> bool:
    """Whether the model is a plain GPT-NeoX, which `transformers` loads without any code of ours."""
    return not config.chunks and not config.operators.topology.enters


def architecture(config: ModelConfig) -> dict[str, Any]:
    """The fields that parameters are made for, with what they default to; not how the model is computed."""
    values = dataclasses.asdict(config)
    values["offsets"] = tuple(level.offset for level in config.schedule)
    values["shifts"] = tuple(level.shift for level in config.schedule)
    values |= {"memory_slots": None} | topology_fields(config)
    free = ["dtype", *PROGRAM]
    if not config.chunks:
        free += ["shared_core", "pooling", "allocation", "update_scale"]
    return {field: value for field, value in values.items() if field not in free}


def topology_fields(config: ModelConfig) -> dict[str, Any]:
    """The fields that the model's topology alone reads, with what they default to."""
    resolved = {"memory_slots": config.num_slots}
    return {field: resolved.get(field, getattr(config, field)) for field in config.operators.topology.fields}


def config_to_huggingface(config: ModelConfig, max_position_embeddings: int) -> dict[str, Any]:
    """`config.json` of the exported model."""
    common = {theirs: getattr(config, ours) for theirs, (ours, _) in _COMMON.items()} | {
        "hidden_act": "gelu",
        "tie_word_embeddings": False,
        "intermediate_size": config.d_ff,
        "rotary_pct": config.rotary_fraction,
        "rotary_emb_base": config.rotary_base,
        "max_position_embeddings": max_position_embeddings,
    }
    if is_vanilla(config):
        return common | {
            "model_type": "gpt_neox",
            "architectures": ["GPTNeoXForCausalLM"],
            "num_hidden_layers": config.stored_layers,
            "use_parallel_residual": True,
            "attention_bias": True,
        }
    looped = {field: getattr(config, field) for field in ("topology", "shared_core", *_LOOPED)}
    return (
        common
        | looped
        | topology_fields(config)
        | {
            "model_type": "spiralformer",
            "architectures": ["SpiralFormerForCausalLM"],
            "schedule": [level._asdict() for level in config.schedule],
        }
    )


def config_from_huggingface(
    config: Mapping[str, Any], dtype: str = "float32", name: str = "config.json"
) -> ModelConfig:
    """The architecture a `config.json` describes.

    Args:
      config: the parsed file: of an export, or of any GPT-NeoX.
      dtype: what to compute in.
      name: what to call the file in errors.

    Raises:
      SpiralError: a model type or field that would change the function we compute, or a field that is missing.
    """
    fields = Fields(config, name)
    model_type = fields.choose("model_type", ("gpt_neox", "spiralformer"))
    fields.choose("hidden_act", EXACT_GELU)
    fields.require(not fields.read("tie_word_embeddings", bool, False), "tie_word_embeddings", "false")
    width = fields.read("hidden_size", int)
    is_wide = fields.read("intermediate_size", int) == 4 * width
    fields.require(is_wide, "intermediate_size", f"4 x hidden_size, {4 * width}")
    rotary_fraction, rotary_base = _rotary(fields)
    architecture = {ours: fields.read(theirs, kind) for theirs, (ours, kind) in _COMMON.items()}
    architecture |= dict(rotary_fraction=rotary_fraction, rotary_base=rotary_base, dtype=dtype)
    architecture |= _neox(fields) if model_type == "gpt_neox" else _spiralformer(fields)
    try:
        return ModelConfig(**architecture)
    except SpiralError as error:
        raise SpiralError(f"{name}: {error}") from None


class Fields:
    """The fields of one JSON object; every mistake is a SpiralError "FILE: FIELD is ...; allowed: ..."."""

    def __init__(self, values: Mapping[str, Any], name: str):
        """`name` is what to call the object in errors: its file."""
        self.name = name
        self._values = values

    def __contains__(self, field: str) -> bool:
        return self._values.get(field) is not None

    def read(self, field: str, kind: type, default: Any = None) -> Any:
        """The value of a field that must be there, unless there is a default, and of one type (int counts as float)."""
        if field not in self and default is not None:
            return default
        self.require(field in self, field, _KINDS[kind])
        value = self._values[field]
        is_kind = isinstance(value, int | float if kind is float else kind) and (
            kind is bool or not isinstance(value, bool)
        )
        self.require(is_kind, field, _KINDS[kind])
        if kind is float:
            self.require(abs(value) < math.inf and abs(value) <= _LARGEST, field, "a finite number")
            return float(value)
        return value

    def choose(self, field: str, allowed: tuple[str, ...]) -> str:
        """The value of a field that must be one of these texts."""
        value = self._values.get(field)
        self.require(isinstance(value, str) and value in allowed, field, ", ".join(map(repr, allowed)))
        return self._values[field]

    def require(self, ok: bool, field: str, allowed: str) -> None:
        """Raises SpiralError about a field, unless `ok`."""
        if not ok:
            value = self._values.get(field)
            found = "missing" if value is None else shown(value)
            raise SpiralError(f"{self.name}: {field} is {found}; allowed: {allowed}")


def _rotary(fields: Fields) -> tuple[float, float]:
    """Fraction and base, as GPT-NeoX has always spelled them or in `rope_parameters` of `transformers` 5."""
    fields.require("rope_scaling" not in fields, "rope_scaling", "null")
    if "rope_parameters" not in fields:
        return fields.read("rotary_pct", float), fields.read("rotary_emb_base", float)
    rope = Fields(fields.read("rope_parameters", dict), f"{fields.name}: rope_parameters")
    rope.require(rope.read("rope_type", str, "default") == "default", "rope_type", "'default'")

    def read(old: str, new: str) -> float:
        """What both spellings say, or one of them alone."""
        given = fields.read(old, float) if old in fields else None
        value = rope.read(new, float, given)
        fields.require(given in (None, value), old, f"{value} as in rope_parameters")
        return value

    return read("rotary_pct", "partial_rotary_factor"), read("rotary_emb_base", "rope_theta")


def _neox(fields: Fields) -> dict[str, Any]:
    """The fields of ModelConfig that make it vanilla."""
    for field in ("use_parallel_residual", "attention_bias"):
        fields.require(fields.read(field, bool, True), field, "true")
    layers = fields.read("num_hidden_layers", int)
    return dict(prelude_layers=layers, core_layers=0, coda_layers=0, chunks=(), topology="base")


def _spiralformer(fields: Fields) -> dict[str, Any]:
    """The fields of ModelConfig that only looped models have."""
    schedule, found = [], fields.read("schedule", list)
    if len(found) > MOST_ITERATIONS:
        raise SpiralError(f"{fields.name}: schedule is of {len(found)} iterations; allowed: up to {MOST_ITERATIONS}")
    for t, values in enumerate(found):
        fields.require(isinstance(values, dict), "schedule", "a list of objects")
        level = Fields(values, f"{fields.name}: schedule[{t}]")
        schedule.append([level.read(field, int) for field in ("chunk", "offset", "shift")])
    chunks, offsets, shifts = zip(*schedule, strict=True) if schedule else ((), (), ())
    topology = fields.choose("topology", tuple(topologies))
    return dict(
        {field: fields.read(field, kind) for field, kind in _LOOPED.items()},
        chunks=chunks,
        offsets=offsets,
        shifts=shifts,
        shared_core=fields.read("shared_core", bool, True),
        topology=topology,
        **{field: fields.read(field, int) for field in topologies[topology].fields},
    )
