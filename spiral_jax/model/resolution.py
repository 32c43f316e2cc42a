"""Between tokens and chunks: down-scale, up-scale and right shift of one level (SPEC section 3).

Pure functions of arrays. A level's geometry is static, so that everything here is padding, reshaping and slicing:
with `offset` zeros in front of the sequence, chunk j is the j-th row of a [.., N, G, ..] reshape.
"""

import jax
import jax.numpy as jnp

from spiral_jax.model.config import Level, UpdateScale

HIGHEST = jax.lax.Precision.HIGHEST


def at_least_float32(dtype) -> jnp.dtype:
    """The dtype in which SPEC section 5 wants sums, softmax and routers: float32, or float64 when computing in it."""
    return jnp.promote_types(dtype, jnp.float32)


def down_scale(h_BxLxD: jax.Array, level: Level, scorer: dict | None) -> jax.Array:
    """One vector per complete chunk.

    Args:
      h_BxLxD: token states.
      level: geometry; `level.num_chunks(L)` must be positive.
      scorer: `{"kernel": [D, 1]}` for self-aggregation (a softmax over the chunk's members), None for the mean.

    Returns:
      z_BxNxD in the dtype of `h_BxLxD`; the arithmetic is at least float32.
    """
    B, L, D = h_BxLxD.shape
    G, N = level.chunk, level.num_chunks(L)
    complete_BxMxD = h_BxLxD[:, : N * G - level.offset]
    h_BxNxGxD = jnp.pad(complete_BxMxD, ((0, 0), (level.offset, 0), (0, 0))).reshape(B, N, G, D)
    dtype = at_least_float32(h_BxLxD.dtype)
    if scorer is None:
        # The short first chunk is divided by G too: its missing members count as zeros.
        z_BxNxD = jnp.sum(h_BxNxGxD, axis=2, dtype=dtype) / G
    else:
        score_BxNxG = jnp.einsum(
            "bngd,d->bng", h_BxNxGxD.astype(dtype), scorer["kernel"][:, 0].astype(dtype), precision=HIGHEST
        )
        is_token_NxG = (jnp.arange(N * G) >= level.offset).reshape(N, G)
        weight_BxNxG = jax.nn.softmax(jnp.where(is_token_NxG, score_BxNxG, -jnp.inf), axis=-1)
        z_BxNxD = jnp.einsum("bng,bngd->bnd", weight_BxNxG, h_BxNxGxD.astype(dtype), precision=HIGHEST)
    return z_BxNxD.astype(h_BxLxD.dtype)


def up_scale(
    zhat_BxNxD: jax.Array, level: Level, length: int, allocator: dict | None, update_scale: UpdateScale
) -> jax.Array:
    """The token-level update e(t): each chunk's vector spread over its tokens, then shifted right.

    Args:
      zhat_BxNxD: what the core made of the chunks.
      level: geometry; `level.shift` zeros come in front.
      length: L, tokens of the sequence.
      allocator: `{"kernel": [D, G], "bias": [G]}` for learned shares, None for 1 / G each.
      update_scale: lambda, `sqrt` (of G), `linear` (G) or `none` (1).

    Returns:
      e_BxLxD in the dtype of `zhat_BxNxD`.
    """
    B, N, D = zhat_BxNxD.shape
    G, offset, shift = level
    dtype = at_least_float32(zhat_BxNxD.dtype)
    scale = {"sqrt": G**0.5, "linear": float(G), "none": 1.0}[update_scale]
    if allocator is None:
        share_BxNxG = jnp.full((1, 1, G), 1 / G, dtype)
    else:
        logit_BxNxG = jnp.einsum(
            "bnd,dg->bng", zhat_BxNxD.astype(dtype), allocator["kernel"].astype(dtype), precision=HIGHEST
        )
        share_BxNxG = jax.nn.softmax(logit_BxNxG + allocator["bias"].astype(dtype), axis=-1)
    u_BxNxGxD = scale * share_BxNxG[..., None] * zhat_BxNxD[:, :, None].astype(dtype)
    u_BxMxD = u_BxNxGxD.reshape(B, N * G, D).astype(zhat_BxNxD.dtype)
    # Token i reads u at padded position i - shift + offset, and zero for i < shift.
    u_BxMxD = u_BxMxD[:, offset : offset + max(length - shift, 0)]
    front = min(shift, length)
    return jnp.pad(u_BxMxD, ((0, 0), (front, length - front - u_BxMxD.shape[1]), (0, 0)))
