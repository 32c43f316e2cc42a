"""Which exported name is which of our arrays, and how its rows are laid out (SPEC section 7).

Hugging Face Linear weights are [out, in], ours [in, out] with heads as axes of their own; layers are stacked on a
leading axis here and numbered there.
"""

import dataclasses
from typing import Any

import numpy as np

from spiral_jax.model.config import PROGRAM, ModelConfig

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
    return not config.chunks and config.topology != "mesh"


def architecture(config: ModelConfig) -> dict[str, Any]:
    """The fields that parameters are made for, with what they default to; not how the model is computed."""
    values = dataclasses.asdict(config)
    values["offsets"] = tuple(level.offset for level in config.schedule)
    values["shifts"] = tuple(level.shift for level in config.schedule)
    values["memory_slots"] = config.num_slots if config.topology == "mesh" else None
    free = ["dtype", *PROGRAM]
    if not config.chunks:
        free += ["shared_core", "pooling", "allocation", "update_scale"]
    return {field: value for field, value in values.items() if field not in free}


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


def iteration_linears(config: ModelConfig) -> dict[str, tuple[str, int]]:
    """Exported name of each iteration's Linear: our group and the index into its leading axis."""
    named = {}
    if config.topology == "mesh":
        for k in range(config.num_iterations + 1):
            for side in ("write", "read"):
                named[f"spiralformer.memory.{k}.{side}"] = (f"{side}_routers", k)
    t = 0
    for run, (level, count) in enumerate(config.runs):
        for i in range(count):
            if level.chunk > 1 and config.pooling == "self_aggregation":
                named[f"spiralformer.steps.{t + i}.scorer"] = (f"scorers_{run}", i)
            if level.chunk > 1 and config.allocation == "learned":
                named[f"spiralformer.steps.{t + i}.allocator"] = (f"allocators_{run}", i)
        t += count
    return named


def features_of(config: ModelConfig, name: str, group: str) -> int:
    """Outputs of an iteration's Linear, given its exported name and our group."""
    if group.endswith("_routers"):
        return config.num_slots
    return 1 if name.endswith(".scorer") else config.chunks[int(name.split(".")[2])]


def suffix_of(field: str) -> str:
    """Of a LayerNorm's or Linear's array, given our name of it: both call scale and kernel `weight`."""
    return "bias" if field == "bias" else "weight"


def to_rows(config: ModelConfig, module: str, field: str, array: np.ndarray) -> np.ndarray:
    """One layer's array as exported: kernels [in..., out...] to [out, in], biases flat."""
    if field != "kernel":
        return array.reshape(-1)
    return array.reshape(config.d_ff if module == "mlp_down" else config.d_model, -1).T


def from_rows(config: ModelConfig, module: str, field: str, array: np.ndarray) -> np.ndarray:
    """The inverse of `to_rows` for one module."""
    H, K, D = config.num_heads, config.head_width, config.d_model
    if field == "kernel":
        array = array.T
    shapes = {("qkv", "kernel"): (D, H, 3, K), ("qkv", "bias"): (H, 3, K), ("out", "kernel"): (H, K, D)}
    return array.reshape(shapes.get((module, field), array.shape))
