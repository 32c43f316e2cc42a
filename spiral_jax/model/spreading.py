"""How what the core made of a chunk is spread over the chunk's tokens (docs/spec.md section 3, step 3)."""

import jax
import jax.numpy as jnp

from spiral_jax.model.chunks import Level
from spiral_jax.model.operators import Bound, Linear, Operator, at_least_float32
from spiral_jax.registry import Registry


class Spreading(Operator):
    """Base of all spreadings; a subclass gives `shares` (or `spread` itself), and with parameters `linears`."""

    def shares(self, zhat_BxNxD: jax.Array, level: Level, linears: Bound) -> jax.Array:
        """beta_BxNxG: the share of each place of each chunk; anything that broadcasts to that shape will do."""
        raise NotImplementedError

    def spread(self, zhat_BxNxD: jax.Array, level: Level, linears: Bound) -> jax.Array:
        """u_BxNxGxD: u_i = lambda beta[chunk(i), place(i)] zhat[chunk(i)].

        Args:
          zhat_BxNxD: what the core made of the chunks.
          level: the geometry.
          linears: what `linears` declares, as functions.
        """
        scale = {"sqrt": level.chunk**0.5, "linear": float(level.chunk), "none": 1.0}[self.config.update_scale]
        share_BxNxG = self.shares(zhat_BxNxD, level, linears)
        return scale * share_BxNxG[..., None] * zhat_BxNxD[:, :, None].astype(share_BxNxG.dtype)


spreadings: Registry[type[Spreading]] = Registry("model.allocation", Spreading)


@spreadings.register("learned")
class Learned(Spreading):
    """beta_j = softmax over the places of allocator_t(zhat_j). The allocator starts as the uniform one."""

    def linears(self, level: Level) -> dict[str, Linear]:
        return {"allocator": Linear(self.config.d_model, level.chunk)}

    def shares(self, zhat_BxNxD, level, linears):
        return jax.nn.softmax(linears["allocator"](zhat_BxNxD), axis=-1)


@spreadings.register("uniform")
class Uniform(Spreading):
    """beta = 1 / g."""

    def shares(self, zhat_BxNxD, level, linears):
        return jnp.full((1, 1, level.chunk), 1 / level.chunk, at_least_float32(zhat_BxNxD.dtype))
