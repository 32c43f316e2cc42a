"""Updates, CKA and singular values against their definitions and known cases."""

import numpy as np
import pytest

from spiral_jax.probes.states import (
    RANKS,
    centred_alignment,
    linear_kernel,
    rbf_kernel,
    relative_update,
    singular_values,
)

KERNELS = [rbf_kernel, linear_kernel]


@pytest.fixture
def random():
    return np.random.default_rng(0)


def test_relative_update(random):
    h_1x5xD = random.normal(size=(1, 5, 8)).astype(np.float32)
    for factor, expected in ((1, 0), (-1, 2), (2, 2 / 3), (0, 2)):
        assert relative_update(h_1x5xD, np.float32(factor) * h_1x5xD) == pytest.approx(
            np.full((1, 5), expected), abs=1e-6
        )
    assert not relative_update(0 * h_1x5xD, 0 * h_1x5xD).any()


def by_definition(x_NxD, y_NxD, kind):
    """One entry at a time, with the centring matrix written out."""
    N = len(x_NxD)

    def gram(x_NxD):
        if kind is linear_kernel:
            return np.array([[a @ b for b in x_NxD] for a in x_NxD])
        distance_NxN = np.array([[np.linalg.norm(a - b) for b in x_NxD] for a in x_NxD])
        bandwidth = np.median([distance_NxN[i, j] for i in range(N) for j in range(i)])
        return np.exp(-(distance_NxN**2) / (2 * bandwidth**2))

    def hsic(k_NxN, l_NxN):
        h_NxN = np.eye(N) - 1 / N
        return np.trace(k_NxN @ h_NxN @ l_NxN @ h_NxN) / N**2

    k_NxN, l_NxN = gram(x_NxD), gram(y_NxD)
    return hsic(k_NxN, l_NxN) / np.sqrt(hsic(k_NxN, k_NxN) * hsic(l_NxN, l_NxN))


@pytest.mark.parametrize("kernel", KERNELS)
def test_alignment_is_the_definition(random, kernel):
    x_NxD = random.normal(size=(12, 5))
    y_NxD = x_NxD + random.normal(size=(12, 5))
    found_2x2 = centred_alignment([x_NxD, y_NxD], kernel)
    expected = by_definition(x_NxD, y_NxD, kernel)
    assert 0.1 < expected < 0.95
    assert found_2x2 == pytest.approx(np.array([[1, expected], [expected, 1]]), abs=1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
def test_alignment_of_what_is_the_same(random, kernel):
    """Also if rotated, scaled and moved, as both kernels see distances or centred products alone."""
    x_NxD = random.normal(size=(50, 6))
    rotation, _ = np.linalg.qr(random.normal(size=(6, 6)))
    same = [x_NxD, x_NxD.copy(), 3 * x_NxD @ rotation + 5, x_NxD.astype(np.float32)]
    assert centred_alignment(same, kernel) == pytest.approx(np.ones((4, 4)), abs=1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_alignment_of_what_has_nothing_in_common(random, kernel):
    found = centred_alignment([random.normal(size=(1000, 3)), random.normal(size=(1000, 3))], kernel)
    assert 0 <= found[0, 1] < 0.02


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_state_that_never_changes_is_like_none(random, kernel):
    found = centred_alignment([np.full((9, 4), 0.3), np.zeros((9, 4)), random.normal(size=(9, 4))], kernel)
    assert np.isnan(found[:2]).all() and np.isnan(found[:, :2]).all() and found[2, 2] == pytest.approx(1)


def test_a_state_that_rarely_changes(random):
    """A median distance of zero leaves a kernel of equality."""
    x_NxD = np.zeros((20, 3))
    x_NxD[:3] = random.normal(size=(3, 3))
    assert np.array_equal(rbf_kernel(x_NxD)[:4, :4], np.eye(4)) and rbf_kernel(x_NxD)[5, 6] == 1


def test_singular_values(random):
    rank_1 = np.outer(random.normal(size=80), random.normal(size=60))
    assert singular_values(rank_1) == pytest.approx(np.eye(1, RANKS)[0], abs=1e-12)
    orthogonal, _ = np.linalg.qr(random.normal(size=(80, 20)))
    assert singular_values(7 * orthogonal) == pytest.approx(np.ones(20))
    x_NxD = random.normal(size=(80, 60)) + 4  # not centred: the mean is the first direction
    expected = np.sqrt(np.linalg.eigvalsh(x_NxD.T @ x_NxD)[::-1])
    assert singular_values(x_NxD) == pytest.approx(expected[:RANKS] / expected[0])
    assert not singular_values(np.zeros((5, 4))).any()
    assert np.isnan(singular_values(np.full((5, 4), np.inf))).tolist() == [True] * 4
