"""A head's attention in two numbers (docs/spec.md section 6), without its map ever being there whole."""

import jax
import jax.numpy as jnp
import numpy as np

from spiral_jax.model.chunks import Level
from spiral_jax.model.operators import at_least_float32

# Queries whose attention to all keys exists at one time.
BLOCK = 128
# Keys that count as near at full resolution.
NEAR = 32


def window(level: Level) -> int:
    """M_t = ceil(32 r_t), the keys that count as near in an iteration at this level."""
    return -(-NEAR // level.chunk)


def head_statistics(q_BxLxHxK: jax.Array, k_BxLxHxK: jax.Array, near: int) -> tuple[jax.Array, jax.Array]:
    """Key-marginal entropy and local mass of causal attention, softmax(q k / sqrt(K)), at least float32.

    Args:
      q_BxLxHxK: queries, rotated.
      k_BxLxHxK: keys, rotated.
      near: M, how many keys before the query count as near.

    Returns:
      entropy_BxH, of 0 to 1, and local_mass_BxH: the mean over queries of the attention to keys q - M <= k < q.
    """
    B, L, H, K = q_BxLxHxK.shape
    dtype, block = at_least_float32(q_BxLxHxK.dtype), min(BLOCK, L)
    starts = jnp.arange(0, L, block)
    q_BxMxHxK = jnp.pad(q_BxLxHxK, ((0, 0), (0, -L % block), (0, 0), (0, 0)))

    def add(sums, start):
        q_BxPxHxK = jax.lax.dynamic_slice_in_dim(q_BxMxHxK, start, block, axis=1)
        score_BxHxPxL = jnp.einsum("bqhk,bphk->bhqp", q_BxPxHxK, k_BxLxHxK, preferred_element_type=dtype) * K**-0.5
        position_P = start + jnp.arange(block)
        is_past_PxL = jnp.arange(L) <= position_P[:, None]
        weight_BxHxPxL = jax.nn.softmax(jnp.where(is_past_PxL, score_BxHxPxL, -jnp.inf), axis=-1)
        weight_BxHxPxL = jnp.where(position_P[:, None] < L, weight_BxHxPxL, 0)  # the last block goes beyond the end
        return jax.tree.map(jnp.add, sums, key_and_near_mass(weight_BxHxPxL, position_P, near)), None

    nothing = jnp.zeros((B, H, L), dtype), jnp.zeros((B, H), dtype)
    (key_BxHxL, near_BxH), _ = jax.lax.scan(add, nothing, starts)
    return normalised_entropy(key_BxHxL), near_BxH / L


def key_and_near_mass(weight_BxHxPxL: jax.Array, position_P: jax.Array, near: int) -> tuple[jax.Array, jax.Array]:
    """Attention summed over queries: to each key [B, H, L], and to the `near` keys before the query [B, H]."""
    back_PxL = position_P[:, None] - jnp.arange(weight_BxHxPxL.shape[-1])
    is_near_PxL = (back_PxL >= 1) & (back_PxL <= near)
    return jnp.sum(weight_BxHxPxL, axis=2), jnp.sum(jnp.where(is_near_PxL, weight_BxHxPxL, 0), axis=(2, 3))


def normalised_entropy(mass_xL: jax.Array) -> jax.Array:
    """- sum p log p / log L over the last axis, p the mass over its sum; 0 where L is 1."""
    L = mass_xL.shape[-1]
    if L == 1:
        return jnp.zeros(mass_xL.shape[:-1], mass_xL.dtype)
    p_xL = mass_xL / jnp.sum(mass_xL, axis=-1, keepdims=True)
    return -jnp.sum(jax.scipy.special.xlogy(p_xL, p_xL), axis=-1) / jnp.log(L).astype(p_xL.dtype)


def uniform_statistics(length: int, near: int) -> tuple[float, float]:
    """What `head_statistics` gives of L entries for equal weights on all of the past, 1 / (q + 1): to compare with."""
    queries_L = np.arange(length)
    key_L = np.cumsum(1 / (queries_L + 1)[::-1])[::-1] / length  # the sum over queries q >= k
    entropy = -np.sum(key_L * np.log(key_L)) / np.log(length) if length > 1 else 0.0
    return float(entropy), float(np.mean(np.minimum(queries_L, near) / (queries_L + 1)))


def dynamic_heads(value_TxCxH: np.ndarray) -> np.ndarray:
    """is_dynamic_CxH: the ceil(40 %) of the heads whose value ranges furthest across iterations."""
    range_N = np.ptp(value_TxCxH, axis=0).ravel()
    is_dynamic_N = np.zeros(range_N.size, bool)
    is_dynamic_N[np.argsort(-range_N, kind="stable")[: -(-2 * range_N.size // 5)]] = True
    return is_dynamic_N.reshape(value_TxCxH.shape[1:])
