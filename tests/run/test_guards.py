"""A process that ends before anything can be saved gives the directory of its run back."""

import contextlib
import os
import signal
import threading

import pytest
from verbs import call

from spiral_jax import train
from spiral_jax.errors import SpiralError
from spiral_jax.parallel.deadlines import DeadlineConfig, Watchdog
from spiral_jax.run import guards as module
from spiral_jax.run.guards import Guards


class Held:
    """A claim that says when it is given back, and may take its time."""

    def __init__(self, seen, seconds=0.0):
        self.seen, self.seconds = seen, seconds

    def release(self):
        threading.Event().wait(self.seconds)
        self.seen.append("given back")


@pytest.mark.parametrize("can_save, expected", [(False, ["given back", 143]), (True, [])])
def test_a_signal_before_anything_can_be_saved(can_save, expected):
    """From then on, a save may be under way: whoever comes next waits until this process is surely gone."""
    seen, ended = [], threading.Event()
    with Guards(DeadlineConfig()) as guards:
        guards.claim = Held(seen)
        guards.end = lambda status, line: (seen.append(status), ended.set())
        if can_save:
            guards.request.hold()
        os.kill(os.getpid(), signal.SIGTERM)
        assert ended.wait(1 if can_save else 10) == (not can_save)
        assert seen == expected
        guards.request.signal = None  # so that the handlers of before are put back


def test_a_bucket_that_does_not_answer_keeps_no_process(monkeypatch):
    monkeypatch.setattr(module, "_SECONDS_TO_GIVE_BACK", 0.1)
    seen = []
    guards = Guards(DeadlineConfig())
    guards.claim = Held(seen, 20)
    guards.end = lambda status, line: seen.append(status)
    guards._end(43, "too late")
    assert seen == [43]


def test_a_start_may_wait_for_a_claim_longer_than_it_may_take(monkeypatch, tmp_path):
    """Another start may have it for as long as it trains; only what comes then has to end in time."""
    seen = []
    monkeypatch.setattr(Watchdog, "expect", lambda self, what, field: seen.append(what))
    monkeypatch.setattr(Watchdog, "expect_nothing", lambda self: seen.append("nothing"))

    @contextlib.contextmanager
    def claim(*given):
        seen.append("claim")
        yield None

    def run(*given):
        raise SpiralError("far enough")

    monkeypatch.setattr(train, "claim", claim)
    monkeypatch.setattr(train, "is_bucket", lambda place: True)
    monkeypatch.setattr(train, "run", run)
    assert call(train, "--config=experiments/quickstart.py", f"--workdir={tmp_path}/run")[0] == 2
    assert seen[-3:] == ["nothing", "claim", "the start"]
