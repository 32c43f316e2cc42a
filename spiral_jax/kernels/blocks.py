"""Causal attention in blocks of queries, for CPUs: plain XLA, memory linear in the length.

XLA on CPU multiplies single matrices two to four times as fast as the small batched ones of [B, H, L, L] scores, and
half of those are above the diagonal. So heads are taken a few at a time, and of each the queries a block at a time,
against the keys up to the block's end. The gradient computes the scores again.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from spiral_jax.model import attention as plain
from spiral_jax.model.attention import ATTENTION
from spiral_jax.model.operators import at_least_float32

# Queries whose scores exist at one time.
BLOCK = 128
# A sequence is cut into as many spans at most, each with a program of its own: compile time stays bounded.
SPANS = 8
# Heads are taken together until a block has as many scores; smaller arrays are not worth a second thread.
SCORES = 2**18


class Heads(NamedTuple):
    """What the backward pass needs of a group of heads, each [N, L, K] but the last, [N, L, 1]."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    out: jax.Array
    log_sum: jax.Array


def causal_attention(q_BxLxHxK: jax.Array, k_BxLxHxK: jax.Array, v_BxLxHxK: jax.Array) -> jax.Array:
    """softmax(q k / sqrt(K)) v with keys up to the query's own position (docs/spec.md section 1).

    All but inputs and outputs is at least float32.

    Args:
      q_BxLxHxK: queries.
      k_BxLxHxK: keys.
      v_BxLxHxK: values.

    Returns:
      out_BxLxHxK in the dtype of the inputs.
    """
    B, L, H, K = q_BxLxHxK.shape
    if L <= BLOCK:
        return plain.causal_attention(q_BxLxHxK, k_BxLxHxK, v_BxLxHxK)

    def by_head(x_BxLxHxK):
        x_BxHxLxK = jnp.pad(x_BxLxHxK.swapaxes(1, 2), ((0, 0), (0, 0), (0, -L % BLOCK), (0, 0)))
        return x_BxHxLxK.reshape(B * H, -1, K)

    # Padding on the right is in no query's past, and its own queries are cut off again.
    out_NxLxK = _attention(*map(by_head, (q_BxLxHxK, k_BxLxHxK, v_BxLxHxK)))
    return out_NxLxK.reshape(B, H, -1, K)[:, :, :L].swapaxes(1, 2)


@jax.custom_vjp
def _attention(q_NxLxK: jax.Array, k_NxLxK: jax.Array, v_NxLxK: jax.Array) -> jax.Array:
    """Of N heads, L a multiple of BLOCK."""
    return _forward(q_NxLxK, k_NxLxK, v_NxLxK)[0]


def _forward(q_NxLxK, k_NxLxK, v_NxLxK):
    out_NxLxK, log_sum_NxLx1 = _over_heads(_forward_of_heads, (q_NxLxK, k_NxLxK, v_NxLxK))
    out_NxLxK, log_sum_NxLx1 = (checkpoint_name(x, ATTENTION) for x in (out_NxLxK, log_sum_NxLx1))
    return out_NxLxK, Heads(q_NxLxK, k_NxLxK, v_NxLxK, out_NxLxK, log_sum_NxLx1)


def _backward(kept: Heads, d_out_NxLxK):
    return _over_heads(_backward_of_heads, (kept, d_out_NxLxK))


_attention.defvjp(_forward, _backward)


def _over_heads(function, arrays):
    """A function of [L, ..] arrays for each of N heads, as many at a time as are worth it."""
    N, L, _ = jax.tree.leaves(arrays)[0].shape
    worth_it = max(SCORES // (BLOCK * L), 1)
    size = max(size for size in range(1, min(N, worth_it) + 1) if N % size == 0)
    return jax.lax.map(function, arrays, batch_size=size if size > 1 else None)


def _forward_of_heads(qkv):
    q_LxK, k_LxK, v_LxK = (x.astype(at_least_float32(x.dtype)) for x in qkv)

    def of_block(_, start, q_PxK, k_SxK, v_SxK):
        score_PxS = _scores(q_PxK, k_SxK, start)
        largest_Px1 = jnp.max(score_PxS, axis=-1, keepdims=True)
        weight_PxS = jnp.exp(score_PxS - largest_Px1)
        sum_Px1 = jnp.sum(weight_PxS, axis=-1, keepdims=True)
        return (), ((weight_PxS @ v_SxK / sum_Px1).astype(qkv[0].dtype), largest_Px1 + jnp.log(sum_Px1))

    return _over_blocks(of_block, (), (q_LxK,), (k_LxK, v_LxK))[1]


def _backward_of_heads(kept_and_gradient):
    kept, d_out_LxK = kept_and_gradient
    dtype = at_least_float32(d_out_LxK.dtype)
    q_LxK, k_LxK, v_LxK, out_LxK, log_sum_Lx1 = (x.astype(dtype) for x in kept)
    d_out_LxK = d_out_LxK.astype(dtype)
    # The sum over keys of weight times its gradient.
    mean_Lx1 = jnp.sum(d_out_LxK * out_LxK, axis=-1, keepdims=True)

    def of_block(gradients, start, q_PxK, log_sum_Px1, d_out_PxK, mean_Px1, k_SxK, v_SxK):
        d_k_SxK, d_v_SxK = gradients
        weight_PxS = jnp.exp(_scores(q_PxK, k_SxK, start) - log_sum_Px1)
        d_score_PxS = weight_PxS * (d_out_PxK @ v_SxK.T - mean_Px1) * q_PxK.shape[-1] ** -0.5
        gradients = d_k_SxK + d_score_PxS.T @ q_PxK, d_v_SxK + weight_PxS.T @ d_out_PxK
        return gradients, d_score_PxS @ k_SxK

    start = jnp.zeros_like(k_LxK), jnp.zeros_like(v_LxK)
    (d_k_LxK, d_v_LxK), d_q_LxK = _over_blocks(
        of_block, start, (q_LxK, log_sum_Lx1, d_out_LxK, mean_Lx1), (k_LxK, v_LxK)
    )
    return tuple(x.astype(kept.q.dtype) for x in (d_q_LxK, d_k_LxK, d_v_LxK))


def _scores(q_PxK: jax.Array, k_SxK: jax.Array, start) -> jax.Array:
    """q k / sqrt(K) of queries from position `start` on, -inf where the key comes later."""
    score_PxS = (q_PxK * q_PxK.shape[-1] ** -0.5) @ k_SxK.T
    position_P, key_S = start + jnp.arange(q_PxK.shape[0]), jnp.arange(k_SxK.shape[0])
    return jnp.where(position_P[:, None] >= key_S, score_PxS, -jnp.inf)


def _over_blocks(of_block, carries, of_queries, of_keys):
    """Goes through a head's queries a block at a time.

    Args:
      of_block: (carries, the block's first position, *of_queries [P, ..], *of_keys [S, ..]) to (carries, outputs); S
        reaches at least to the block's end.
      carries: arrays [L, ..] of which a block reads and changes the first S.
      of_queries: arrays [L, ..].
      of_keys: arrays [L, ..].

    Returns:
      The last carries, and the outputs [L, ..].
    """
    L = of_keys[0].shape[0]
    span = -(-L // (SPANS * BLOCK)) * BLOCK
    outputs = []
    for begin in range(0, L, span):
        end = min(begin + span, L)
        keys = [x[:end] for x in of_keys]

        def step(carries, block, keys=keys):
            start, queries = block
            return of_block(carries, start, *queries, *keys)

        rows = [x[begin:end] for x in of_queries]
        first = jax.tree.map(lambda x, end=end: x[:end], carries)
        if end - begin == BLOCK:
            first, output = step(first, (begin, rows))
        else:
            blocks = [x.reshape(-1, BLOCK, *x.shape[1:]) for x in rows]
            first, output = jax.lax.scan(step, first, (jnp.arange(begin, end, BLOCK), blocks))
            output = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), output)
        carries = jax.tree.map(lambda x, new, end=end: x.at[:end].set(new), carries, first)
        outputs.append(output)
    return carries, jax.tree.map(lambda *parts: jnp.concatenate(parts), *outputs)
