"""Our configurations and parameters and Hugging Face's, one into the other (docs/spec.md section 7). Pure functions.

sqrt(d) is folded into the exported embedding, in float64.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from spiral_jax.convert.architecture import architecture_of
from spiral_jax.convert.fields import Fields
from spiral_jax.convert.layout import (
    LAYER_MODULES,
    from_rows,
    is_vanilla,
    operator_linears,
    shapes_of,
    stacks,
    suffix_of,
    to_rows,
    topology_fields,
)
from spiral_jax.errors import SpiralError
from spiral_jax.model.config import ModelConfig
from spiral_jax.model.neox import layer_linears

# Constants that checkpoints of `transformers` before 4.31 hold as if they were parameters.
BUFFERS = re.compile(
    r"gpt_neox\.(layers\.\d+\.attention\.(bias|masked_bias)|(layers\.\d+\.attention\.)?rotary_emb\.inv_freq)"
)


def config_to_huggingface(config: ModelConfig, max_position_embeddings: int) -> dict:
    """`config.json` of the exported model."""
    common = {
        "hidden_act": "gelu",
        "tie_word_embeddings": False,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_attention_heads": config.num_heads,
        "rotary_pct": config.rotary_fraction,
        "rotary_emb_base": config.rotary_base,
        "layer_norm_eps": config.layer_norm_epsilon,
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
    return (
        common
        | topology_fields(config)
        | {
            "model_type": "spiralformer",
            "architectures": ["SpiralFormerForCausalLM"],
            "prelude_layers": config.prelude_layers,
            "core_layers": config.core_layers,
            "coda_layers": config.coda_layers,
            "shared_core": config.shared_core,
            "topology": config.topology,
            "pooling": config.pooling,
            "allocation": config.allocation,
            "update_scale": config.update_scale,
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
    architecture = architecture_of(Fields(config, name), name)
    try:
        return ModelConfig(**architecture, dtype=dtype)
    except SpiralError as error:
        raise SpiralError(f"{name}: {error}") from None


def tensors_from_params(config: ModelConfig, params: Mapping, dtype: np.dtype | None = None) -> dict[str, np.ndarray]:
    """The exported tensors of a parameter tree.

    Args:
      config: the architecture.
      params: its parameters, NumPy or JAX arrays.
      dtype: of the tensors; None for the parameters' own.

    Raises:
      SpiralError: a finite parameter that `dtype` cannot hold.
    """
    root = "gpt_neox" if is_vanilla(config) else "spiralformer"
    embedding_VxD = np.asarray(params["embed"]["embedding"])
    folded_VxD = embedding_VxD.astype(np.float64) * config.d_model**0.5
    tensors = {
        f"{root}.embed_in.weight": folded_VxD if dtype is not None else folded_VxD.astype(embedding_VxD.dtype),
        f"{root}.final_layer_norm.weight": np.asarray(params["final_norm"]["scale"]),
        f"{root}.final_layer_norm.bias": np.asarray(params["final_norm"]["bias"]),
        "embed_out.weight": np.asarray(params["head"]["kernel"]).T,
    }
    linears = layer_linears(config)
    for stack, prefixes in stacks(config).items():
        for module, name in LAYER_MODULES.items():
            for field, array in params[stack]["layers"][module].items():
                for prefix, layer in zip(prefixes, np.asarray(array), strict=True):
                    rows = to_rows(linears[module], field, layer) if module in linears else layer
                    tensors[f"{prefix}.{name}.{suffix_of(field)}"] = rows
    for name, (group, linear_name), linear in operator_linears(config):
        for field, array in params[group][linear_name].items():
            tensors[f"{name}.{suffix_of(field)}"] = to_rows(linear, field, np.asarray(array))
    return {name: _cast(name, array, dtype or array.dtype) for name, array in tensors.items()}


def _cast(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(array, dtype)
    if np.isinf(cast).any() and not np.isinf(array).any():
        raise SpiralError(
            f"--dtype {np.dtype(dtype).name} cannot hold {name}: it has values up to {np.abs(array).max()}"
        )
    return cast


def params_from_tensors(
    config: ModelConfig,
    tensors: Mapping[str, np.ndarray],
    dtype: np.dtype | None = None,
    name: str = "model.safetensors",
) -> dict:
    """The parameter tree of exported tensors (sqrt(d) is divided out in float64).

    Args:
      config: the architecture.
      tensors: by name; buffers of old checkpoints are passed over.
      dtype: of the parameters; None for the tensors' own.
      name: what to call the tensors in errors: their file or folder.

    Raises:
      SpiralError: tensors missing, left over or of another shape, all of them named.
    """
    root = "gpt_neox" if is_vanilla(config) else "spiralformer"
    D, used, problems = config.d_model, set(), []

    def take(key: str, shape: tuple[int, ...]) -> np.ndarray:
        used.add(key)
        if key not in tensors:
            problems.append(f"{key} {list(shape)} is missing")
        elif tensors[key].shape != shape:
            problems.append(f"{key} has shape {list(tensors[key].shape)}, expected {list(shape)}")
        else:
            return np.asarray(tensors[key], dtype)
        return np.zeros(shape, np.float32)

    embed_in_VxD = take(f"{root}.embed_in.weight", (config.vocab_size, D))
    params = {
        "embed": {"embedding": (embed_in_VxD.astype(np.float64) / D**0.5).astype(embed_in_VxD.dtype)},
        "final_norm": {
            "scale": take(f"{root}.final_layer_norm.weight", (D,)),
            "bias": take(f"{root}.final_layer_norm.bias", (D,)),
        },
        "head": {"kernel": take("embed_out.weight", (config.vocab_size, D)).T},
    }
    linears = layer_linears(config)
    norm = {"scale": (D,), "bias": (D,)}
    for stack, prefixes in stacks(config).items():
        layers = {}
        for module, exported in LAYER_MODULES.items():
            linear = linears.get(module)
            layers[module] = {}
            for field, shape in (shapes_of(linear) if linear else norm).items():
                rows = [take(f"{prefix}.{exported}.{suffix_of(field)}", shape) for prefix in prefixes]
                layers[module][field] = np.stack([from_rows(linear, field, x) if linear else x for x in rows])
        params[stack] = {"layers": layers}
    for exported, (group, linear_name), linear in operator_linears(config):
        params.setdefault(group, {})[linear_name] = {
            field: from_rows(linear, field, take(f"{exported}.{suffix_of(field)}", shape))
            for field, shape in shapes_of(linear).items()
        }
    extra = sorted(key for key in set(tensors) - used if not BUFFERS.fullmatch(key))
    problems += [f"{key} {list(tensors[key].shape)} is not a tensor of this model" for key in extra]
    if problems:
        raise SpiralError(f"{name}: " + "; ".join(problems))
    return params
