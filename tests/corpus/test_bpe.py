"""A BPE is trained in a thread: it says how long it takes, and stops when it is told to."""

import threading
import time

import pytest

from spiral_jax.corpus import texts


def test_a_line_now_and_then_and_the_tokenizer_at_the_end(monkeypatch):
    def train(given, size):
        time.sleep(0.5)
        return given, size

    monkeypatch.setattr(texts, "train_bpe", train)
    monkeypatch.setattr(texts, "_SECONDS_BETWEEN_LINES", 0.1)
    lines = []
    assert texts.train_with_progress(["a"], 300, lines.append, lambda: None) == (["a"], 300)
    assert len(lines) >= 2 and lines[0] == "data: training the BPE, 0s so far"


def test_it_stops_when_it_is_told_to_and_passes_errors_on(monkeypatch):
    class Stop(Exception):
        pass

    def stop():
        raise Stop

    ended = threading.Event()
    monkeypatch.setattr(texts, "train_bpe", lambda given, size: ended.wait(10))
    begin = time.monotonic()
    with pytest.raises(Stop):
        texts.train_with_progress([], 300, print, stop)
    assert time.monotonic() - begin < 5
    ended.set()
    monkeypatch.setattr(texts, "train_bpe", lambda given, size: stop())
    with pytest.raises(Stop):
        texts.train_with_progress([], 300, print, lambda: None)
