"""How an iteration's update e(t) becomes the next state h(t+1) (SPEC section 2).

A topology is one branch of `next_state`; `docs/topologies.md` says how to add another.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from spiral_jax.model.config import Topology
from spiral_jax.model.resolution import HIGHEST, at_least_float32


class Memory(NamedTuple):
    """MeSH's slots, kept as what was written rather than as S arrays of width D.

    Slot b holds m_b = sum_j w_j[b] v_j over the writes so far, so a read is
    sum_b r_b m_b = sum_j (r . w_j) v_j: the T + 2 vectors the backward pass needs anyway, and no [S, L, D] buffer
    per iteration.

    Attributes:
      values: v_j, each [B, L, D]; the first is h_emb.
      writes: w_j, each [B, L, S], at least float32; the first puts all of h_emb into slot 0.
    """

    values: tuple[jax.Array, ...]
    writes: tuple[jax.Array, ...]


def empty_memory(num_slots: int, h_emb_BxLxD: jax.Array) -> Memory:
    """m_0 = h_emb, the other slots 0."""
    slot_S = jax.nn.one_hot(0, num_slots, dtype=at_least_float32(h_emb_BxLxD.dtype))
    return Memory((h_emb_BxLxD,), (jnp.broadcast_to(slot_S, (*h_emb_BxLxD.shape[:2], num_slots)),))


def route(router: dict, state_BxLxD: jax.Array, new_BxLxD: jax.Array, memory: Memory, at: jax.Array | None = None):
    """One MeSH step: every slot takes its share of `new`, then all slots are read.

    Args:
      router: `{"write", "read"}`, each `{"kernel": [D, S], "bias": [S]}`.
      state_BxLxD: what the routers look at.
      new_BxLxD: what is written.
      memory: the writes so far.
      at: None appends the write; an index (traced, under a scan) replaces the reserved, zero entry there.

    Returns:
      read_BxLxD, the memory after the write, and the mean entropies [write, read] in nats.
    """
    dtype = at_least_float32(state_BxLxD.dtype)

    def share(linear: dict) -> jax.Array:
        kernel_DxS, bias_S = linear["kernel"].astype(dtype), linear["bias"].astype(dtype)
        return jax.nn.softmax(
            jnp.einsum("bld,ds->bls", state_BxLxD.astype(dtype), kernel_DxS, precision=HIGHEST) + bias_S
        )

    write_BxLxS, read_BxLxS = share(router["write"]), share(router["read"])
    if at is None:
        memory = Memory((*memory.values, new_BxLxD), (*memory.writes, write_BxLxS))
    else:
        memory = Memory(
            tuple(jnp.where(at == j, new_BxLxD, v) for j, v in enumerate(memory.values)),
            tuple(jnp.where(at == j, write_BxLxS, w) for j, w in enumerate(memory.writes)),
        )
    weights = [jnp.sum(read_BxLxS * w_BxLxS, axis=-1, keepdims=True) for w_BxLxS in memory.writes]
    out_BxLxD = sum(w_BxLx1 * v.astype(dtype) for w_BxLx1, v in zip(weights, memory.values, strict=True))
    entropy_2 = jnp.stack([_mean_entropy(write_BxLxS), _mean_entropy(read_BxLxS)])
    return out_BxLxD.astype(state_BxLxD.dtype), memory, entropy_2


def _mean_entropy(p_BxLxS: jax.Array) -> jax.Array:
    return jax.lax.stop_gradient(-jnp.mean(jnp.sum(p_BxLxS * jnp.log(jnp.maximum(p_BxLxS, 1e-30)), axis=-1)))


def next_state(topology: Topology, e_BxLxD: jax.Array, h_BxLxD: jax.Array, h0_BxLxD: jax.Array, h_emb_BxLxD: jax.Array):
    """h(t+1) of the topologies without a memory.

    Args:
      topology: `base`, `residual`, `anchor` or `anchor_star`.
      e_BxLxD: the update e(t).
      h_BxLxD: h(t).
      h0_BxLxD: h(0), the prelude's output.
      h_emb_BxLxD: the scaled embeddings.
    """
    if topology == "base":
        return e_BxLxD
    if topology == "residual":
        return e_BxLxD + h_BxLxD
    if topology == "anchor":
        return e_BxLxD + h0_BxLxD
    if topology == "anchor_star":
        return e_BxLxD + h_emb_BxLxD
    raise ValueError(f"no topology {topology!r}")
