"""Which source each window of a run is taken from: exact shares, and the state is still one integer."""

import bisect
import functools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from spiral_jax.errors import SpiralError

# Windows after which the pattern of a mixture repeats. Weights of four decimals need 10,000.
MAX_PERIOD = 100_000


class Mixture:
    """Stages of weighted sources, as a function of the position in the stream of windows.

    After n windows of a stage, source i has given between n w_i - 1 and n w_i + 1 windows, both excluded: R. Tijdeman,
    "The chairman assignment problem", Discrete Mathematics 32 (1980). Position n says everything: which source, and
    how many windows it gave before, over all stages.
    """

    def __init__(self, weights: Sequence[Sequence[float]], starts: Sequence[int]):
        """Makes the pattern of each stage.

        Args:
          weights: a row per stage: the share of each source, in any unit. 0.1 means a tenth, not its binary neighbour.
          starts: position of the first window of each stage, rising from 0.

        Raises:
          SpiralError: weights whose pattern repeats only after more than `MAX_PERIOD` windows.
        """
        self._starts = list(starts)
        self._stages = [_Pattern(_integer_weights(tuple(row))) for row in weights]
        # Windows of each source before each stage.
        self._before = [np.zeros(len(weights[0]), np.int64)]
        for stage, begin, end in zip(self._stages, starts, starts[1:], strict=False):
            self._before.append(self._before[-1] + stage.counts(end - begin))

    def __getitem__(self, position: int) -> tuple[int, int]:
        """Returns (source, how many windows it gave before) of the window at a position."""
        stage = bisect.bisect_right(self._starts, position) - 1
        source, earlier = self._stages[stage][position - self._starts[stage]]
        return source, int(self._before[stage][source]) + earlier

    def counts(self, position: int) -> np.ndarray:
        """Returns how many of the windows before a position come from each source, int64 [sources]."""
        stage = bisect.bisect_right(self._starts, position) - 1
        return self._before[stage] + self._stages[stage].counts(position - self._starts[stage])


class _Pattern:
    """The windows of one stage: a period of `sum(weights)` windows, over and over."""

    def __init__(self, weights: tuple[int, ...]):
        self._weights = np.array(weights, np.int64)
        self._source_P = _tijdeman(weights)
        self._earlier_P = np.zeros(len(self._source_P), np.int64)
        for source, weight in enumerate(weights):
            self._earlier_P[self._source_P == source] = np.arange(weight)

    def __getitem__(self, position: int) -> tuple[int, int]:
        periods, place = divmod(position, len(self._source_P))
        source = int(self._source_P[place])
        return source, periods * int(self._weights[source]) + int(self._earlier_P[place])

    def counts(self, position: int) -> np.ndarray:
        periods, place = divmod(position, len(self._source_P))
        return periods * self._weights + np.bincount(self._source_P[:place], minlength=len(self._weights))


@functools.lru_cache(maxsize=32)
def _tijdeman(weights: tuple[int, ...]) -> np.ndarray:
    """The source of each window of a period, int64 [sum(weights)].

    A source may give window n when it lags its share by at least 1 / (2 k - 2) windows, k sources; of those that may,
    the one goes first that would be a whole window (less that margin) behind the soonest.
    """
    period = sum(weights)
    active = [source for source, weight in enumerate(weights) if weight]
    margin = max(2 * len(active) - 2, 1)
    given = [0] * len(weights)
    order = np.empty(period, np.int64)
    for n in range(period):
        lag = {source: (n + 1) * weights[source] - given[source] * period for source in active}  # times the period
        due = [source for source in active if margin * lag[source] >= period]
        order[n] = min(due, key=lambda source: ((margin - 1) * period - margin * lag[source]) / weights[source])
        given[order[n]] += 1
    return order


def _integer_weights(row: tuple[float, ...]) -> tuple[int, ...]:
    """The smallest integers in the same proportions."""
    exact = [Fraction(repr(weight)) for weight in row]
    denominator = math.lcm(*(weight.denominator for weight in exact))
    multiples = [int(weight * denominator) for weight in exact]
    common = math.gcd(*multiples)
    integers = tuple(weight // common for weight in multiples)
    if sum(integers) > MAX_PERIOD:
        rounded = tuple(max(round(float(weight / sum(exact)), 4), 0.0001 * (weight > 0)) for weight in exact)
        raise SpiralError(
            f"data.weights has {row}, which repeat only after {sum(integers):,} windows; allowed: up to "
            f"{MAX_PERIOD:,}, as for weights of four decimals: {rounded}"
        )
    return integers
