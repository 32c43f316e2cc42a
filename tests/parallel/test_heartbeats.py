"""Which of several processes are still there, heard through a store that is a dictionary."""

import threading
import time

import jax
import pytest

from spiral_jax.parallel import heartbeats
from spiral_jax.parallel.heartbeats import Heartbeats
from spiral_jax.parallel.processes import Processes


class Store:
    """jax's key-value store; a process that is in `stopped` gets no further in it."""

    def __init__(self):
        self.values, self.broken = {}, False

    def key_value_set(self, key, value, allow_overwrite=False):
        if self.broken:
            raise jax.errors.JaxRuntimeError("UNAVAILABLE")
        self.values[key] = value

    def key_value_dir_get(self, folder):
        if self.broken:
            raise jax.errors.JaxRuntimeError("UNAVAILABLE")
        return [(key, value) for key, value in self.values.items() if key.startswith(folder)]


@pytest.fixture
def start(monkeypatch):
    """(process) to its heartbeats among three, and what it has lost; all hundred times as fast."""
    monkeypatch.setattr(heartbeats, "_SECONDS", 0.01)
    monkeypatch.setattr(heartbeats, "_SECONDS_OF_SILENCE", 0.3)
    store, started = Store(), []

    def make(process):
        lost = []
        started.append(Heartbeats(Processes(process, 3, store), 0.6, lost.append))
        return started[-1], lost

    make.store = store
    yield make
    for beats in started:
        beats.close()


def wait_for(lost):
    deadline = time.monotonic() + 5
    while not lost and time.monotonic() < deadline:
        time.sleep(0.01)
    return lost


def test_process_0_finds_the_one_that_says_nothing_more(start):
    (main, lost), (_, lost_1), (second, _) = (start(process) for process in range(3))
    time.sleep(0.7)
    assert not lost and main.find_silent() is None
    second.close()
    assert main.find_silent() == 2
    assert wait_for(lost) == [2] and not lost_1


def test_one_that_never_said_anything_is_found_too(start):
    _, lost = start(0)
    start(2)
    assert wait_for(lost) == [1]


def test_the_others_find_that_process_0_does_not_answer(start):
    """It is stopped: its store neither answers nor fails. Or it is gone, and it fails."""
    (main, _), (first, lost) = start(0), start(1)
    start(2)
    time.sleep(0.3)
    assert first.find_silent() is None
    start.store.broken = True
    main.close()
    assert first.find_silent() == 0
    assert wait_for(lost) == [0]


def test_a_store_that_never_answers(start, monkeypatch):
    stuck = threading.Event()
    beats, lost = start(1)
    monkeypatch.setattr(Store, "key_value_set", lambda *_, **__: stuck.wait(3))
    monkeypatch.setattr(Store, "key_value_dir_get", lambda *_: stuck.wait(3) or [])
    assert wait_for(lost) == [0] and beats.find_silent() == 0
    stuck.set()


def test_closed_ones_find_nothing(start):
    beats, lost = start(1)
    beats.close()
    start.store.broken = True
    time.sleep(0.7)
    assert not lost
