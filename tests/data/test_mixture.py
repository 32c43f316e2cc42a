"""Shares of a mixture against the closed form n w, in exact arithmetic."""

import itertools
from fractions import Fraction

import numpy as np
import pytest

from spiral_jax.data.mixture import MAX_PERIOD, Mixture
from spiral_jax.errors import SpiralError

ROWS = [
    (1.0,),
    (0.7, 0.3),
    (0.5, 0.3, 0.2),
    (3, 1, 0, 1),
    (0.9, *[0.01] * 10),  # the small ones come due together
    (0.001, 0.999),
    (2.5, 1.3, 7.0),
    (0.337, 0.331, 0.332),
    (1, 10, 100, 1000),
    tuple(np.random.default_rng(0).integers(1, 100, 12).tolist()),
]


def shares(row):
    exact = [Fraction(str(weight)) for weight in row]
    return [weight / sum(exact) for weight in exact]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_after_every_window_each_count_is_within_one_of_its_share(row):
    mixture, counts = Mixture([row], [0]), [0] * len(row)
    for n in range(3000):
        source, earlier = mixture[n]
        assert earlier == counts[source]
        counts[source] += 1
        for count, share in zip(counts, shares(row), strict=True):
            assert abs(count - (n + 1) * share) < 1
        if n % 97 == 0:
            assert mixture.counts(n + 1).tolist() == counts


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_far_positions_are_reached_at_once_and_keep_the_shares(row):
    mixture = Mixture([row], [0])
    for n in (10**6 + 1, 10**12 + 12345):
        counts = mixture.counts(n)
        assert counts.sum() == n
        assert all(abs(int(count) - n * share) < 1 for count, share in zip(counts, shares(row), strict=True))
        source, earlier = mixture[n]
        assert earlier == counts[source]


def test_a_source_without_a_share_gives_nothing():
    assert {Mixture([(0.0, 2.0, 1.0)], [0])[n][0] for n in range(1000)} == {1, 2}


def test_stages_take_over_where_they_start_and_sources_go_on_where_they_were():
    rows, starts = [(0.7, 0.3), (0.0, 1.0), (0.25, 0.75)], [0, 13, 50]
    mixture, counts = Mixture(rows, starts), [0, 0]
    for n in range(400):
        source, earlier = mixture[n]
        assert earlier == counts[source]
        counts[source] += 1
        expected = sum(
            shares(row)[0] * max(min(n + 1, end) - start, 0)
            for row, (start, end) in zip(rows, itertools.pairwise([*starts, 10**9]), strict=True)
        )
        assert abs(counts[0] - expected) < 3  # a window per stage
        assert mixture.counts(n + 1).tolist() == counts
    assert all(mixture[n][0] == 1 for n in range(13, 50))


def test_weights_that_hardly_ever_repeat_are_refused_with_some_that_are_allowed():
    with pytest.raises(SpiralError, match=r"data\.weights has \(0\.123456789, 0\.876543211\) .* allowed: ") as error:
        Mixture([(0.123456789, 0.876543211)], [0])
    assert f"{MAX_PERIOD:,}" in str(error.value) and str(error.value).endswith("(0.1235, 0.8765)")
    Mixture([(0.1235, 0.8765)], [0])
