"""Which exported name is which of our arrays, and how its rows are laid out (docs/spec.md section 7).

Hugging Face Linear weights are [out, in], ours [in, out] with heads as axes of their own; layers are stacked on a
leading axis here and numbered there.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np

from spiral_jax.model.config import PROGRAM, ModelConfig
from spiral_jax.model.operators import Linear

# Ours, within a layer, to GPT-NeoX's module names.
LAYER_MODULES = {
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "qkv": "attention.query_key_value",
    "out": "attention.dense",
    "mlp_up": "mlp.dense_h_to_4h",
    "mlp_down": "mlp.dense_4h_to_h",
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


def stacks(config: ModelConfig) -> dict[str, list[str]]:
    """Our stacks of layers, each with the exported prefixes of its layers in order; empty stacks have no parameters."""
    if is_vanilla(config):
        count = {"prelude": config.prelude_layers, "coda": config.coda_layers}
        first = {"prelude": 0, "coda": config.prelude_layers}
        named = {part: [f"gpt_neox.layers.{first[part] + i}" for i in range(count[part])] for part in count}
        return {part: prefixes for part, prefixes in named.items() if prefixes}
    named = {"prelude": [f"spiralformer.prelude.{i}" for i in range(config.prelude_layers)]}
    core = range(config.core_layers)
    if config.shared_core:
        named["core"] = [f"spiralformer.core.{i}" for i in core] if config.chunks else []
    else:
        for t in range(config.num_iterations):
            named[f"cores_{t}"] = [f"spiralformer.core.{t * config.core_layers + i}" for i in core]
    named["coda"] = [f"spiralformer.coda.{i}" for i in range(config.coda_layers)]
    return {stack: prefixes for stack, prefixes in named.items() if prefixes}


class ExportedLinear(NamedTuple):
    """A Linear of an iteration, or of the entry.

    Attributes:
      name: exported, without `.weight`.
      path: of our group of it in the parameter tree.
      linear: its declaration.
    """

    name: str
    path: tuple[str, str]
    linear: Linear


def operator_linears(config: ModelConfig) -> list[ExportedLinear]:
    """Every Linear that the operators declare."""
    topology, found = config.operators.topology, []
    for field, group, t, name, linear in config.operators.declared():
        exported = topology.exported(t, name) if field == "topology" else f"steps.{t}.{name}"
        found.append(ExportedLinear(f"spiralformer.{exported}", (group, name), linear))
    return found


def suffix_of(field: str) -> str:
    """Of a LayerNorm's or Linear's array, given our name of it: both call scale and kernel `weight`."""
    return "bias" if field == "bias" else "weight"


def to_rows(linear: Linear, field: str, array: np.ndarray) -> np.ndarray:
    """A Linear's array as exported: kernels [*inputs, *outputs] to [out, in], biases flat."""
    return array.reshape(math.prod(linear.inputs), -1).T if field == "kernel" else array.reshape(-1)


def from_rows(linear: Linear, field: str, array: np.ndarray) -> np.ndarray:
    """The inverse of `to_rows`."""
    return array.T.reshape(linear.kernel_shape) if field == "kernel" else array.reshape(linear.outputs)


def shapes_of(linear: Linear) -> dict[str, tuple[int, ...]]:
    """Exported shapes of a Linear's arrays."""
    outputs = math.prod(linear.outputs)
    return {"kernel": (outputs, math.prod(linear.inputs))} | ({"bias": (outputs,)} if linear.bias else {})
