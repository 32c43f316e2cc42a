"""From logits to the next token: greedy, or drawn at a temperature, from the likeliest ones alone if asked for."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spiral_jax.errors import require


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """How one text is continued.

    Attributes:
      temperature: logits are divided by it; 0 takes the likeliest token and leaves the others unused.
      top_k: draw among so many likeliest tokens only (and those as likely as the last of them); 0 for all.
      top_p: draw among the fewest likeliest tokens that have this probability together, after `top_k`; 1 for all.
      seed: of the random choices. The same seed and prompt give the same text, whatever else is generated beside it.

    Raises:
      SpiralError: a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        ok = math.isfinite(self.temperature) and self.temperature >= 0
        require(ok, "temperature", self.temperature, "0 (greedy) or more")
        require(self.top_k >= 0, "top_k", self.top_k, "0 (all tokens) or more")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0, at most 1")
        require(0 <= self.seed < 2**32, "seed", self.seed, "0 to 2^32 - 1")


class Sampling(NamedTuple):
    """The settings of a batch's rows, each [B]."""

    temperature_B: jax.Array | np.ndarray
    top_k_B: jax.Array | np.ndarray
    top_p_B: jax.Array | np.ndarray
    seed_B: jax.Array | np.ndarray

    @classmethod
    def of(cls, settings: Sequence[SamplingSettings]) -> "Sampling":
        """NumPy arrays of some rows' settings."""
        return cls(
            np.array([row.temperature for row in settings], np.float32),
            np.array([min(row.top_k, 2**31 - 1) for row in settings], np.int32),
            np.array([row.top_p for row in settings], np.float32),
            np.array([row.seed for row in settings], np.uint32),
        )


def next_tokens(logits_BxV: jax.Array, sampling: Sampling, position_B: jax.Array, num_ids: int) -> jax.Array:
    """One token for every row.

    Args:
      logits_BxV: at the rows' last tokens.
      sampling: the rows' settings.
      position_B: tokens so far; with the seed they decide a row's random numbers, and the other rows do not.
      num_ids: ids from here on stand for no token and are never chosen.

    Returns:
      Ids [B], int32.
    """
    V = logits_BxV.shape[-1]
    logits_BxV = jnp.where(jnp.arange(V) < num_ids, logits_BxV, -jnp.inf)
    greedy_B = jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
    draws_B = sampling.temperature_B > 0
    restricted = jnp.any(draws_B & ((sampling.top_k_B > 0) | (sampling.top_p_B < 1)))

    def draw():
        # From the largest logit down, so that a temperature close to 0 does not overflow.
        below_BxV = logits_BxV - jnp.max(logits_BxV, axis=-1, keepdims=True)
        scaled_BxV = below_BxV / jnp.where(draws_B, sampling.temperature_B, 1)[:, None]
        # Sorting a vocabulary takes longer than a layer.
        scaled_BxV = jax.lax.cond(restricted, lambda x: restrict(x, sampling), lambda x: x, scaled_BxV)
        noise_BxV = jax.vmap(lambda seed, position: gumbel(seed, position, V))(sampling.seed_B, position_B)
        return jnp.argmax(scaled_BxV + noise_BxV, axis=-1).astype(jnp.int32)

    drawn_B = jax.lax.cond(jnp.any(draws_B), draw, lambda: greedy_B)
    return jnp.where(draws_B, drawn_B, greedy_B)


def restrict(scaled_BxV: jax.Array, sampling: Sampling) -> jax.Array:
    """-inf for the tokens that top-k and top-p leave out."""
    V = scaled_BxV.shape[-1]
    sorted_BxV = -jnp.sort(-scaled_BxV, axis=-1)
    k_Bx1 = jnp.where(sampling.top_k_B > 0, jnp.minimum(sampling.top_k_B, V), V)[:, None]
    sorted_BxV = jnp.where(jnp.arange(V) < k_Bx1, sorted_BxV, -jnp.inf)
    p_BxV = jax.nn.softmax(sorted_BxV, axis=-1)
    before_BxV = jnp.cumsum(p_BxV, axis=-1) - p_BxV
    top_p_Bx1 = sampling.top_p_B[:, None]
    # The likeliest always, and at 1 all of them, whatever the sums are rounded to.
    kept_BxV = (before_BxV < top_p_Bx1) | (jnp.arange(V) == 0) | (top_p_Bx1 >= 1)
    kept_BxV &= sorted_BxV > -jnp.inf
    least_Bx1 = jnp.min(jnp.where(kept_BxV, sorted_BxV, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(scaled_BxV >= least_Bx1, scaled_BxV, -jnp.inf)


def gumbel(seed: jax.Array, position: jax.Array, V: int) -> jax.Array:
    """Noise [V] whose sum with logits is largest at a token drawn from their softmax."""
    return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), position), (V,))
