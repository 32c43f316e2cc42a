"""What runs of a study say, and how surely: paired intervals over seeds, labels of claims, power laws.

The unit is the seed. Documents of one seed share its initialisation, its data order and the luck of its training, so a
thousand of them say no more about another seed than one does: documents are resampled within a seed only, which tells
how much of a seed's difference is the choice of documents. docs/reports.md says the rules in prose.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
from scipy import optimize, stats

from spiral_jax.errors import require

LEVEL = 0.95
SEEDS_TO_REPLICATE = 3
RESAMPLES = 1000

Label = Literal["exploratory", "replicated", "not resolved"]


@dataclasses.dataclass(frozen=True)
class SeedDifference:
    """Two arms on the same documents at one seed, in nats per token; negative where the first arm is better.

    Attributes:
      seed: of both runs.
      nats: difference of the mean over all tokens.
      document_error: its standard error if the documents had been others, with these two models; nan with one document,
        which says nothing about others.
    """

    seed: int
    nats: float
    document_error: float


@dataclasses.dataclass(frozen=True)
class Interval:
    """A difference between two arms over seeds, in nats per token; negative where the first arm is better.

    Attributes:
      mean: over seeds.
      low, high: of the paired t interval; infinite with one seed, which says nothing about the next one.
      seeds: how many pairs.
      document_error: root mean square, over seeds, of the standard error from documents within a seed.
    """

    mean: float
    low: float
    high: float
    seeds: int
    document_error: float

    @property
    def resolved(self) -> bool:
        """Whether 0 is outside."""
        return self.low > 0 or self.high < 0


def seed_difference(
    seed: int, ours_D: Sequence[float], theirs_D: Sequence[float], tokens_D: Sequence[int | float]
) -> SeedDifference:
    """Compares two runs of one seed document by document.

    Args:
      seed: of both runs; the resampling takes it, too, so that a report is the same each time.
      ours_D: nats per token of each document, by the first arm.
      theirs_D: by the second.
      tokens_D: of each document; a document weighs as many tokens as it has.

    Raises:
      SpiralError: no documents, or not as many of one thing as of another.
    """
    ours, theirs, tokens = (np.asarray(values, np.float64) for values in (ours_D, theirs_D, tokens_D))
    require(ours.size > 0 and tokens.sum() > 0, "documents", f"{ours.size} of {tokens.sum():.0f} tokens", "some")
    same = ours.shape == theirs.shape == tokens.shape
    require(same, "documents", f"{ours.size} and {theirs.size} with {tokens.size} lengths", "the same for both arms")
    sums = (ours - theirs) * tokens
    # How often each document is drawn when as many as there are are drawn from them.
    draws = np.random.default_rng(seed).multinomial(ours.size, np.full(ours.size, 1 / ours.size), RESAMPLES)
    drawn_tokens = draws @ tokens
    means = (draws @ sums)[drawn_tokens > 0] / drawn_tokens[drawn_tokens > 0]
    error = float(means.std()) if ours.size > 1 else np.nan
    return SeedDifference(seed, float(sums.sum() / tokens.sum()), error)


def paired_interval(differences: Sequence[SeedDifference], level: float = LEVEL) -> Interval:
    """The paired t interval over seeds: mean +- t(level, seeds - 1) x s / sqrt(seeds), s over the seeds' differences.

    It is about these documents and the next seed. That the documents are a sample, too, does not widen it, as they are
    the same ones at every seed; `document_error` stands beside it.

    Args:
      differences: of the seeds that both arms have.
      level: at which it should cover the mean over all seeds.

    Raises:
      SpiralError: no seed.
    """
    require(len(differences) > 0, "seeds of a contrast", 0, "1 or more")
    nats = np.array([difference.nats for difference in differences])
    low, high = _interval(nats, level)
    errors = np.array([difference.document_error for difference in differences])
    return Interval(float(nats.mean()), float(low), float(high), nats.size, float(np.sqrt((errors**2).mean())))


def _interval(values_xN: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the t interval of a mean along the last axis."""
    number = values_xN.shape[-1]
    mean = values_xN.mean(-1)
    if number < 2:
        return np.full_like(mean, -np.inf), np.full_like(mean, np.inf)
    half = stats.t.ppf((1 + level) / 2, number - 1) * values_xN.std(-1, ddof=1) / np.sqrt(number)
    return mean - half, mean + half


def label(interval: Interval, *, primary: bool) -> Label:
    """What may be said of a contrast.

    - not resolved: the interval holds 0. It does where both arms give the same, and with a single seed always.
    - replicated: the interval does not hold 0, at least three seeds are paired, and the study declared this contrast,
      on this text and in this matching, as its primary one before its runs. A study has one at most, so that nothing
      has to be corrected for how many were looked at.
    - exploratory: all else that does not hold 0: something to test in a study that declares it.

    The sign is not part of it: a contrast may be replicated against what was hoped.

    Args:
      interval: of the contrast.
      primary: whether it is the declared one, of a study that is not exploratory as a whole.
    """
    if not interval.resolved:
        return "not resolved"
    return "replicated" if primary and interval.seeds >= SEEDS_TO_REPLICATE else "exploratory"


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """loss = floor + scale (x / unit)^-exponent, fitted by least squares of the loss's logarithm.

    Attributes:
      floor: what no x goes below; 0 unless it was fitted.
      scale: loss above the floor at x = unit.
      exponent: positive where loss falls.
      exponent_low, exponent_high: its interval at LEVEL.
      unit: geometric mean of the x that were fitted.
      points: how many.
    """

    floor: float
    scale: float
    exponent: float
    exponent_low: float
    exponent_high: float
    unit: float
    points: int
    _covariance: np.ndarray = dataclasses.field(repr=False)
    _quantile: float = dataclasses.field(repr=False)

    def at(self, x: np.ndarray) -> np.ndarray:
        """The fitted loss."""
        return _law(np.log(x / self.unit), *self._parameters)

    def band(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ends of the confidence band of the fitted curve, point by point at LEVEL (delta method)."""
        z = np.log(x / self.unit)
        loss = _law(z, *self._parameters)
        above = loss - self.floor
        # Derivatives of log loss by (log scale, exponent, floor); the covariance has as many rows as were fitted.
        slopes_Px = np.stack([above / loss, -z * above / loss, 1 / loss])[: len(self._covariance)]
        variance = np.einsum("px,pq,qx->x", slopes_Px, self._covariance, slopes_Px)
        factor = np.exp(self._quantile * np.sqrt(np.maximum(variance, 0)))
        return loss / factor, loss * factor

    @property
    def _parameters(self) -> tuple[float, float, float]:
        return float(np.log(self.scale)), self.exponent, self.floor


def _law(z: np.ndarray, log_scale: float, exponent: float, floor: float = 0.0) -> np.ndarray:
    return floor + np.exp(log_scale - exponent * z)


def fit_power_law(x: Sequence[float], loss: Sequence[float], *, with_floor: bool = False) -> PowerLaw:
    """Fits a power law to runs of several sizes or budgets.

    Args:
      x: what was spent, as FLOPs; positive.
      loss: nats per token; positive.
      with_floor: fit an irreducible loss, too, which takes points over decades to tell from a smaller exponent.

    Raises:
      SpiralError: fewer than 3 points (5 with a floor) or different x, or one that is not positive.
    """
    xs, losses = np.asarray(x, np.float64), np.asarray(loss, np.float64)
    unknowns = 3 if with_floor else 2
    least = 5 if with_floor else 3
    distinct = np.unique(xs).size
    require(distinct >= least, "a power law's points", f"{distinct} different ones", f"{least} or more")
    require(bool((xs > 0).all() and (losses > 0).all()), "a power law's points", "0 or less", "positive ones")
    unit = float(np.exp(np.log(xs).mean()))
    z, target = np.log(xs / unit), np.log(losses)
    slope, intercept = np.polyfit(z, target, 1)
    start = [intercept, -slope]
    if with_floor:
        # From half the lowest loss: too high a start cannot come down where the logarithm ends.
        slope, intercept = np.polyfit(z, np.log(losses - losses.min() / 2), 1)
        start = [intercept, -slope, losses.min() / 2]
    bounds = ([-np.inf, -np.inf, 0.0][:unknowns], [np.inf, np.inf, losses.min()][:unknowns])
    fit = optimize.least_squares(
        lambda p: np.log(_law(z, *p)) - target, start, bounds=bounds, x_scale="jac", xtol=1e-12, ftol=1e-12, gtol=1e-12
    )
    freedom = xs.size - unknowns
    covariance = np.linalg.pinv(fit.jac.T @ fit.jac) * (2 * fit.cost / freedom)
    quantile = float(stats.t.ppf((1 + LEVEL) / 2, freedom))
    log_scale, exponent, floor = [*fit.x, 0.0][:3]
    half = quantile * float(np.sqrt(covariance[1, 1]))
    return PowerLaw(
        floor=float(floor),
        scale=float(np.exp(log_scale)),
        exponent=float(exponent),
        exponent_low=float(exponent) - half,
        exponent_high=float(exponent) + half,
        unit=unit,
        points=xs.size,
        _covariance=covariance,
        _quantile=quantile,
    )


def pareto(cost: Sequence[float], loss: Sequence[float]) -> list[int]:
    """Places of the points that no other beats: none is as good in both, and better in one. In the order of cost."""
    front: list[int] = []
    for place in sorted(range(len(cost)), key=lambda i: (cost[i], loss[i])):
        if not front or loss[place] < loss[front[-1]]:
            front.append(place)
    return front
