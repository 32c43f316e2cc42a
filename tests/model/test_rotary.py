"""Rotations of pairs: by complex numbers, and the gradient, which the program has written down itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spiral_jax.model.config import ModelConfig
from spiral_jax.model.neox import apply_rotary, rotary_tables

CONFIG = ModelConfig(vocab_size=16, d_model=32, num_heads=2, dtype="float32")


def tables(fraction: float, length: int):
    return rotary_tables(length, dataclasses.replace(CONFIG, rotary_fraction=fraction))


def rotated(x_BxLxHxK: np.ndarray, fraction: float) -> np.ndarray:
    """Pair (j, j + F) as a complex number times e^(i position frequency)."""
    K, L = x_BxLxHxK.shape[-1], x_BxLxHxK.shape[1]
    F = int(K * fraction) // 2
    frequency_F = 10000.0 ** -(np.arange(F) / max(F, 1))
    turn_LxF = np.exp(1j * np.arange(L)[:, None] * frequency_F)
    out = x_BxLxHxK.astype(np.float64)
    pair_BxLxHxF = (out[..., :F] + 1j * out[..., F : 2 * F]) * turn_LxF[:, None]
    return np.concatenate([pair_BxLxHxF.real, pair_BxLxHxF.imag, out[..., 2 * F :]], axis=-1)


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 1.0])
def test_values_and_gradient(fraction):
    x_BxLxHxK, weight_BxLxHxK = np.random.default_rng(0).normal(size=(2, 2, 7, 2, 16)).astype(np.float32)
    cos_LxF, sin_LxF = tables(fraction, 7)
    value, back = jax.vjp(lambda x: apply_rotary(x, cos_LxF, sin_LxF), x_BxLxHxK)
    np.testing.assert_allclose(value, rotated(x_BxLxHxK, fraction), atol=1e-6)
    # A rotation is linear and its transpose is its inverse: rotating the gradient gives the weights back.
    (gradient_BxLxHxK,) = back(jnp.asarray(weight_BxLxHxK))
    np.testing.assert_allclose(rotated(np.asarray(gradient_BxLxHxK), fraction), weight_BxLxHxK, atol=1e-6)


def test_rows_at_positions_of_their_own():
    """Decoding gives each row its angles, [B, 1, F]."""
    x_BxLxHxK = np.random.default_rng(1).normal(size=(7, 1, 2, 16)).astype(np.float32)
    cos_LxF, sin_LxF = tables(0.5, 7)
    found = apply_rotary(x_BxLxHxK, cos_LxF[:, None], sin_LxF[:, None])
    expected = rotated(x_BxLxHxK.swapaxes(0, 1), 0.5).swapaxes(0, 1)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_bfloat16_rotates_in_float32():
    """One rounding, at the end."""
    x_BxLxHxK = jnp.asarray(np.random.default_rng(2).normal(size=(1, 7, 2, 16)), jnp.bfloat16)
    found = apply_rotary(x_BxLxHxK, *tables(0.5, 7))
    assert found.dtype == jnp.bfloat16
    exact = rotated(np.asarray(x_BxLxHxK, np.float32), 0.5)
    np.testing.assert_allclose(np.asarray(found, np.float32), exact, rtol=2**-8, atol=1e-6)
