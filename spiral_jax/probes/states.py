"""How states differ and how much of the width they use (docs/spec.md section 6; MeSH's sections 2 and 4)."""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from spiral_jax.model.operators import at_least_float32

# Singular values that are kept of a state.
RANKS = 50


def relative_update(h_BxNxD: jax.Array, f_BxNxD: jax.Array) -> jax.Array:
    """2 |f(h) - h| / (|f(h)| + |h|) of each vector, [B, N], at least float32: 0 to 2; 0 where both are zero."""
    h_BxNxD, f_BxNxD = (x.astype(at_least_float32(x.dtype)) for x in (h_BxNxD, f_BxNxD))
    size_BxN = jnp.linalg.norm(f_BxNxD, axis=-1) + jnp.linalg.norm(h_BxNxD, axis=-1)
    return 2 * jnp.linalg.norm(f_BxNxD - h_BxNxD, axis=-1) / jnp.maximum(size_BxN, jnp.finfo(size_BxN.dtype).tiny)


def rbf_kernel(x_NxD: np.ndarray) -> np.ndarray:
    """exp(-|x_i - x_j|^2 / (2 s^2)), s the median distance of two different rows; what equals i alone if s is 0."""
    size_N = np.sum(x_NxD**2, axis=1)
    x_NxD = x_NxD - x_NxD.mean(axis=0)
    square_N = np.sum(x_NxD**2, axis=1)
    square_NxN = square_N[:, None] + square_N - 2 * x_NxD @ x_NxD.T
    # What is left where rows are equal is rounding, of states that have no more than seven digits.
    square_NxN[square_NxN <= 1e-12 * (size_N[:, None] + size_N)] = 0
    np.fill_diagonal(square_NxN, 0)
    bandwidth = np.median(np.sqrt(square_NxN[np.triu_indices(len(x_NxD), k=1)])) if len(x_NxD) > 1 else 0.0
    return np.exp(-square_NxN / (2 * bandwidth**2)) if bandwidth else (square_NxN == 0).astype(x_NxD.dtype)


def linear_kernel(x_NxD: np.ndarray) -> np.ndarray:
    """x_i . x_j."""
    return x_NxD @ x_NxD.T


def centred_alignment(states_SxNxD: Iterable[np.ndarray], kernel: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """CKA of every two states: HSIC(a, b) / sqrt(HSIC(a, a) HSIC(b, b)), the biased HSIC, tr(K H L H) / N^2.

    NaN where a state is the same at every token.

    Args:
      states_SxNxD: N tokens, the same of every state.
      kernel: x_NxD to [N, N].

    Returns:
      [S, S].
    """

    def centred(x_NxD: np.ndarray) -> np.ndarray:
        k_NxN = kernel(np.asarray(x_NxD, np.float64))
        least = 1e-12 * np.linalg.norm(k_NxN)
        k_NxN -= k_NxN.mean(axis=0)
        k_NxN -= k_NxN.mean(axis=1, keepdims=True)
        norm = np.linalg.norm(k_NxN)
        # Of a state that is the same everywhere rounding is left, whose direction means nothing.
        return k_NxN / norm if norm > least else np.full_like(k_NxN, np.nan)

    unit_SxM = [centred(x_NxD).ravel() for x_NxD in states_SxNxD]
    return np.array([[a_M @ b_M for b_M in unit_SxM] for a_M in unit_SxM])


def singular_values(x_NxD: np.ndarray) -> np.ndarray:
    """The largest singular values over the very largest, at most `RANKS`, of the uncentred rows.

    Zeros of a state that is zero, NaN of one that is not finite.
    """
    if not np.isfinite(x_NxD).all():
        return np.full(min(*x_NxD.shape, RANKS), np.nan)
    value_R = np.linalg.svd(np.asarray(x_NxD, np.float64), compute_uv=False)[:RANKS]
    return value_R / max(value_R[0], np.finfo(np.float64).tiny)
