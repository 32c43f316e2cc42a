import itertools
import threading
import time

import numpy as np
import pytest

from spiral_jax.data.pipeline import WindowOrder, WindowReader, train_batches
from spiral_jax.data.windows import TokensInMemory, TokenSource, num_windows
from spiral_jax.errors import SpiralError

LENGTH = 4
WINDOWS = 62  # not a multiple of the batch: epochs end inside a batch
BATCH = 8


class Counting(TokenSource):
    """Token i is i, so the first token of a window tells which window it is. Counts reads; fails where told to."""

    name = "counting"

    def __init__(self, num_tokens=WINDOWS * LENGTH + 3, fail_in_window=None):
        self.num_tokens = num_tokens
        self.fail_in_window = fail_in_window
        self.windows_read = []

    def read_many(self, ranges):
        for start, _ in ranges:
            self.windows_read.append(start // LENGTH)
            if self.fail_in_window == start // LENGTH:
                raise SpiralError(f"counting: window {self.fail_in_window} cannot be read")
        return [np.arange(start, stop, dtype=np.int32) for start, stop in ranges]


def stream(source=None, *, batch_size=BATCH, seed=0, **kwargs):
    source = source or Counting()
    order = WindowOrder([num_windows(source, LENGTH)], batch_size=batch_size, seed=seed)
    return train_batches(WindowReader([source], sequence_length=LENGTH, vocab_size=2**31), order, **kwargs)


def batches(num_steps, source=None, **kwargs):
    """The window numbers of each step's batch, [num_steps][B / P]."""
    found = []
    with stream(source, **kwargs) as iterator:
        for batch in itertools.islice(iterator, num_steps):
            assert batch.dtype == np.int32
            assert batch.shape == (BATCH // kwargs.get("process_count", 1), LENGTH + 1)
            np.testing.assert_array_equal(batch, batch[:, :1] + np.arange(LENGTH + 1))
            found.append((batch[:, 0] // LENGTH).tolist())
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
    with stream(source, prefetch_batches=3):
        wait_until(lambda: len(source.windows_read) == 3 * BATCH)
        time.sleep(0.05)
        assert len(source.windows_read) == 3 * BATCH


def test_an_error_in_a_thread_reaches_the_consumer_and_nothing_comes_after():
    reads = list(itertools.chain(*batches(5)))
    failing = reads[2 * BATCH + 3]  # in the third batch
    with stream(Counting(fail_in_window=failing)) as iterator:
        next(iterator)
        next(iterator)
        with pytest.raises(SpiralError, match=f"window {failing} cannot be read"):
            next(iterator)
        assert iterator.step == 2
        with pytest.raises(ValueError, match="closed"):
            next(iterator)


def test_closing_ends_the_threads():
    before = set(threading.enumerate())
    iterator = stream(read_threads=3)
    next(iterator)
    assert iterator.step == 1
    started = set(threading.enumerate()) - before
    assert started
    iterator.close()
    iterator.close()
    wait_until(lambda: not any(thread.is_alive() for thread in started))


def test_a_batch_that_does_not_divide_among_the_processes_is_refused():
    for batch_size, process_count in ((8, 3), (0, 1), (-4, 2)):
        with pytest.raises(SpiralError, match=rf"train\.batch_size is {batch_size}; allowed: .* {process_count} "):
            stream(batch_size=batch_size, process_count=process_count)


def test_the_epoch_of_a_step_counts_windows():
    order = WindowOrder([30, 32], batch_size=BATCH, seed=0)
    assert [order.epoch(step) for step in (0, 31, 62)] == [0, 4, 8]
    assert WindowOrder([32], batch_size=BATCH, seed=0).epoch(1) == 0.25
    assert order.epochs_of_sources(31) is None


def wait_until(condition):
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# Several sources.

LENGTHS = (30, 7, 19)  # windows of each


class Numbered(TokenSource):
    """Token i of source s is 1000 s + i."""

    def __init__(self, number):
        self.name, self.number, self.num_tokens = f"numbered{number}", number, LENGTHS[number] * LENGTH + 1

    def read_many(self, ranges):
        return [1000 * self.number + np.arange(start, stop, dtype=np.int32) for start, stop in ranges]


def mixed_batches(num_steps, *, start_step=0, weights=(), stage_starts=(0,), seed=0, **process):
    """(source, window) of each row of each step's batch."""
    order = WindowOrder(LENGTHS, batch_size=BATCH, seed=seed, weights=weights, stage_starts=stage_starts)
    sources = [Numbered(number) for number in range(3)]
    read = WindowReader(sources, sequence_length=LENGTH, vocab_size=3000)
    with train_batches(read, order, start_step=start_step, **process) as iterator:
        firsts = [batch[:, 0].tolist() for batch in itertools.islice(iterator, num_steps)]
    return [[(first // 1000, first % 1000 // LENGTH) for first in batch] for batch in firsts]


MIXTURES = {
    "by size": {},
    "weighted": {"weights": ((0.5, 0.3, 0.2),)},
    "staged": {"weights": ((0.5, 0.3, 0.2), (0.1, 0.0, 0.9), (1, 1, 1)), "stage_starts": (0, 7, 12)},
}


def test_without_weights_an_epoch_takes_every_window_of_every_source_once():
    windows = list(itertools.chain(*mixed_batches(3 * sum(LENGTHS) // BATCH)))
    everything = [(source, window) for source, length in enumerate(LENGTHS) for window in range(length)]
    epochs = [windows[e * sum(LENGTHS) : (e + 1) * sum(LENGTHS)] for e in range(3)]
    assert all(sorted(epoch) == everything for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("mixture", ["weighted", "staged"])
def test_with_weights_each_source_goes_through_epochs_of_its_own(mixture):
    windows = list(itertools.chain(*mixed_batches(40, **MIXTURES[mixture])))
    orders = set()
    for source, length in enumerate(LENGTHS):
        taken = [window for s, window in windows if s == source]
        epochs = [taken[e : e + length] for e in range(0, len(taken) - length + 1, length)]
        assert len(epochs) >= 2 and all(sorted(epoch) == list(range(length)) for epoch in epochs)
        orders |= {(source, *epoch) for epoch in epochs}
    order = WindowOrder(LENGTHS, batch_size=BATCH, seed=0, **MIXTURES[mixture])
    counts = np.bincount([source for source, _ in windows])
    assert order.epochs_of_sources(40) == (counts / LENGTHS).tolist()
    assert order.epoch(40) == 40 * BATCH / sum(LENGTHS)
    if mixture == "weighted":
        assert np.abs(counts - 40 * BATCH * np.array([0.5, 0.3, 0.2])).max() < 1
    else:
        assert not any(source == 1 for source, _ in windows[7 * BATCH : 12 * BATCH])
        assert sum(source == 2 for source, _ in windows[7 * BATCH : 12 * BATCH]) == 36


@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)
def test_a_mixture_resumes_at_every_step_and_for_any_number_of_processes(mixture):
    straight = mixed_batches(16, **mixture)
    for start_step in range(16):
        assert mixed_batches(16 - start_step, start_step=start_step, **mixture) == straight[start_step:]
    halves = [mixed_batches(16, process_index=index, process_count=2, **mixture) for index in range(2)]
    for step in range(16):
        assert sorted(halves[0][step] + halves[1][step]) == sorted(straight[step])


def test_sources_of_one_length_are_not_shuffled_alike():
    order = WindowOrder([50, 50], batch_size=1, seed=0, weights=((1, 1),))
    taken = [order[n] for n in range(100)]
    first, second = ([window for s, window in taken if s == source] for source in (0, 1))
    assert sorted(first) == sorted(second) and sum(a == b for a, b in zip(first, second, strict=True)) < 10


@pytest.mark.parametrize("bad", [-1, 2999, 2**31 - 1])
def test_an_id_outside_the_vocabulary_stops_the_stream_and_is_located(bad):
    tokens_N = np.arange(LENGTH * 20 + 1, dtype=np.int32)
    tokens_N[50] = bad
    source = TokensInMemory("memory", tokens_N)
    order = WindowOrder([20], batch_size=4, seed=0)
    with train_batches(WindowReader([source], sequence_length=LENGTH, vocab_size=2999), order) as iterator:
        with pytest.raises(SpiralError, match=rf"memory: token 50 is id {bad}; allowed: 0 to 2998"):
            for _ in range(5):
                next(iterator)
