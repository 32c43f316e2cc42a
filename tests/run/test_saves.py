"""When a run is saved."""

from types import SimpleNamespace

import pytest
from states import CONFIG, saves_of

from spiral_jax.errors import SpiralError
from spiral_jax.run import saves
from spiral_jax.run.checkpoint import CheckpointConfig
from spiral_jax.run.saves import Clock


@pytest.fixture
def now(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(saves.time, "monotonic", lambda: now[0])
    return now


def test_the_clock_asks_once_every_so_many_minutes(now):
    clock, due = Clock(CheckpointConfig(every_minutes=2.0)), []
    for second in range(0, 500, 10):
        now[0] = float(second)
        if clock.is_due():
            due.append(second)
    assert due == [120, 240, 360, 480]


def test_a_checkpoint_for_another_reason_starts_it_again(now):
    """Otherwise a slow run would save twice in a row."""
    clock = Clock(CheckpointConfig(every_minutes=1.0))
    calls = []
    checkpoints = SimpleNamespace(due=lambda step, last: step == 5, wait=lambda: None, check=lambda: None,
                                  save=lambda step, state, meta: calls.append(step))  # fmt: skip
    guards = SimpleNamespace(check_claim=lambda: calls.append("ours"),
                             watchdog=SimpleNamespace(expect=lambda what, field: calls.append(field)))  # fmt: skip
    asked = [False]
    saving = saves_of(checkpoints, CONFIG, guards=guards, clock=clock, asked=lambda: asked[0])
    assert [saving.due(step) for step in (4, 5, 6)] == [False, True, False]
    now[0] = 50.0
    saving(5, None)
    assert calls == ["save_minutes", "ours", 5]
    now[0] = 100.0
    assert not clock.is_due()
    now[0], asked[0] = 110.0, True
    assert clock.is_due() and saving.due(6)


def test_no_minutes_are_none(now):
    clock = Clock(CheckpointConfig())
    now[0] = 1e9
    assert not clock.is_due()


@pytest.mark.parametrize("minutes", [-1.0, float("nan"), float("inf")])
def test_bad_minutes(minutes):
    with pytest.raises(SpiralError, match=r"^checkpoint\.every_minutes is "):
        CheckpointConfig(every_minutes=minutes)
