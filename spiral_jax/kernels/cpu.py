"""A layer's products, GELU and LayerNorm in forms of which XLA makes fast programs for CPUs.

Values and gradients are those of `model.backend`'s defaults, up to rounding.
"""

import functools
import math

import jax
import jax.numpy as jnp

from spiral_jax.model import backend
from spiral_jax.model.operators import at_least_float32


def dot_general(x, kernel, dimension_numbers, precision=None) -> jax.Array:
    """As `jax.lax.dot_general`: the last axes of x with the first of a kernel, without batch axes.

    For a kernel's gradient, jax asks for a product of arrays of more than two axes that comes out transposed; the
    compiler then copies both operands, and computes again what they are made of. Here all products are of matrices.
    """
    (axes, _), _ = dimension_numbers
    inputs = math.prod(kernel.shape[: len(axes)])
    out_RxF = _product(x.reshape(-1, inputs), kernel, precision)
    return out_RxF.reshape(*x.shape[: x.ndim - len(axes)], *kernel.shape[len(axes) :])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x_RxD, kernel, precision):
    return jnp.matmul(x_RxD, _as_matrix(x_RxD, kernel), precision=precision)


def _product_forward(x_RxD, kernel, precision):
    # The kernel as it came: another shape of what was gathered would be kept where gathered parameters are not to be.
    return _product(x_RxD, kernel, precision), (x_RxD, kernel)


def _product_backward(precision, kept, gradient_RxF):
    x_RxD, kernel = kept
    kernel_DxF = _as_matrix(x_RxD, kernel)
    d_x_RxD = jax.lax.dot_general(gradient_RxF, kernel_DxF, (((1,), (1,)), ((), ())), precision)
    d_kernel_DxF = jax.lax.dot_general(x_RxD, gradient_RxF, (((0,), (0,)), ((), ())), precision)
    return d_x_RxD, d_kernel_DxF.reshape(kernel.shape)


def _as_matrix(x_RxD, kernel) -> jax.Array:
    return kernel.reshape(x_RxD.shape[-1], -1)


_product.defvjp(_product_forward, _product_backward)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU, x Phi(x), by `erf`: half the time of the `erfc` of `jax.nn.gelu`. Keeps x alone for gradients."""
    wide = x.astype(at_least_float32(x.dtype))
    return (wide * _phi(wide)).astype(x.dtype)


def _phi(x):
    return 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5)))


def _gelu_forward(x):
    return gelu(x), x


def _gelu_backward(x, gradient):
    wide = x.astype(at_least_float32(x.dtype))
    density = jnp.exp(-0.5 * wide * wide) * (1 / math.sqrt(2 * math.pi))
    return ((gradient * (_phi(wide) + wide * density)).astype(x.dtype),)


gelu.defvjp(_gelu_forward, _gelu_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x_BxLxD: jax.Array, scale_D: jax.Array, bias_D: jax.Array, epsilon: float) -> jax.Array:
    """As `model.backend.layer_norm`; keeps x alone for its gradient, and sums along rows by products."""
    return backend.layer_norm(x_BxLxD, scale_D, bias_D, epsilon)


def _layer_norm_forward(x_BxLxD, scale_D, bias_D, epsilon):
    return layer_norm(x_BxLxD, scale_D, bias_D, epsilon), (x_BxLxD, scale_D)


def _layer_norm_backward(epsilon, kept, gradient_BxLxD):
    x_BxLxD, scale_D = kept
    D = x_BxLxD.shape[-1]
    g_RxD = gradient_BxLxD.reshape(-1, D)
    x_RxD = x_BxLxD.reshape(-1, D).astype(g_RxD.dtype)
    centred_RxD = x_RxD - jnp.mean(x_RxD, axis=-1, keepdims=True)
    inverse_Rx1 = jax.lax.rsqrt(jnp.mean(jnp.square(centred_RxD), axis=-1, keepdims=True) + epsilon)
    # Sums of what is computed in the same loop are done one number at a time: the barrier has it computed first.
    gx_RxD = jax.lax.optimization_barrier(g_RxD * centred_RxD * inverse_Rx1)
    mean_g_Rx1, mean_gx_Rx1 = ((of_RxD @ scale_D.astype(g_RxD.dtype) / D)[:, None] for of_RxD in (g_RxD, gx_RxD))
    d_x_RxD = inverse_Rx1 * (g_RxD * scale_D - mean_g_Rx1 - centred_RxD * inverse_Rx1 * mean_gx_Rx1)
    d_scale_D, d_bias_D = (jnp.sum(of_RxD, axis=0).astype(scale_D.dtype) for of_RxD in (gx_RxD, g_RxD))
    return d_x_RxD.reshape(x_BxLxD.shape).astype(x_BxLxD.dtype), d_scale_D, d_bias_D


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)
