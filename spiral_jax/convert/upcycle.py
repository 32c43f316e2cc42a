"""Up-cycling: a new run that starts from the layers of a trained model, vanilla or looped."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from spiral_jax.convert.tensors import stacks
from spiral_jax.errors import SpiralError, require
from spiral_jax.model.config import ModelConfig

CoreMethod = Literal["select", "average"]
# What the parameters that are taken over depend on.
_SAME = ("vocab_size", "d_model", "num_heads", "rotary_dims", "rotary_base", "layer_norm_epsilon")


@dataclasses.dataclass(frozen=True)
class UpcycleConfig:
    """What a new run starts from, if not from random parameters.

    Embeddings, layers, final LayerNorm and head come from the source. Of a looped source, routers, scorers, allocators
    and whatever else iterations have of their own come along where name and shape are the same; the rest starts as
    always. It is read at step 0 only: a run that resumes has its own parameters, and the source may be gone by then.

    Attributes:
      source: folder of a trained model: a run (its newest checkpoint), an export or any Hugging Face GPT-NeoX; empty to
        start from random parameters.
      prelude: the source's layers that become the prelude, counted from 0 over its prelude, core (once, or with
        `model.shared_core` False every iteration's) and coda; empty for its first ones.
      core: the source's layers that become the core (with `model.shared_core` False, those of all iterations in
        order); empty for those between the prelude's and the coda's.
      coda: the source's layers that become the coda; empty for its last ones.
      core_method: `select` takes as many layers as the core has; `average` takes a multiple M K of its number of layers
        K, and core layer i is the mean of the listed layers i, i + K, i + 2 K, ...
      iterations: for each iteration of the model, which of the source's it takes its own parameters from (and its core,
        with `model.shared_core` False in both); empty for the same ones where both have as many, and for a vanilla
        source.
    """

    source: str = ""
    prelude: tuple[int, ...] = ()
    core: tuple[int, ...] = ()
    coda: tuple[int, ...] = ()
    core_method: CoreMethod = "select"
    iterations: tuple[int, ...] = ()

    def __post_init__(self):
        methods = get_args(CoreMethod)
        require(self.core_method in methods, "upcycle.core_method", self.core_method, ", ".join(methods))
        for field in ("prelude", "core", "coda", "iterations"):
            chosen = getattr(self, field)
            require(all(number >= 0 for number in chosen), f"upcycle.{field}", chosen, "the source's, numbered from 0")
            require(not chosen or self.source != "", f"upcycle.{field}", chosen, "nothing without upcycle.source")


def upcycled(
    config: UpcycleConfig, model: ModelConfig, source: ModelConfig, params: Mapping[str, Any]
) -> dict[str, Any]:
    """The parameters of a model that come from another one.

    Args:
      config: which layers become which.
      model: the model to start.
      source: the model to start from.
      params: its parameters, NumPy arrays; they are not changed.

    Returns:
      The part of `model`'s parameter tree that the source has something for, NumPy arrays.

    Raises:
      SpiralError: a source that does not fit, or layers or iterations it does not have, with the field's name.
    """
    steps = source_iterations(config, model, source)
    parts = source_layers(config, model, source)
    layers = [params[stack]["layers"] for stack in stacks(source)]
    layers = jax.tree.map(lambda *arrays: np.concatenate(arrays), *layers) if layers else {}
    groups_of_core, taken = iter(parts["core"]), {}
    for stack, names in stacks(model).items():
        groups = parts[stack] if stack in ("prelude", "coda") else [next(groups_of_core) for _ in names]
        taken[stack] = {"layers": jax.tree.map(lambda array, groups=groups: _mean_layers(array, groups), layers)}
    found = {(declared.group, declared.name): declared.linear for declared in source.operators.declared()}
    for _, group, _, name, linear in model.operators.declared():
        other = group if group == "entry" else steps.get(group, "")
        before = found.get((other, name))
        if before is not None and (before.kernel_shape, before.bias) == (linear.kernel_shape, linear.bias):
            taken.setdefault(group, {})[name] = params[other][name]
    return {group: params[group] for group in ("embed", "final_norm", "head")} | taken


def fresh_linears(model: ModelConfig, taken: Mapping[str, Any]) -> list[str]:
    """Names of the model's iterations' Linears that `upcycled` found nothing for."""
    declared = model.operators.declared()
    return [f"{group}/{name}" for _, group, _, name, _ in declared if name not in taken.get(group, {})]


def source_iterations(config: UpcycleConfig, model: ModelConfig, source: ModelConfig) -> dict[str, str]:
    """For each iteration's group of parameters the source's; nothing if the source has no iterations.

    Raises:
      SpiralError: as for `upcycled`.
    """
    chosen, T, total = config.iterations, model.num_iterations, source.num_iterations
    require(total > 0 or not chosen, "upcycle.iterations", chosen, "nothing, as upcycle.source has no iterations")
    if not chosen and total in (0, T):
        chosen = tuple(range(total))
    if total:
        allowed = f"{T} of the source's iterations 0..{total - 1}, one for each of model.chunks"
        require(len(chosen) == T and all(t < total for t in chosen), "upcycle.iterations", chosen, allowed)
    return {f"steps_{t}": f"steps_{s}" for t, s in enumerate(chosen)}


def source_layers(config: UpcycleConfig, model: ModelConfig, source: ModelConfig) -> dict[str, list[list[int]]]:
    """For each layer of `prelude`, `core` and `coda` the layers of the source that it is the mean of.

    Raises:
      SpiralError: as for `upcycled`.
    """
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
    core = config.core or _cores_of_iterations(config, model, source) or (tuple(between) if core_layers else ())
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


def _cores_of_iterations(config: UpcycleConfig, model: ModelConfig, source: ModelConfig) -> tuple[int, ...]:
    """Where both models have a core of its own for each iteration, cores go with their iterations."""
    if model.shared_core or source.shared_core or not config.iterations or model.core_layers != source.core_layers:
        return ()
    first, K = source.prelude_layers, source.core_layers
    return tuple(first + t * K + i for t in config.iterations for i in range(K))


def place(taken: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """A program's parameters with host arrays in place of some of them.

    Args:
      taken: a part of the tree; every process holds the whole of its arrays, every device takes its part.
      params: the tree of device arrays.
    """
    arrays = flatten_dict(params)
    for path, array in flatten_dict(taken).items():
        like = arrays[path]

        def part(index, array=array, dtype=like.dtype):
            return np.asarray(array[index], dtype)

        arrays[path] = jax.make_array_from_callback(like.shape, like.sharding, part)
    return unflatten_dict(arrays)


def _mean_layers(array: np.ndarray, groups: Sequence[Sequence[int]]) -> np.ndarray:
    """Layers [len(groups), ...], each the mean of some of an array's [n, ...]."""
    return np.stack([array[list(group)].mean(axis=0, dtype=np.float64).astype(array.dtype) for group in groups])
