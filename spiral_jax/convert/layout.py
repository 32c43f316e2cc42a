"""Parts of a model as its export has them, and what its parameters are made for (docs/spec.md section 7)."""

import dataclasses
from typing import Any

from spiral_jax.model.config import PROGRAM, ModelConfig


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

    def named(prefix: str, first: int, count: int) -> list[str]:
        return [f"{prefix}.{i}" for i in range(first, first + count)]

    P, K, C = config.prelude_layers, config.core_layers, config.coda_layers
    if is_vanilla(config):
        found = {"prelude": named("gpt_neox.layers", 0, P), "coda": named("gpt_neox.layers", P, C)}
    else:
        cores = ["core"] if config.shared_core else [f"cores_{t}" for t in range(config.num_iterations)]
        found = {"prelude": named("spiralformer.prelude", 0, P)}
        if config.chunks:
            found |= {core: named("spiralformer.core", t * K, K) for t, core in enumerate(cores)}
        found["coda"] = named("spiralformer.coda", 0, C)
    return {stack: prefixes for stack, prefixes in found.items() if prefixes}
