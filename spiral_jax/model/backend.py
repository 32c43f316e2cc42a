"""What a model computes with on a machine; the defaults are plain XLA operations, for any platform."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from spiral_jax.model.attention import causal_attention
from spiral_jax.model.operators import at_least_float32


def layer_norm(x_BxLxD: jax.Array, scale_D: jax.Array, bias_D: jax.Array, epsilon: float) -> jax.Array:
    """(x - mean) / sqrt(var + epsilon) * scale + bias, at least float32, by the two-pass formula."""
    wide_BxLxD = x_BxLxD.astype(at_least_float32(x_BxLxD.dtype))
    mean_BxL = jnp.mean(wide_BxLxD, axis=-1)
    variance_BxL = jnp.mean(jax.lax.square(wide_BxLxD - mean_BxL[..., None]), axis=-1)
    scale_1x1xD, bias_1x1xD = (p_D.reshape((1,) * (x_BxLxD.ndim - 1) + p_D.shape) for p_D in (scale_D, bias_D))
    factor_BxLxD = jax.lax.rsqrt(variance_BxL[..., None] + epsilon) * scale_1x1xD
    return (x_BxLxD - mean_BxL[..., None]) * factor_BxLxD + bias_1x1xD


class Backend(NamedTuple):
    """What a model needs to know of the machine, handed in by whoever has a mesh (`kernels.choose.backend_for`).

    Attributes:
      attention: (q, k, v) of [B, L, H, K] to [B, L, H, K], causal.
      dot_general: as `jax.lax.dot_general`: the last axes of activations with the first of a kernel.
      gelu: the exact one.
      layer_norm: (x_BxLxD, scale_D, bias_D, epsilon) to x_BxLxD, at least float32.
      constrain: (x, *logical axis names) to x, pinned to the mesh; by default it does nothing.
      gather: one layer's variables as they are stored to those that it computes with; the backward pass calls it again.
        None if they are the same.
    """

    attention: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] = causal_attention
    dot_general: Callable[..., jax.Array] = jax.lax.dot_general
    gelu: Callable[[jax.Array], jax.Array] = functools.partial(nn.gelu, approximate=False)
    layer_norm: Callable[[jax.Array, jax.Array, jax.Array, float], jax.Array] = layer_norm
    constrain: Callable[..., jax.Array] = lambda x, *names: x
    gather: Callable[[dict], dict] | None = None
