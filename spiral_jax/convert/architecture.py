"""A model's architecture by a Hugging Face `config.json`, and what of it we refuse (docs/spec.md section 7)."""

from typing import Any

from spiral_jax.convert.fields import Fields
from spiral_jax.model.topology import topologies

# Spellings under which `transformers` computes the exact (erf) GELU; its "gelu_accurate" is the tanh approximation.
EXACT_GELU = ("gelu", "gelu_python")


def architecture_of(fields: Fields, name: str) -> dict[str, Any]:
    """The fields of ModelConfig that make the model `config.json` describes.

    Args:
      fields: of the file.
      name: what to call the file in errors.

    Raises:
      SpiralError: a model type or field that would change the function we compute, or a field that is missing.
    """
    model_type = fields.choose("model_type", ("gpt_neox", "spiralformer"))
    fields.choose("hidden_act", EXACT_GELU)
    fields.require(not fields.read("tie_word_embeddings", bool, False), "tie_word_embeddings", "false")
    width = fields.read("hidden_size", int)
    fields.require(
        fields.read("intermediate_size", int) == 4 * width, "intermediate_size", f"4 x hidden_size, {4 * width}"
    )
    rotary_fraction, rotary_base = _rotary(fields, name)
    return dict(
        vocab_size=fields.read("vocab_size", int),
        d_model=width,
        num_heads=fields.read("num_attention_heads", int),
        rotary_fraction=rotary_fraction,
        rotary_base=rotary_base,
        layer_norm_epsilon=fields.read("layer_norm_eps", float),
        **(_neox(fields) if model_type == "gpt_neox" else _spiralformer(fields, name)),
    )


def _rotary(fields: Fields, name: str) -> tuple[float, float]:
    """Fraction and base, as GPT-NeoX has always spelled them or in `rope_parameters` of `transformers` 5."""
    fields.require("rope_scaling" not in fields, "rope_scaling", "null")
    old = {"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"}
    if "rope_parameters" not in fields:
        return tuple(fields.read(field, float) for field in old)
    rope = Fields(fields.read("rope_parameters", dict), f"{name}: rope_parameters")
    rope.require(rope.read("rope_type", str, "default") == "default", "rope_type", "'default'")
    values = []
    for field, new in old.items():
        value = rope.read(new, float, fields.read(field, float) if field in fields else None)
        fields.require(
            field not in fields or fields.read(field, float) == value, field, f"{value} as in rope_parameters"
        )
        values.append(value)
    return tuple(values)


def _neox(fields: Fields) -> dict[str, Any]:
    """The fields of ModelConfig that make it vanilla."""
    for field in ("use_parallel_residual", "attention_bias"):
        fields.require(fields.read(field, bool, True), field, "true")
    layers = fields.read("num_hidden_layers", int)
    return dict(prelude_layers=layers, core_layers=0, coda_layers=0, chunks=(), topology="base")


def _spiralformer(fields: Fields, name: str) -> dict[str, Any]:
    """The fields of ModelConfig that only looped models have."""
    schedule = []
    for t, level in enumerate(fields.read("schedule", list)):
        fields.require(isinstance(level, dict), "schedule", "a list of objects")
        level = Fields(level, f"{name}: schedule[{t}]")
        schedule.append([level.read(field, int) for field in ("chunk", "offset", "shift")])
    chunks, offsets, shifts = zip(*schedule, strict=True) if schedule else ((), (), ())
    topology = fields.choose("topology", tuple(topologies))
    return dict(
        {field: fields.read(field, int) for field in ("prelude_layers", "core_layers", "coda_layers")},
        chunks=chunks,
        offsets=offsets,
        shifts=shifts,
        shared_core=fields.read("shared_core", bool, True),
        topology=topology,
        **{field: fields.read(field, int) for field in topologies[topology].fields},
        **{field: fields.read(field, str) for field in ("pooling", "allocation", "update_scale")},
    )
