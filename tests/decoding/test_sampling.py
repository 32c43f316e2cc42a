"""Choosing the next token, against the same choice written for one row in NumPy."""

import jax
import numpy as np
import pytest

from spiral_jax.decoding.sampling import Sampling, SamplingSettings, next_tokens, restrict
from spiral_jax.errors import SpiralError

V, NUM_IDS = 12, 10
LOGITS = np.array([2.0, 1.5, 1.5, 0.0, -1.0, 3.0, 0.5, -2.0, 1.0, 0.2, 9.0, 8.0], np.float32)
choose = jax.jit(next_tokens, static_argnums=3)


def probabilities(temperature, top_k=0, top_p=1.0):
    """What each id is drawn with: temperature, then top-k, then the smallest set of probability top-p."""
    scaled = LOGITS[:NUM_IDS].astype(np.float64) / temperature
    p = np.exp(scaled - scaled.max())
    if top_k:
        p[scaled < np.sort(scaled)[-min(top_k, NUM_IDS)]] = 0
    p /= p.sum()
    order, kept, total = np.argsort(-p, kind="stable"), [], 0.0
    for i in order:
        if total < top_p:
            kept.append(i)
        total += p[i]
    q = np.where(p >= min(p[i] for i in kept), p, 0)
    return np.append(q / q.sum(), [0, 0])


CASES = [(1.0, 0, 1.0), (0.5, 0, 1.0), (1.0, 3, 1.0), (2.0, 0, 0.7), (1.5, 5, 0.8), (1.0, 1, 1.0), (1.0, 99, 0.05)]


@pytest.mark.parametrize("case", CASES)
def test_draws_have_the_probabilities(case):
    N = 4000
    settings = [SamplingSettings(*case, seed=seed) for seed in range(N)]
    drawn = choose(np.tile(LOGITS, (N, 1)), Sampling.of(settings), np.full(N, 7, np.int32), NUM_IDS)
    found = np.bincount(np.asarray(drawn), minlength=V) / N
    wanted = probabilities(*case)
    assert not np.any(found[wanted == 0])
    assert np.max(np.abs(found - wanted) / np.sqrt(wanted * (1 - wanted) / N + 1e-12)) < 4.5 or wanted.max() == 1


def test_restricted_sets_row_by_row():
    kept = np.isfinite(restrict(np.tile(LOGITS[:NUM_IDS], (len(CASES), 1)) / np.array([[c[0]] for c in CASES]),
                                Sampling.of([SamplingSettings(*case) for case in CASES])))  # fmt: skip
    np.testing.assert_array_equal(kept, [probabilities(*case)[:NUM_IDS] > 0 for case in CASES])


def test_rows_have_their_own_settings_and_numbers():
    settings = [SamplingSettings(0.0, seed=1), SamplingSettings(1e-30), SamplingSettings(50.0, seed=3),
                SamplingSettings(50.0, 1, 1.0, 4), SamplingSettings(50.0, 2, 1.0, 2**32 - 1)]  # fmt: skip
    draws = np.array([
        choose(np.tile(LOGITS, (5, 1)), Sampling.of(settings), np.full(5, position, np.int32), NUM_IDS)
        for position in range(60)
    ])  # fmt: skip
    assert np.all(draws[:, [0, 1, 3]] == 5)
    assert len(set(draws[:, 2])) > 5 and set(draws[:, 4]) == {5, 0}
    for row in range(5):
        alone = [
            int(choose(LOGITS[None], Sampling.of([settings[row]]), np.array([position], np.int32), NUM_IDS)[0])
            for position in range(60)
        ]
        assert alone == draws[:, row].tolist()


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -0.1), ("temperature", float("nan")), ("temperature", float("inf")), ("top_k", -1), ("top_p", 0.0),
     ("top_p", 1.01), ("top_p", float("nan")), ("seed", -1), ("seed", 2**32)],
)  # fmt: skip
def test_settings_out_of_range(field, value):
    with pytest.raises(SpiralError, match=rf"^{field} is {value!r}; allowed: "):
        SamplingSettings(**{field: value})
