"""Who may write a run on a bucket: two writers of one object, and time."""

import json
import threading
import time

import pytest

from spiral_jax.data.bucket import Versioned
from spiral_jax.run import bucket_hold as module
from spiral_jax.run.bucket_hold import BucketHold
from spiral_jax.run.claim import claim


class Ended(BaseException):
    """As a process ends: nothing comes after it."""


def end(status: int, line: str) -> None:
    raise Ended(status, line)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Seconds instead of minutes."""
    monkeypatch.setattr(module, "SECONDS_OF_SILENCE", 1.2)
    monkeypatch.setattr(module, "SECONDS_OF_A_RENEWAL", 0.3)


def of(place, owner: str) -> BucketHold:
    return BucketHold(place, owner, end)


def content(place) -> dict:
    return json.loads((place / ".lock").read_text())


def test_a_second_start_waits_with_a_line_until_the_first_has_ended(place, capsys):
    taken = threading.Event()
    with claim(place) as first:
        second = of(place, "second")
        waiting = threading.Thread(target=lambda: (second.take(), taken.set()), daemon=True)
        waiting.start()
        time.sleep(2.0)  # longer than an owner may say nothing: this one does say something
        assert not taken.is_set()
        first.look()
    assert taken.wait(2)
    assert content(place)["owner"] == "second" and content(place)["attempt"] == 2
    assert f"--workdir {place}: waiting for process " in capsys.readouterr().err


def test_of_two_starts_at_once_one_has_it(place):
    barrier, owners = threading.Barrier(4), []

    def start(owner: str) -> None:
        held = of(place, owner)
        barrier.wait()
        held.take()
        owners.append(owner)

    threads = [threading.Thread(target=start, args=(name,), daemon=True) for name in "abcd"]
    for thread in threads:
        thread.start()
    time.sleep(0.8)
    assert len(owners) == 1 and content(place)["owner"] == owners[0]


def test_an_owner_that_is_gone_is_replaced_after_its_silence_and_no_sooner(place):
    of(place, "gone").take()
    begin = time.monotonic()
    of(place, "next").take()
    assert 1.1 < time.monotonic() - begin < 2.5
    assert content(place)["owner"] == "next"


def test_silence_is_counted_from_the_last_renewal_by_the_clock_of_the_bucket(place):
    of(place, "gone").take()
    time.sleep(1.3)
    begin = time.monotonic()
    of(place, "next").take()
    assert time.monotonic() - begin < 0.6


def test_what_was_given_back_is_taken_at_once(place):
    with claim(place):
        pass
    begin = time.monotonic()
    with claim(place) as held:
        assert time.monotonic() - begin < 0.6
        held.look()
    assert content(place)["beat"] == "released" and content(place)["attempt"] == 2


def test_what_is_removed_does_not_come_back_with_the_next_renewal(place):
    with claim(place) as held:
        held.remove()
        time.sleep(1.0)
        assert not (place / ".lock").exists()
    assert not (place / ".lock").exists()


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"\xff\xfe", b"null", b'{"attempt": "x"}'])
def test_an_object_that_says_nothing_stops_nobody(place, text):
    (place / ".lock").write_bytes(text)
    begin = time.monotonic()
    of(place, "ours").take()
    assert content(place)["owner"] == "ours" and (time.monotonic() - begin < 0.6 or b"attempt" in text)


def test_a_writer_that_lost_it_ends_before_its_next_write(place):
    first = of(place, "first")
    first.take()
    time.sleep(1.3)  # as if it had been stopped
    of(place, "second").take()
    for look in (first.look, first.check, first._renew):
        with pytest.raises(Ended) as ended:
            look()
        first._lost.release()
        status, line = ended.value.args
        assert status == 43 and f"the run in {place} was taken over by process" in line
    first._thread = threading.Thread(target=int)
    first._thread.start()
    first.release()
    assert content(place)["owner"] == "second" and content(place)["beat"] != "released"


def test_a_renewal_whose_answer_was_lost_is_known_as_ones_own(place, monkeypatch):
    held = of(place, "ours")
    held.take()
    write, answers = Versioned.write, []

    def lose_the_first(self, *arguments):
        answers.append(write(self, *arguments))
        if len(answers) == 1:
            raise ConnectionError("no answer")
        return answers[-1]

    monkeypatch.setattr(Versioned, "write", lose_the_first)
    with pytest.raises(ConnectionError):
        held._renew()
    held._renew()
    held._renew()
    assert content(place)["beat"] > 1 and content(place)["owner"] == "ours"


def test_an_object_that_somebody_removed_is_written_again(place):
    held = of(place, "ours")
    held.take()
    (place / ".lock").unlink()
    held.look()
    held._renew()
    assert content(place)["owner"] == "ours"
