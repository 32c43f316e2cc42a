"""The model's parts as functions of its parameters, for passes that keep something between calls."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from spiral_jax.decoding.state import KeyValues
from spiral_jax.model.chunks import Level
from spiral_jax.model.config import ModelConfig
from spiral_jax.model.iteration import Arrays
from spiral_jax.model.neox import Backend, Layer
from spiral_jax.model.spiralformer import SpiralFormer


class Iteration(NamedTuple):
    """What iteration t runs with.

    Attributes:
      level: its resolution.
      layers: parameters of its core, stacked; None with a core of 0 layers.
      arrays: of the Linears that its operators declare.
    """

    level: Level
    layers: dict | None
    arrays: Arrays


def layers_of(params, part: str) -> dict | None:
    """The stacked layers of `prelude`, `core`, `cores_{t}` or `coda`; None where it has none."""
    return params[part]["layers"] if part in params else None


def iterations(config: ModelConfig, params) -> list[Iteration]:
    """The loop's iterations in order."""
    cores = ["core" if config.shared_core else f"cores_{t}" for t in range(config.num_iterations)]
    return [
        Iteration(level, layers_of(params, core), params.get(f"steps_{t}", {}))
        for t, (level, core) in enumerate(zip(config.schedule, cores, strict=True))
    ]


def run_layers(
    model: SpiralFormer, layers: dict | None, h_BxLxD: jax.Array, rotary, attention: Callable, caches=()
) -> tuple[jax.Array, KeyValues]:
    """The model's own layers with an attention that may look beyond its arguments.

    Args:
      model: the model.
      layers: stacked parameters, None for no layers.
      h_BxLxD: their input.
      rotary: cos and sin, each [L, F], or [B, L, F] where rows are at positions of their own.
      attention: (q, k, v, cache) to [B, L, H, K], keys and queries rotated already.
      caches: a tree of [layers, ...] arrays, of which each layer's attention is given its own.

    Returns:
      h_BxLxD, and the keys and values of these L entries.
    """
    config, constrain = model.config, model.backend.constrain
    if layers is None:
        new = jnp.zeros((0, *h_BxLxD.shape[:2], config.num_heads, config.head_width), h_BxLxD.dtype)
        return h_BxLxD, KeyValues(new, new)

    def body(h_BxLxD, layer):
        params, cache = layer
        seen = []

        def record(q_BxLxHxK, k_BxLxHxK, v_BxLxHxK):
            seen.append(KeyValues(k_BxLxHxK, v_BxLxHxK))
            return attention(q_BxLxHxK, k_BxLxHxK, v_BxLxHxK, cache)

        h_BxLxD, _ = Layer(config, Backend(record, constrain)).apply({"params": params}, h_BxLxD, rotary)
        return h_BxLxD, seen[0]

    return jax.lax.scan(body, h_BxLxD, (layers, caches), unroll=config.unroll)
