"""Products, GELU and LayerNorm for CPUs against the default forms: values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spiral_jax.kernels import cpu
from spiral_jax.model.backend import Backend

PLAIN = Backend()


def numbers(*shape, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(shape).normal(size=shape), dtype)


def values_and_gradients(function, *arrays):
    out, backward = jax.vjp(function, *arrays)
    return out, *backward(numbers(*out.shape, dtype=out.dtype))


def assert_equal(function, reference, *arrays, tolerance):
    found, expected = values_and_gradients(function, *arrays), values_and_gradients(reference, *arrays)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(np.float64(a), np.float64(b), atol=tolerance * float(jnp.abs(b).max()), rtol=0)


DTYPES = [(np.float32, 1e-6), (np.float64, 1e-14), (jnp.bfloat16, 1e-2)]


@pytest.mark.parametrize("dtype, tolerance", DTYPES)
def test_gelu(dtype, tolerance, x64):
    with x64(dtype == np.float64):
        x = jnp.asarray(np.linspace(-9, 9, 1001), dtype)
        assert_equal(cpu.gelu, PLAIN.gelu, x, tolerance=tolerance)


@pytest.mark.parametrize("dtype, tolerance", DTYPES)
@pytest.mark.parametrize("inputs, outputs", [((8,), (5,)), ((8,), (2, 3, 4)), ((2, 4), (8,))])
def test_products(inputs, outputs, dtype, tolerance, x64):
    """Into heads, out of heads, and neither."""
    axes = (tuple(range(2, 2 + len(inputs))), tuple(range(len(inputs)))), ((), ())
    with x64(dtype == np.float64):
        x, kernel = numbers(2, 7, *inputs, dtype=dtype), numbers(*inputs, *outputs, dtype=dtype)
        both = (functools.partial(f, dimension_numbers=axes) for f in (cpu.dot_general, PLAIN.dot_general))
        assert_equal(*both, x, kernel, tolerance=tolerance)


@pytest.mark.parametrize("dtype, tolerance", DTYPES)
def test_layer_norm(dtype, tolerance, x64):
    with x64(dtype == np.float64):
        wide = np.promote_types(dtype, np.float32)
        x, scale, bias = 3 + 2 * numbers(2, 5, 16, dtype=dtype), numbers(16, dtype=wide), numbers(1, 16, dtype=wide)[0]
        both = (lambda *arrays, f=f: f(*arrays, 1e-5) for f in (cpu.layer_norm, PLAIN.layer_norm))
        assert_equal(*both, x, scale, bias, tolerance=tolerance)
