"""Up-cycling: a new run that starts from the layers of a trained vanilla model."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import numpy as np

from spiral_jax.convert.layout import is_vanilla, stacks
from spiral_jax.errors import SpiralError, require
from spiral_jax.model.config import ModelConfig

CoreMethod = Literal["select", "average"]
# What the parameters that are taken over depend on.
_SAME = ("vocab_size", "d_model", "num_heads", "rotary_dims", "rotary_base", "layer_norm_epsilon")


@dataclasses.dataclass(frozen=True)
class UpcycleConfig:
    """What a new run starts from, if not from random parameters.

    Embeddings, layers, final LayerNorm and head come from the source; routers, scorers and allocators start as always.
    It is read at step 0 only: a run that resumes has its own parameters, and the source may be gone by then.

    Attributes:
      source: folder of a trained vanilla model: a run (its newest checkpoint), an export or any Hugging Face GPT-NeoX;
        empty to start from random parameters.
      prelude: the source's layers, counted from 0, that become the prelude; empty for its first ones.
      core: the source's layers that become the core (with `model.shared_core` False, those of all iterations in
        order); empty for those between the prelude's and the coda's.
      coda: the source's layers that become the coda; empty for its last ones.
      core_method: `select` takes as many layers as the core has; `average` takes a multiple M K of its number of layers
        K, and core layer i is the mean of the listed layers i, i + K, i + 2 K, ...
    """

    source: str = ""
    prelude: tuple[int, ...] = ()
    core: tuple[int, ...] = ()
    coda: tuple[int, ...] = ()
    core_method: CoreMethod = "select"

    def __post_init__(self):
        methods = get_args(CoreMethod)
        require(self.core_method in methods, "upcycle.core_method", self.core_method, ", ".join(methods))
        for field in ("prelude", "core", "coda"):
            layers = getattr(self, field)
            require(all(layer >= 0 for layer in layers), f"upcycle.{field}", layers, "layer numbers from 0")
            require(not layers or self.source != "", f"upcycle.{field}", layers, "nothing without upcycle.source")


def upcycled(
    config: UpcycleConfig, model: ModelConfig, source: ModelConfig, params: Mapping[str, Any]
) -> dict[str, Any]:
    """The parameters of a model that come from a vanilla one.

    Args:
      config: which layers become which.
      model: the model to start.
      source: the vanilla model.
      params: its parameters, NumPy arrays; they are not changed.

    Returns:
      The groups of `model`'s parameter tree that the source has something for, NumPy arrays.

    Raises:
      SpiralError: a source that is not vanilla or does not fit, or layers it does not have, with the field's name.
    """
    parts = source_layers(config, model, source)
    layers = [params[stack]["layers"] for stack in stacks(source)]
    layers = jax.tree.map(lambda *arrays: np.concatenate(arrays), *layers) if layers else {}
    groups_of_core, taken = iter(parts["core"]), {}
    for stack, names in stacks(model).items():
        groups = parts[stack] if stack in ("prelude", "coda") else [next(groups_of_core) for _ in names]
        taken[stack] = {"layers": jax.tree.map(lambda array, groups=groups: _mean_layers(array, groups), layers)}
    return {group: params[group] for group in ("embed", "final_norm", "head")} | taken


def source_layers(config: UpcycleConfig, model: ModelConfig, source: ModelConfig) -> dict[str, list[list[int]]]:
    """For each layer of `prelude`, `core` and `coda` the layers of the source that it is the mean of.

    Raises:
      SpiralError: as for `upcycled`.
    """
    require(is_vanilla(source), "upcycle.source", config.source, f"a vanilla model; this one is {source.notation}")
    for field in _SAME:
        given, found = getattr(model, field), getattr(source, field)
        name = "rotary_fraction" if field == "rotary_dims" else field
        if given != found:
            raise SpiralError(f"model.{name}: {field} is {given}; allowed: {found}, that of upcycle.source")
    total, core_layers = source.stored_layers, model.stored_layers - model.prelude_layers - model.coda_layers

    if not (config.prelude and config.coda):
        outer = model.prelude_layers + model.coda_layers
        allowed = f"at most {total}, the layers of upcycle.source, or both of upcycle.prelude and upcycle.coda"
        require(outer <= total, "model.prelude_layers + model.coda_layers", outer, allowed)
    prelude = config.prelude or tuple(range(model.prelude_layers))
    coda = config.coda or tuple(range(total - model.coda_layers, total))
    between = range(max(prelude, default=-1) + 1, min(coda, default=total))
    core = config.core or (tuple(between) if core_layers else ())
    for field, layers, needed in (
        ("prelude", prelude, model.prelude_layers),
        ("coda", coda, model.coda_layers),
        ("core", core, core_layers),  # last: what it is by default follows from the others
    ):
        name = f"upcycle.{field}{'' if getattr(config, field) else ' by default'}"
        require(all(layer < total for layer in layers), name, layers, f"layers of the source, 0..{total - 1}")
        if field == "core" and config.core_method == "average":
            ok = bool(layers) and len(layers) % needed == 0 if needed else not layers
            require(ok, name, layers, f"a multiple of the {needed} layers of the model's core")
        else:
            hint = "; or upcycle.core_method average" if field == "core" and len(layers) > needed > 0 else ""
            require(len(layers) == needed, name, layers, f"{needed} layers, as many as the model's {field} has{hint}")
    return {
        "prelude": [[layer] for layer in prelude],
        "core": [list(core[i::core_layers]) for i in range(core_layers)],
        "coda": [[layer] for layer in coda],
    }


def place(taken: Mapping[str, Any], abstract_params: Mapping[str, Any]) -> dict[str, Any]:
    """Host arrays as the device arrays of a program: every process holds the whole, every device takes its part."""

    def put(array: np.ndarray, like: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.make_array_from_callback(
            like.shape, like.sharding, lambda index: np.asarray(array[index], like.dtype)
        )

    return jax.tree.map(put, dict(taken), {group: abstract_params[group] for group in taken})


def _mean_layers(array: np.ndarray, groups: Sequence[Sequence[int]]) -> np.ndarray:
    """Layers [len(groups), ...], each the mean of some of an array's [n, ...]."""
    return np.stack([array[list(group)].mean(axis=0, dtype=np.float64).astype(array.dtype) for group in groups])
