"""The loop's order: a step's metrics are read only when the next step has been dispatched.

On CPU `jax.transfer_guard` does not see reads, so the steps here are fakes whose metrics raise when read too early.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from spiral_jax.training.loop import AgreedStop, Recorder, Stopped, fit


class ReadTooEarlyError(Exception):
    pass


class Run:
    """A fake run: a log of what happened in which order, and steps whose metrics know when they may be read."""

    def __init__(self, last_step: int):
        self.last_step = last_step
        self.dispatched = 0
        self.log = []
        self.rows = []
        # Steps after which the loop has to wait anyhow: their metrics may be read with nothing behind them.
        self.may_wait = {last_step}

    def train_step(self, state, batch):
        self.dispatched += 1
        step = self.dispatched
        assert state == step - 1, "a step was given the state of another one"
        assert batch == f"batch {step}"
        self.log.append(("dispatch", step))
        return step, {"loss": FakeMetric(self, step, step / 2), "learning_rate": FakeMetric(self, step, 0.1)}

    def record(self, row):
        self.log.append(("record", row["step"]))
        self.rows.append(row)

    def save(self, step, state):
        assert state == step
        self.log.append(("save", step))

    def evaluate(self, step, state):
        assert step == state == self.dispatched
        self.log.append(("evaluate", state))
        return {"validation_loss": 10.0 + state}

    def fit(self, recorder=None, first_step=1, evaluate_due=lambda step: False, save_due=lambda step: False, **kwargs):
        self.dispatched = first_step - 1
        return fit(
            first_step - 1,
            range(first_step, self.last_step + 1),
            train_step=self.train_step,
            batches=(f"batch {step}" for step in itertools.count(first_step)),
            recorder=recorder or Recorder(self.record),
            evaluations=[Due(evaluate_due, self.evaluate)],
            saving=Due(save_due, self.save),
            **kwargs,
        )


class Due(NamedTuple):
    """Something that is done after some steps."""

    due: Callable[[int], bool]
    run: Callable

    def __call__(self, step, state):
        return self.run(step, state)


class FakeMetric:
    """A device array of one number, in the ways a program can read one or wait for one."""

    def __init__(self, run: Run, step: int, value: float):
        self._run, self._step, self._value = run, step, value

    def _read(self):
        if self._run.dispatched <= self._step and self._step not in self._run.may_wait:
            raise ReadTooEarlyError(f"step {self._step} was read before step {self._step + 1} was dispatched")
        return np.float32(self._value)

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self._read(), dtype)

    def __float__(self):
        return float(self._read())

    def item(self):
        return float(self._read())

    def tolist(self):
        return float(self._read())

    def copy_to_host_async(self):
        """Starts a copy, which is no read."""

    def block_until_ready(self):
        self._read()
        return self


class EagerRecorder(Recorder):
    """What must not be: reads a step as soon as it is dispatched."""

    def dispatched(self, step, metrics, input_wait):
        super().dispatched(step, metrics, input_wait)
        self.flush()


def test_metrics_of_a_step_are_read_after_the_next_is_dispatched():
    run = Run(last_step=6)
    state, last = run.fit()
    assert (state, last) == (6, 6)
    expected = [("dispatch", 1)]
    for step in range(2, 7):
        expected += [("dispatch", step), ("record", step - 1)]
    assert run.log == [*expected, ("record", 6)]


def test_rows_are_complete_and_in_order():
    run = Run(last_step=6)
    run.fit()
    assert [row["step"] for row in run.rows] == [1, 2, 3, 4, 5, 6]
    for row in run.rows:
        assert row.keys() == {"step", "loss", "learning_rate", "step_time", "input_wait"}
        assert row["loss"] == row["step"] / 2
        assert type(row["loss"]) is float
        assert row["step_time"] > 0 and row["input_wait"] >= 0


def test_a_recorder_that_reads_at_once_is_caught():
    """The test above means something: an eager loop fails it."""
    run = Run(last_step=6)
    with pytest.raises(ReadTooEarlyError, match="step 1 was read before step 2"):
        run.fit(EagerRecorder(run.record))


@pytest.mark.parametrize("read", [np.asarray, float, jax.device_get, jax.block_until_ready], ids=lambda f: f.__name__)
def test_every_way_to_read_is_seen(read):
    run = Run(last_step=3)
    _, metrics = run.train_step(0, "batch 1")
    with pytest.raises(ReadTooEarlyError):
        read(metrics["loss"])
    run.train_step(1, "batch 2")
    read(metrics["loss"])


def test_evaluation_goes_into_the_row_of_its_step():
    run = Run(last_step=6)
    run.may_wait |= {2, 4}
    run.fit(evaluate_due=lambda step: step % 2 == 0)
    assert [row.get("validation_loss") for row in run.rows] == [None, 12.0, None, 14.0, None, 16.0]
    assert [row["step"] for row in run.rows] == [1, 2, 3, 4, 5, 6]
    # Evaluated on the state after its step, before the next step donates it.
    for step in (2, 4):
        assert (
            run.log.index(("dispatch", step))
            < run.log.index(("evaluate", step))
            < run.log.index(("dispatch", step + 1))
        )


def test_a_checkpoint_has_every_row_up_to_it_on_record():
    run = Run(last_step=7)
    run.may_wait |= {3, 6}
    run.fit(save_due=lambda step: step % 3 == 0 or step == 7, evaluate_due=lambda step: step == 3)
    saved = [index for index, (what, _) in enumerate(run.log) if what == "save"]
    assert [run.log[index][1] for index in saved] == [3, 6, 7]
    for index in saved:
        step = run.log[index][1]
        assert [n for what, n in run.log[:index] if what == "record"] == list(range(1, step + 1))
        # Before the next step is dispatched, which takes the state's memory.
        assert [n for what, n in run.log[:index] if what == "dispatch"] == list(range(1, step + 1))
    assert run.log.index(("evaluate", 3)) < run.log.index(("record", 3)) < run.log.index(("save", 3))
    assert [n for what, n in run.log if what == "record"] == [1, 2, 3, 4, 5, 6, 7]


def test_stopping_early_saves_once():
    run = Run(last_step=100)
    run.may_wait |= {4}
    state, last = run.fit(should_stop=lambda: run.dispatched == 4)
    assert (state, last) == (4, 4)
    assert run.log[-2:] == [("record", 4), ("save", 4)]
    assert [what for what, _ in run.log].count("save") == 1
    assert [row["step"] for row in run.rows] == [1, 2, 3, 4]


def test_stopping_where_a_save_is_due_saves_once():
    run = Run(last_step=100)
    run.may_wait |= {2, 4}
    run.fit(should_stop=lambda: run.dispatched == 4, save_due=lambda step: step % 2 == 0)
    assert [entry for entry in run.log if entry[0] == "save"] == [("save", 2), ("save", 4)]


def test_when_asked_to_stop_an_evaluation_is_not_begun():
    run = Run(last_step=100)
    run.may_wait |= {4}
    run.fit(should_stop=lambda: run.dispatched == 4, evaluate_due=lambda step: step == 4)
    assert run.log[-2:] == [("record", 4), ("save", 4)]
    assert ("evaluate", 4) not in run.log


def test_an_evaluation_that_is_left_is_followed_by_the_save():
    run = Run(last_step=100)
    run.may_wait |= {3, 4}

    def left(step, state):
        if step == 4:
            raise Stopped
        return {"validation_loss": 1.0}

    run.evaluate = left
    assert run.fit(evaluate_due=lambda step: step >= 3) == (4, 4)
    assert run.log[-2:] == [("record", 4), ("save", 4)]
    assert ["validation_loss" in row for row in run.rows] == [False, False, True, False]


def test_one_process_stops_and_saves_when_it_is_asked():
    asked, due = [None], [False]
    stop = AgreedStop(lambda: asked[0], Mesh(np.array(jax.devices()[:1]), ("data",)), lambda: due[0])
    assert (stop(), stop.signal, stop.take_save()) == (False, None, False)
    stop.check()
    due[0] = True
    assert (stop(), stop.take_save(), stop.take_save()) == (False, True, False)
    stop(), stop()
    assert (stop.take_save(), stop.take_save()) == (True, False)
    asked[0] = 15
    with pytest.raises(Stopped):
        stop.check()
    assert stop.signal == 15


def test_resuming_counts_on():
    run = Run(last_step=9)
    state, last = run.fit(first_step=7)
    assert (state, last) == (9, 9)
    assert [row["step"] for row in run.rows] == [7, 8, 9]


def test_nothing_left_to_do():
    run = Run(last_step=3)
    assert run.fit(first_step=4) == (3, 3)
    assert run.log == []


def test_the_profiler_is_asked_before_every_step():
    run = Run(last_step=3)
    run.fit(before_step=lambda step: run.log.append(("before", step)))
    order = [entry for entry in run.log if entry[0] != "record"]
    assert order == [entry for step in (1, 2, 3) for entry in (("before", step), ("dispatch", step))]


def test_arrays_become_lists():
    """Router entropy is an array per step: JSON wants lists."""
    rows = []
    recorder = Recorder(rows.append)
    recorder.dispatched(1, {"router_entropy": np.float32([[1.0, 2.0], [3.0, 4.0]])}, 0.0)
    recorder.flush()
    recorder.flush()
    assert len(rows) == 1
    assert rows[0]["router_entropy"] == [[1.0, 2.0], [3.0, 4.0]]


def test_time_that_is_not_training_is_in_no_row(monkeypatch):
    """Steps of 1 s by the clock, an evaluation of 100 s after the second."""
    now = 0.0
    monkeypatch.setattr("spiral_jax.training.loop.time.perf_counter", lambda: now)
    rows = []
    recorder = Recorder(rows.append)
    for step in (1, 2, 3):
        recorder.dispatched(step, {"loss": np.float32(1)}, 0.0)
        now += 1.0
        if step == 2:
            with recorder.paused():
                now += 100.0
                recorder.add({"validation_loss": 1.0})
    recorder.flush()
    assert [row["step_time"] for row in rows] == [1.0, 1.0, 1.0]
