"""How a chunk of token states becomes one vector (docs/spec.md section 3, step 1)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spiral_jax.model.chunks import Level
from spiral_jax.model.operators import HIGHEST, Bound, Linear, Operator, at_least_float32
from spiral_jax.registry import Registry


class RunningSum(NamedTuple):
    """The weighted sum over the members so far of the chunk that each row is in; at least float32.

    Attributes:
      top_B: the largest score, so that members weigh exp(score - top) and nothing overflows.
      total_B: sum of the weights.
      sum_BxD: weighted sum of the members.
    """

    top_B: jax.Array
    total_B: jax.Array
    sum_BxD: jax.Array


class Pooling(Operator):
    """Base of all poolings; a subclass gives `pool`, with parameters `linears`, and to be probed `weights`.

    The pass of one token at a time follows from `pool`: the members of the open chunk are kept, and pooled when the
    last one has come. A pooling that can do with less (a running sum) replaces `open`, `add` and `close`.
    """

    def pool(
        self, h_BxNxGxD: jax.Array, is_token_NxG: jax.Array | np.ndarray, level: Level, linears: Bound
    ) -> jax.Array:
        """z_BxNxD, each chunk's from its own members.

        Args:
          h_BxNxGxD: the members of N chunks of one level.
          is_token_NxG: False for places without a token, which hold zeros and must not count; broadcasts to [B, N, G].
          level: the geometry.
          linears: what `linears` declares, as functions.
        """
        raise NotImplementedError

    def weights(
        self, h_BxNxGxD: jax.Array, is_token_NxG: jax.Array | np.ndarray, level: Level, linears: Bound
    ) -> jax.Array:
        """a_BxNxG, the part of each member in its chunk's vector, or what broadcasts to that; called as `pool` is."""
        raise NotImplementedError

    def open(self, level: Level, batch: int) -> Any:
        """A chunk without members: a pytree of arrays that begin with the axis B."""
        return jnp.zeros((batch, level.chunk, self.config.d_model), self.config.dtype)

    def add(self, chunk: Any, place_B: jax.Array, h_BxD: jax.Array, level: Level, linears: Bound) -> Any:
        """The open chunk with one more member per row, at places 0..G-1 in order."""
        del level, linears
        return chunk.at[jnp.arange(h_BxD.shape[0]), place_B].set(h_BxD)

    def close(self, chunk: Any, is_token_BxG: jax.Array, level: Level, linears: Bound) -> jax.Array:
        """z_BxD of a complete chunk; what it gives for an incomplete one is never used."""
        return self.pool(chunk[:, None], is_token_BxG[:, None], level, linears)[:, 0]


poolings: Registry[type[Pooling]] = Registry("model.pooling", Pooling)


@poolings.register("self_aggregation")
class SelfAggregation(Pooling):
    """z_j = sum_i a_i h_i, a = softmax over the chunk's members of scorer_t(h_i). The scorer starts as the mean."""

    def linears(self, level: Level) -> dict[str, Linear]:
        return {"scorer": Linear(self.config.d_model, 1, bias=False)}

    def weights(self, h_BxNxGxD, is_token_NxG, level, linears):
        score_BxNxG = linears["scorer"](h_BxNxGxD)[..., 0]
        return jax.nn.softmax(jnp.where(is_token_NxG, score_BxNxG, -jnp.inf), axis=-1)

    def pool(self, h_BxNxGxD, is_token_NxG, level, linears):
        weight_BxNxG = self.weights(h_BxNxGxD, is_token_NxG, level, linears)
        return jnp.einsum("bng,bngd->bnd", weight_BxNxG, h_BxNxGxD.astype(weight_BxNxG.dtype), precision=HIGHEST)

    def open(self, level, batch):
        zeros_BxD = jnp.zeros((batch, self.config.d_model), at_least_float32(self.config.dtype))
        # Finite, so that no infinities are subtracted.
        return RunningSum(jnp.full_like(zeros_BxD[:, 0], jnp.finfo(zeros_BxD.dtype).min), zeros_BxD[:, 0], zeros_BxD)

    def add(self, chunk, place_B, h_BxD, level, linears):
        score_B = linears["scorer"](h_BxD)[:, 0]
        top_B = jnp.maximum(chunk.top_B, score_B)
        kept_B, weight_B = jnp.exp(chunk.top_B - top_B), jnp.exp(score_B - top_B)
        sum_BxD = kept_B[:, None] * chunk.sum_BxD + weight_B[:, None] * h_BxD.astype(chunk.sum_BxD.dtype)
        return RunningSum(top_B, kept_B * chunk.total_B + weight_B, sum_BxD)

    def close(self, chunk, is_token_BxG, level, linears):
        return chunk.sum_BxD / jnp.maximum(chunk.total_B, 1)[:, None]  # the largest weighs 1


@poolings.register("mean")
class Mean(Pooling):
    """z_j = (1 / g) sum_i h_i, also where the first chunk has fewer members: the missing ones count as zeros."""

    def pool(self, h_BxNxGxD, is_token_NxG, level, linears):
        return jnp.sum(h_BxNxGxD, axis=2, dtype=at_least_float32(h_BxNxGxD.dtype)) / level.chunk

    def weights(self, h_BxNxGxD, is_token_NxG, level, linears):
        return jnp.full((1, 1, level.chunk), 1 / level.chunk, at_least_float32(h_BxNxGxD.dtype))

    def open(self, level, batch):
        return jnp.zeros((batch, self.config.d_model), at_least_float32(self.config.dtype))

    def add(self, chunk, place_B, h_BxD, level, linears):
        return chunk + h_BxD.astype(chunk.dtype)

    def close(self, chunk, is_token_BxG, level, linears):
        return chunk / level.chunk
