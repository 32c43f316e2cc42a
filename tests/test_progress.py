import pytest

from spiral_jax import progress
from spiral_jax.progress import Progress, duration


def test_share_rate_and_time_left_every_few_seconds(monkeypatch):
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    lines = []
    shown = Progress("data: tokenising", 10e6, unit="MB", scale=1e6, report=lines.append, seconds=2.0)
    shown.skip(2e6)  # done before: no part of the rate
    now = 101.0
    shown.advance(1e6)
    assert lines == []
    now = 104.0
    shown.advance(1e6)
    assert lines == ["data: tokenising: 4.0 of 10.0 MB (40%), 0.5 MB/s, 12s left"]
    now = 105.0
    shown.advance(1e6)
    assert len(lines) == 1
    now = 110.0
    shown.advance(6e6)  # more than was expected
    assert lines[1] == "data: tokenising: 11.0 of 10.0 MB (100%), 0.9 MB/s, 0s left"


@pytest.mark.parametrize(
    "total, seconds, done, line",
    [
        (4000, 4.0, 1000, "scored: 1,000 of 4,000 batches (25%), 250 batches/s, 12s left"),
        (4, 2.5, 1, "scored: 1 of 4 batches (25%), 0.4 batches/s, 8s left"),
    ],
)
def test_whole_numbers_of_things(monkeypatch, total, seconds, done, line):
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    lines = []
    shown = Progress("scored", total, unit="batches", report=lines.append)
    now = seconds
    shown.advance(done)
    assert lines == [line]


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "0s"),
        (45.4, "45s"),
        (59.6, "1m00s"),
        (200, "3m20s"),
        (3599.7, "1h00m"),
        (5 * 3600 + 7 * 60 + 30, "5h07m"),
        (2 * 86400 + 3 * 3600, "2d03h"),
        (float("inf"), "?"),
        (float("nan"), "?"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text
