"""Statistics on known truth."""

import numpy as np
import pytest
from scipy import stats

from experiments import statistics
from experiments.statistics import Interval, fit_power_law, label, paired_interval, pareto, seed_difference
from spiral_jax.errors import SpiralError

STUDIES, DOCUMENTS, SEEDS = 1000, 200, (3, 5)
TRUTH, BETWEEN_SEEDS, BETWEEN_DOCUMENTS = -0.1, 0.02, 0.1


def differences_of(studies: int, seeds: int, documents: int) -> tuple[np.ndarray, np.ndarray]:
    """Per-document differences [studies, seeds, documents] with variance between seeds and documents, and lengths."""
    rng = np.random.default_rng(seeds)
    tokens_D = rng.integers(20, 400, documents)
    of_documents_D = rng.normal(0, BETWEEN_DOCUMENTS, documents)  # the same documents at every seed
    of_documents_D -= np.average(of_documents_D, weights=tokens_D)
    of_seeds = rng.normal(TRUTH, BETWEEN_SEEDS, (studies, seeds, 1))
    rest = rng.normal(0, 0.05, (studies, seeds, documents))
    return of_seeds + of_documents_D + rest, tokens_D


@pytest.mark.parametrize("seeds", SEEDS)
def test_the_interval_covers(monkeypatch, seeds):
    monkeypatch.setattr(statistics, "RESAMPLES", 2)  # the error from documents is tested by itself
    differences_SxNxD, tokens_D = differences_of(STUDIES, seeds, DOCUMENTS)
    nothing_D = np.zeros(DOCUMENTS)
    intervals = [
        paired_interval([seed_difference(seed, one_D, nothing_D, tokens_D) for seed, one_D in enumerate(study_NxD)])
        for study_NxD in differences_SxNxD
    ]
    covered = np.mean([one.low <= TRUTH <= one.high for one in intervals])
    assert abs(covered - statistics.LEVEL) < 0.03
    assert abs(np.mean([one.mean for one in intervals]) - TRUTH) < 0.002
    # Documents taken as if each were a sample of its own do not cover: that is why the seed is the unit.
    pooled = differences_SxNxD.reshape(STUDIES, -1)
    low, high = stats.t.interval(statistics.LEVEL, pooled.shape[1] - 1, pooled.mean(1), stats.sem(pooled, axis=1))
    assert np.mean((low <= TRUTH) & (high >= TRUTH)) < 0.7


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize("level", (0.8, statistics.LEVEL))
def test_the_interval_covers_to_a_point(seeds, level):
    """Over as many studies as tell a point."""
    differences_SxNxD, tokens_D = differences_of(20 * STUDIES, seeds, 10)
    low, high = statistics._interval(np.average(differences_SxNxD, axis=2, weights=tokens_D), level)
    assert abs(np.mean((low <= TRUTH) & (high >= TRUTH)) - level) < 0.01


def test_the_interval_is_that_of_scipy():
    tokens_D = [1, 3]
    differences = [seed_difference(n, [2.0 + n, 1.0], [1.0, 1.0 + n * n], tokens_D) for n in range(4)]
    means = [(1 + n - 3 * n * n) / 4 for n in range(4)]  # by hand: ((1 + n) x 1 - n² x 3) / 4 tokens
    assert [one.nats for one in differences] == means
    found = paired_interval(differences)
    assert (found.low, found.high) == pytest.approx(stats.t.interval(0.95, 3, np.mean(means), stats.sem(means)))
    assert found.seeds == 4 and found.mean == pytest.approx(np.mean(means))


def test_error_from_documents_is_that_of_a_ratio():
    """Resampling agrees with the linearised standard error of a mean weighted by lengths."""
    rng = np.random.default_rng(0)
    tokens, values = rng.integers(50, 500, 300), rng.normal(0, 0.3, 300)
    mean = np.average(values, weights=tokens)
    linear = np.sqrt((((values - mean) * tokens) ** 2).sum()) / tokens.sum()
    found = seed_difference(7, values + 4, np.full(300, 4.0), tokens)
    assert found.document_error == pytest.approx(linear, rel=0.1)
    assert found == seed_difference(7, values + 4, np.full(300, 4.0), tokens)


def interval(low: float, high: float, seeds: int = 3) -> Interval:
    return Interval((low + high) / 2, low, high, seeds, 0.0)


@pytest.mark.parametrize("found, primary, expected", [
    (interval(-0.2, -0.1), True, "replicated"),
    (interval(0.1, 0.2), True, "replicated"),
    (interval(-0.2, -0.1), False, "exploratory"),
    (interval(-0.2, -0.1, seeds=2), True, "exploratory"),
    (interval(-0.2, 0.1), True, "not resolved"),
    (interval(-0.2, 0.0), True, "not resolved"),
])  # fmt: skip
def test_labels(found, primary, expected):
    assert label(found, primary=primary) == expected


def test_equal_arms_and_single_seeds_are_not_resolved():
    same = [seed_difference(n, [3.0, 4.0], [3.0, 4.0], [10, 20]) for n in range(5)]
    assert paired_interval(same) == Interval(0.0, 0.0, 0.0, 5, 0.0)
    assert label(paired_interval(same), primary=True) == "not resolved"
    one = paired_interval([seed_difference(0, [3.0], [4.0], [10])])
    assert one.mean == -1 and label(one, primary=True) == "not resolved"
    assert np.isnan(one.document_error)  # a single document says nothing about others


def test_arms_of_the_same_truth_are_seldom_resolved():
    """With only seeds between them, one study in twenty."""
    noise = np.random.default_rng(1).normal(0, 0.02, (STUDIES, 3))
    low, high = statistics._interval(noise, 0.95)
    found = np.mean(
        [label(Interval(0, *ends, 3, 0), primary=True) == "replicated" for ends in zip(low, high, strict=True)]
    )
    assert abs(found - 0.05) < 0.03


@pytest.mark.parametrize("floor", (0.0, 1.7))
def test_power_law_recovers_what_was_planted(floor):
    x = np.geomspace(1e17, 1e21, 9)
    exact = fit_power_law(x, floor + 2.0 * (x / 1e19) ** -0.15, with_floor=floor > 0)
    assert exact.exponent == pytest.approx(0.15, rel=1e-5) and exact.floor == pytest.approx(floor, rel=1e-5)
    assert exact.at(np.array([1e23])) == pytest.approx(floor + 2.0 * 1e4**-0.15, rel=1e-5)
    low, high = exact.band(x)
    assert np.all(low <= high) and np.all(high / low < 1.0001)


@pytest.mark.parametrize("floor, points", [(0.0, 5), (1.7, 12)])
def test_power_law_covers(floor, points):
    """The exponent's interval and the band, in between and beyond, with noise on the losses."""
    rng, x = np.random.default_rng(2), np.geomspace(1e17, 1e21, points)
    there = np.array([3e18, 1e22])

    def truth(at):
        return floor + 2.0 * (at / 1e19) ** -0.15

    inside = []
    for noise in rng.normal(0, 0.004, (400, points)):
        law = fit_power_law(x, truth(x) * np.exp(noise), with_floor=floor > 0)
        low, high = law.band(there)
        inside.append([law.exponent_low <= 0.15 <= law.exponent_high, *(low <= truth(there)) & (truth(there) <= high)])
    assert np.all(np.abs(np.mean(inside, 0) - 0.95) < 0.04)


@pytest.mark.parametrize("x, loss, with_floor", [
    ([1e3, 1e4], [2, 1], False), ([1, 1, 2], [3, 3, 2], False), ([1, 2, 3, 4], [4, 3, 2, 1], True),
    ([1, 2, 0], [3, 2, 1], False), ([1, 2, 3], [3, 2, 0], False),
])  # fmt: skip
def test_power_law_refuses(x, loss, with_floor):
    with pytest.raises(SpiralError, match="a power law's points"):
        fit_power_law(x, loss, with_floor=with_floor)


@pytest.mark.parametrize("ours, theirs, tokens", [([], [], []), ([1.0], [1.0, 2.0], [1, 1]), ([1.0], [1.0], [0])])
def test_documents_that_do_not_pair(ours, theirs, tokens):
    with pytest.raises(SpiralError, match="documents"):
        seed_difference(0, ours, theirs, tokens)


def test_pareto():
    assert pareto([3, 1, 2, 4, 1], [1.0, 3.0, 2.0, 1.0, 4.0]) == [1, 2, 0]
    assert pareto([], []) == []
