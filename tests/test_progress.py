from spiral_jax import progress
from spiral_jax.progress import Progress


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
    assert lines == ["data: tokenising: 4.0 MB of 10.0 MB (40%), 0.5 MB/s, 12 s left"]
    now = 105.0
    shown.advance(1e6)
    assert len(lines) == 1
    now = 110.0
    shown.advance(6e6)  # more than was expected
    assert lines[1] == "data: tokenising: 11.0 MB of 10.0 MB (100%), 0.9 MB/s, 0 s left"


def test_whole_numbers_of_things(monkeypatch):
    monkeypatch.setattr(progress.time, "monotonic", iter([0.0, 4.0]).__next__)
    lines = []
    Progress("scored", 4000, unit="batches", report=lines.append).advance(1000)
    assert lines == ["scored: 1,000 batches of 4,000 batches (25%), 250 batches/s, 12 s left"]
