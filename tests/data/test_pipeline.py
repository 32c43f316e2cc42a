import itertools
import threading
import time

import numpy as np
import pytest

from spiral_jax.data.pipeline import epoch_of, train_batches
from spiral_jax.data.windows import num_windows
from spiral_jax.errors import SpiralError

LENGTH = 4
WINDOWS = 62  # not a multiple of the batch: epochs end inside a batch
BATCH = 8


class Counting:
    """Token i is i, so the first token of a window tells which window it is. Counts reads; fails where told to."""

    name = "counting"

    def __init__(self, num_tokens=WINDOWS * LENGTH + 3, fail_in_window=None):
        self.num_tokens = num_tokens
        self.fail_in_window = fail_in_window
        self.windows_read = []

    def read(self, start, stop):
        self.windows_read.append(start // LENGTH)
        if self.fail_in_window == start // LENGTH:
            raise SpiralError(f"counting: window {self.fail_in_window} cannot be read")
        return np.arange(start, stop, dtype=np.int32)


def batches(num_steps, source=None, **kwargs):
    """The window numbers of each step's batch, [num_steps][B / P]."""
    arguments = {"sequence_length": LENGTH, "batch_size": BATCH, "seed": 0} | kwargs
    found = []
    with train_batches(source or Counting(), **arguments) as iterator:
        for batch in itertools.islice(iterator, num_steps):
            tokens_BxL = batch["tokens"]
            assert set(batch) == {"tokens"} and tokens_BxL.dtype == np.int32
            assert tokens_BxL.shape == (arguments["batch_size"] // arguments.get("process_count", 1), LENGTH + 1)
            np.testing.assert_array_equal(tokens_BxL, tokens_BxL[:, :1] + np.arange(LENGTH + 1))
            found.append((tokens_BxL[:, 0] // LENGTH).tolist())
    return found


def order_of_epochs(num_epochs, **kwargs):
    stream = list(itertools.chain(*batches(num_epochs * WINDOWS // BATCH + 1, **kwargs)))
    return [stream[e * WINDOWS : (e + 1) * WINDOWS] for e in range(num_epochs)]


def test_every_epoch_takes_each_window_once_in_its_own_order():
    epochs = order_of_epochs(4)
    for epoch in epochs:
        assert sorted(epoch) == list(range(WINDOWS))
    for one, other in itertools.combinations([list(range(WINDOWS)), *epochs], 2):
        assert sum(a == b for a, b in zip(one, other, strict=True)) < WINDOWS / 4


def test_seeds_share_no_epoch():
    epochs = [tuple(epoch) for seed in (0, 1, 2, 3, 2**40, -1) for epoch in order_of_epochs(4, seed=seed)]
    assert len(set(epochs)) == len(epochs) == 24
    assert order_of_epochs(1, seed=2) == order_of_epochs(1, seed=2)


@pytest.mark.parametrize("process_count", [2, 4, 8])
def test_the_global_batch_of_a_step_is_the_same_for_any_number_of_processes(process_count):
    num_steps = 20  # two and a half epochs
    alone = batches(num_steps)
    slices = [batches(num_steps, process_index=index, process_count=process_count) for index in range(process_count)]
    for step in range(num_steps):
        together = [window for one_slice in slices for window in one_slice[step]]
        assert sorted(together) == sorted(alone[step])


@pytest.mark.parametrize("start_step", [1, 7, 8, 13])
@pytest.mark.parametrize("process", [{}, {"process_index": 1, "process_count": 2}])
def test_starting_at_a_step_equals_going_on_and_reads_nothing_before(start_step, process):
    straight = batches(18, **process)
    source = Counting()
    resumed = batches(18 - start_step, source, start_step=start_step, prefetch_batches=1, **process)
    assert resumed == straight[start_step:]
    expected_reads = [window for batch in resumed for window in batch]
    assert source.windows_read[: len(expected_reads)] == expected_reads  # one thread: in order


def test_a_far_step_is_reached_at_once():
    source = Counting()
    [batch] = batches(1, source, start_step=10**9, prefetch_batches=4)
    assert len(batch) == BATCH and len(source.windows_read) <= 5 * BATCH


@pytest.mark.parametrize(("read_threads", "prefetch_batches"), [(1, 1), (4, 2), (3, 16)])
def test_threads_do_not_change_the_stream(read_threads, prefetch_batches):
    assert batches(20, read_threads=read_threads, prefetch_batches=prefetch_batches) == batches(20)


def test_a_single_window_and_a_batch_of_several_epochs():
    source = Counting(LENGTH + 1)
    assert batches(3, source) == [[0] * BATCH] * 3
    source = Counting(2 * LENGTH + 1)
    for batch in batches(3, source):
        assert sorted(batch) == [0] * 4 + [1] * 4


def test_batches_are_read_ahead_of_the_first_request_but_not_without_end():
    source = Counting()
    with train_batches(source, sequence_length=LENGTH, batch_size=BATCH, seed=0, prefetch_batches=3):
        wait_until(lambda: len(source.windows_read) == 3 * BATCH)
        time.sleep(0.05)
        assert len(source.windows_read) == 3 * BATCH


def test_an_error_in_a_thread_reaches_the_consumer_and_nothing_comes_after():
    reads = list(itertools.chain(*batches(5)))
    failing = reads[2 * BATCH + 3]  # in the third batch
    with train_batches(Counting(fail_in_window=failing), sequence_length=LENGTH, batch_size=BATCH, seed=0) as iterator:
        next(iterator)
        next(iterator)
        with pytest.raises(SpiralError, match=f"window {failing} cannot be read"):
            next(iterator)
        assert iterator.step == 2
        with pytest.raises(ValueError, match="closed"):
            next(iterator)


def test_closing_ends_the_threads():
    before = set(threading.enumerate())
    iterator = train_batches(Counting(), sequence_length=LENGTH, batch_size=BATCH, seed=0, read_threads=3)
    next(iterator)
    assert iterator.step == 1
    started = set(threading.enumerate()) - before
    assert started
    iterator.close()
    iterator.close()
    wait_until(lambda: not any(thread.is_alive() for thread in started))


def test_a_batch_that_does_not_divide_among_the_processes_is_refused():
    for batch_size, process_count in ((8, 3), (0, 1), (-4, 2)):
        with pytest.raises(SpiralError, match=rf"train\.batch_size: found {batch_size}, allowed: .* {process_count} "):
            train_batches(
                Counting(), sequence_length=LENGTH, batch_size=batch_size, seed=0, process_count=process_count
            )


def test_a_source_shorter_than_a_window_is_refused_at_once():
    with pytest.raises(SpiralError, match=r"train\.sequence_length"):
        train_batches(Counting(LENGTH), sequence_length=LENGTH, batch_size=BATCH, seed=0)


def test_epoch_of_counts_windows():
    windows = num_windows(Counting(), LENGTH)
    assert windows == WINDOWS
    assert epoch_of(0, num_windows=windows, batch_size=BATCH) == 0
    assert epoch_of(31, num_windows=windows, batch_size=BATCH) == 4
    assert epoch_of(1, num_windows=32, batch_size=BATCH) == 0.25


def wait_until(condition):
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
