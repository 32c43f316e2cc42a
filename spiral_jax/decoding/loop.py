"""The model's parts as functions of its parameters, for passes that keep something between calls."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from spiral_jax.decoding.state import KeyValues
from spiral_jax.model.config import Level, ModelConfig
from spiral_jax.model.neox import Backend, Layer
from spiral_jax.model.spiralformer import SpiralFormer, slice_of
from spiral_jax.model.topology import Memory, empty_memory, next_state, route


class Iteration(NamedTuple):
    """What iteration t runs with.

    Attributes:
      level: its resolution.
      layers: parameters of its core, stacked; None with a core of 0 layers.
      router, scorer, allocator: its own Linears, None where it has none.
    """

    level: Level
    layers: dict | None
    router: dict | None
    scorer: dict | None
    allocator: dict | None


class Flow(NamedTuple):
    """The token-level states on their way through the loop: h(t), and what topologies add to or read from."""

    h_BxLxD: jax.Array
    h0_BxLxD: jax.Array
    h_emb_BxLxD: jax.Array
    memory: Memory


def layers_of(params, part: str) -> dict | None:
    """The stacked layers of `prelude`, `core`, `cores_{t}` or `coda`; None where it has none."""
    return params[part]["layers"] if part in params else None


def iterations(config: ModelConfig, params) -> list[Iteration]:
    """The loop's iterations in order, taken out of the runs in which parameters are kept."""
    out = []
    for k, (level, count) in enumerate(config.runs):
        for i in range(count):
            t = len(out)
            out.append(
                Iteration(
                    level,
                    layers_of(params, "core" if config.shared_core else f"cores_{t}"),
                    router(params, t + 1) if config.topology == "mesh" else None,
                    slice_of(params[f"scorers_{k}"], i) if f"scorers_{k}" in params else None,
                    slice_of(params[f"allocators_{k}"], i) if f"allocators_{k}" in params else None,
                )
            )
    return out


def router(params, k: int) -> dict:
    """MeSH's router pair k: 0 is the transition's."""
    return {"write": slice_of(params["write_routers"], k), "read": slice_of(params["read_routers"], k)}


def enter(config: ModelConfig, params, h_emb_BxLxD: jax.Array, h_BxLxD: jax.Array) -> Flow:
    """From the prelude's output to h(0)."""
    memory = Memory((), ())
    if config.topology == "mesh":
        memory = empty_memory(config.num_slots, h_emb_BxLxD)
        h_BxLxD, memory, _ = route(router(params, 0), h_BxLxD, h_BxLxD, memory)
    return Flow(h_BxLxD, h_BxLxD, h_emb_BxLxD, memory)


def advance(config: ModelConfig, iteration: Iteration, flow: Flow, e_BxLxD: jax.Array) -> Flow:
    """From h(t) and e(t) to h(t+1)."""
    if config.topology == "mesh":
        h_BxLxD, memory, _ = route(iteration.router, flow.h_BxLxD, e_BxLxD, flow.memory)
        return flow._replace(h_BxLxD=h_BxLxD, memory=memory)
    return flow._replace(h_BxLxD=next_state(config.topology, e_BxLxD, flow.h_BxLxD, flow.h0_BxLxD, flow.h_emb_BxLxD))


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
