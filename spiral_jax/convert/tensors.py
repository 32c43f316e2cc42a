"""Our parameters and the tensors of an export, one into the other (docs/spec.md section 7). Pure functions.

Hugging Face Linear weights are [out, in], ours [in, out] with heads as axes of their own; layers are stacked on a
leading axis here and numbered there; sqrt(d) is folded into the exported embedding, in float64.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from spiral_jax.convert.architecture import is_vanilla
from spiral_jax.convert.weights import Weights
from spiral_jax.errors import SpiralError
from spiral_jax.model.config import ModelConfig
from spiral_jax.model.neox import layer_linears
from spiral_jax.model.operators import Linear

EMBEDDING = ("embed", "embedding")
# Ours, within a layer, to GPT-NeoX's module names.
LAYER_MODULES = {
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "qkv": "attention.query_key_value",
    "out": "attention.dense",
    "mlp_up": "mlp.dense_h_to_4h",
    "mlp_down": "mlp.dense_4h_to_h",
}
_NAMED = 10  # tensors that are wrong, in a message
# Constants that checkpoints of `transformers` before 4.31 hold as if they were parameters.
BUFFERS = re.compile(
    r"gpt_neox\.(layers\.\d+\.attention\.(bias|masked_bias)|(layers\.\d+\.attention\.)?rotary_emb\.inv_freq)"
)


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


class ExportedArray(NamedTuple):
    """One of our arrays, and the tensors that it is exported as.

    Attributes:
      path: of ours in the parameter tree.
      names: exported: one for each layer of a stack, else a single one.
      shape: of each exported tensor.
      our_shape: of one layer of ours.
      is_stacked: whether layers are the leading axis of ours.
    """

    path: tuple[str, ...]
    names: list[str]
    shape: tuple[int, ...]
    our_shape: tuple[int, ...]
    is_stacked: bool = False

    def to_rows(self, array: np.ndarray) -> np.ndarray:
        """One layer's array as exported: kernels [*inputs, *outputs] to [out, in], biases flat."""
        return array.reshape(self.shape[::-1]).T if self.path[-1] == "kernel" else array.reshape(self.shape)

    def from_rows(self, tensor: np.ndarray) -> np.ndarray:
        """The inverse of `to_rows`."""
        return (tensor.T if self.path[-1] == "kernel" else tensor).reshape(self.our_shape)


def exported_arrays(config: ModelConfig) -> list[ExportedArray]:
    """Every array of a model."""
    root = "gpt_neox" if is_vanilla(config) else "spiralformer"
    V, D = config.vocab_size, config.d_model
    found = [ExportedArray(EMBEDDING, [f"{root}.embed_in.weight"], (V, D), (V, D))]

    def add(path: tuple[str, ...], names: list[str], linear: Linear | None, is_stacked: bool = False) -> None:
        """The arrays of a Linear or of a LayerNorm."""
        shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {"scale": ((D,), (D,)), "bias": ((D,), (D,))}
        if linear is not None:
            inputs, outputs = math.prod(linear.inputs), math.prod(linear.outputs)
            shapes = {"kernel": ((outputs, inputs), linear.kernel_shape), "bias": ((outputs,), linear.outputs)}
        for field, (shape, our_shape) in shapes.items():
            if field != "bias" or linear is None or linear.bias:
                suffix = "bias" if field == "bias" else "weight"
                tensors = [f"{name}.{suffix}" for name in names]
                found.append(ExportedArray((*path, field), tensors, shape, our_shape, is_stacked))

    add(("final_norm",), [f"{root}.final_layer_norm"], None)
    add(("head",), ["embed_out"], Linear(D, V, bias=False))
    linears = layer_linears(config)
    for stack, prefixes in stacks(config).items():
        for module, name in LAYER_MODULES.items():
            names = [f"{prefix}.{name}" for prefix in prefixes]
            add((stack, "layers", module), names, linears.get(module), is_stacked=True)
    topology = config.operators.topology
    for field, group, t, name, linear in config.operators.declared():
        exported = topology.exported(t, name) if field == "topology" else f"steps.{t}.{name}"
        add((group, name), [f"spiralformer.{exported}"], linear)
    return found


def tensors_from_params(
    config: ModelConfig, params: Mapping[str, Any], dtype: np.dtype | None = None
) -> dict[str, np.ndarray]:
    """The exported tensors of a parameter tree.

    Args:
      config: the architecture.
      params: its parameters, NumPy or JAX arrays.
      dtype: of the tensors; None for the parameters' own.

    Raises:
      SpiralError: a finite parameter that `dtype` cannot hold.
    """
    arrays, tensors = flatten_dict(params), {}
    for exported in exported_arrays(config):
        array = np.asarray(arrays[exported.path])
        kept = dtype or array.dtype
        if exported.path == EMBEDDING:
            array = array.astype(np.float64) * config.d_model**0.5
        for name, layer in zip(exported.names, array if exported.is_stacked else [array], strict=True):
            tensors[name] = _cast(name, exported.to_rows(layer), kept)
    return tensors


def _cast(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(array, dtype)
    if np.isinf(cast).any() and not np.isinf(array).any():
        found, largest = np.dtype(dtype).name, np.abs(array).max()
        raise SpiralError(f"--dtype is {found!r}; allowed: one that can hold {name}, with values up to {largest}")
    return cast


def check_tensors(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], name: str) -> None:
    """Whether tensors are those of an architecture; from names and shapes, before any is read or made.

    Args:
      config: the architecture.
      shapes: of the tensors, by name; buffers of old checkpoints are passed over.
      name: what to call the tensors in errors: their file or folder.

    Raises:
      SpiralError: tensors missing, left over or of another shape, the first of them named.
    """
    problems, used = [], set()
    for exported in exported_arrays(config):
        used.update(exported.names)
        for key in exported.names:
            if key not in shapes:
                problems.append(f"{key} {list(exported.shape)} is missing")
            elif shapes[key] != exported.shape:
                problems.append(f"{key} has shape {list(shapes[key])}, expected {list(exported.shape)}")
    extra = sorted(key for key in set(shapes) - used if not BUFFERS.fullmatch(key))
    problems += [f"{key} {list(shapes[key])} is not a tensor of this model" for key in extra]
    if problems:
        more = f"; and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
        raise SpiralError(f"{name}: {'; '.join(problems[:_NAMED])}{more}")


def params_from_tensors(
    config: ModelConfig,
    tensors: Mapping[str, np.ndarray],
    dtype: np.dtype | None = None,
    name: str = "model.safetensors",
) -> dict[str, Any]:
    """The parameter tree of exported tensors (sqrt(d) is divided out in float64).

    Args:
      config: the architecture.
      tensors: by name; buffers of old checkpoints are passed over.
      dtype: of the parameters; None for the tensors' own.
      name: what to call the tensors in errors: their file or folder.

    Raises:
      SpiralError: as for `check_tensors`.
    """
    shapes = tensors.shapes if isinstance(tensors, Weights) else {key: x.shape for key, x in tensors.items()}
    check_tensors(config, shapes, name)
    arrays = {}
    for exported in exported_arrays(config):
        layers = [exported.from_rows(np.asarray(tensors[key], dtype)) for key in exported.names]
        array = np.stack(layers) if exported.is_stacked else layers[0]
        if exported.path == EMBEDDING:
            array = (array.astype(np.float64) / config.d_model**0.5).astype(array.dtype)
        arrays[exported.path] = array
    return unflatten_dict(arrays)
