"""Entropy and local mass of attention patterns whose values are known beforehand."""

import jax.numpy as jnp
import numpy as np
import pytest

from spiral_jax.model.chunks import Level
from spiral_jax.probes.heads import (
    dynamic_heads,
    head_statistics,
    key_and_near_mass,
    normalised_entropy,
    uniform_statistics,
    window,
)

LENGTHS = (1, 2, 40, 300)  # of 300, the last block of queries goes beyond the end


def statistics(q_LxK, k_LxK, near):
    entropy_1x1, local_1x1 = head_statistics(jnp.array(q_LxK)[None, :, None], jnp.array(k_LxK)[None, :, None], near)
    return entropy_1x1.item(), local_1x1.item()


@pytest.mark.parametrize("L", LENGTHS)
def test_attention_to_self(L):
    """Every key has the mass of one query, and no query looks back."""
    entropy, local = statistics(100 * np.eye(L, dtype=np.float32), 100 * np.eye(L, dtype=np.float32), near=32)
    assert entropy == pytest.approx(float(L > 1), abs=1e-6) and local == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("L", LENGTHS)
@pytest.mark.parametrize("near", [1, 4, 32])
def test_attention_to_all_of_the_past(L, near):
    """Equal weights 1 / (q + 1): key k has the mass of 1 / (q + 1) over q >= k, which is no uniform distribution."""
    zeros = np.zeros((L, 4), np.float32)
    entropy, local = statistics(zeros, zeros, near)
    p_L = np.array([sum(1 / (q + 1) for q in range(k, L)) for k in range(L)]) / L
    expected = -(p_L * np.log(p_L)).sum() / np.log(L) if L > 1 else 0
    assert entropy == pytest.approx(expected, abs=1e-5)
    assert local == pytest.approx(np.mean([min(q, near) / (q + 1) for q in range(L)]), abs=1e-6)
    assert uniform_statistics(L, near) == pytest.approx((entropy, local), abs=1e-5)


@pytest.mark.parametrize("back, near", [(1, 1), (3, 3), (3, 2), (4, 32)])
def test_attention_to_one_token_before(back, near):
    """It counts as near up to M tokens back; the first queries have no such key, and look at all they see."""
    L = 40
    keys = 100 * np.eye(L, dtype=np.float32)
    queries = np.zeros_like(keys)
    queries[back:] = keys[:-back]
    entropy, local = statistics(queries, keys, near)
    at_start = sum(min(q, near) / (q + 1) for q in range(back))
    assert local == pytest.approx(((L - back) * (back <= near) + at_start) / L, abs=1e-6)
    p_L = np.array([(k < L - back) + sum(1 / (q + 1) for q in range(k, back)) for k in range(L)]) / L
    p_L = p_L[p_L > 0]
    assert entropy == pytest.approx(-(p_L * np.log(p_L)).sum() / np.log(L), abs=1e-5)


def test_attention_to_one_key():
    """To the first alone: no entropy, and near for the M queries after it."""
    L, keys = 40, np.zeros((40, 2), np.float32)
    keys[0], queries = (100, 0), np.tile(np.float32([100, 0]), (40, 1))
    assert statistics(queries, keys, near=8) == pytest.approx((0, 8 / L), abs=1e-6)


def test_entropy_of_uniform_attention():
    """Whatever the sum; and of a map that is not causal."""
    assert normalised_entropy(jnp.full((2, 7), 3.0)) == pytest.approx(np.ones(2), abs=1e-6)
    key_1x1xL, near_1x1 = key_and_near_mass(jnp.full((1, 1, 7, 7), 1 / 7), jnp.arange(7), 2)
    assert normalised_entropy(key_1x1xL).item() == pytest.approx(1, abs=1e-6)
    assert near_1x1.item() == pytest.approx((0 + 1 + 5 * 2) / 7, abs=1e-6)


def test_windows():
    assert [window(Level(g, 0, g - 1)) for g in (1, 2, 3, 8, 16, 32, 33, 64)] == [32, 16, 11, 4, 2, 1, 1, 1]


@pytest.mark.parametrize("heads, most", [(1, 1), (2, 1), (3, 2), (5, 2), (10, 4), (16, 7)])
def test_dynamic_heads(heads, most):
    """ceil(40 %), those that move furthest, however high they are."""
    ranges = np.random.default_rng(0).permutation(heads) + 1.0
    value_TxN = np.stack([100 - ranges, np.full(heads, 99.0) - ranges, np.full(heads, 100.0)])
    is_dynamic_CxH = dynamic_heads(value_TxN.reshape(3, 1, heads) if heads % 2 else value_TxN.reshape(3, 2, -1))
    assert set(np.flatnonzero(is_dynamic_CxH)) == set(np.argsort(-ranges)[:most])
