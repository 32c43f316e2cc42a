"""Training batches: windows shuffled over the whole source, sliced per process, read ahead in threads.

The order of the stages is what makes training independent of the number of hosts: shuffle first, over all windows,
then slice. The stream is a pure function of the seed and the position in it, so its whole state is the step number.
"""

import hashlib
from collections.abc import Iterator

import grain
import numpy as np

from spiral_jax.data.windows import TokenSource, num_windows, window
from spiral_jax.errors import SpiralError


class _Windows:
    """The windows of a source, in the random-access form that grain reads from."""

    def __init__(self, source: TokenSource, sequence_length: int):
        self._source = source
        self._sequence_length = sequence_length
        self._num_windows = num_windows(source, sequence_length)

    def __len__(self) -> int:
        return self._num_windows

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"tokens": window(self._source, index, self._sequence_length)}


class TrainBatches(Iterator[dict[str, np.ndarray]]):
    """An endless iterator over batches, read ahead by threads. Close it, or use it in a `with` statement."""

    def __init__(self, batches: grain.DatasetIterator, step: int):
        self._batches = batches
        self._step = step
        self._batches.start_prefetch()

    @property
    def step(self) -> int:
        """Step of the batch that comes next: all there is to save."""
        return self._step

    def __next__(self) -> dict[str, np.ndarray]:
        try:
            batch = next(self._batches)
        except BaseException:
            # After a failed read grain would go on with the next batch, and the step would no longer say where we are.
            self.close()
            raise
        self._step += 1
        return batch

    def close(self) -> None:
        """Ends the reading threads and drops what was read ahead. May be called more than once."""
        self._batches.close()

    def __enter__(self) -> "TrainBatches":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def train_batches(
    source: TokenSource,
    *,
    sequence_length: int,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    read_threads: int = 2,
    prefetch_batches: int = 4,
) -> TrainBatches:
    """Makes the stream of this process's training batches.

    Every epoch takes each window once, in an order of its own; batches run on across the end of an epoch. The batch
    of a step, over all processes together, is the same set of windows for any `process_count`.

    Args:
      source: The tokens.
      sequence_length: Predictions per window, L.
      batch_size: Windows per step over all processes, B.
      seed: Any integer; decides the order.
      start_step: Step of the first batch. Earlier batches are not read.
      process_index: Which slice of the global batch to return.
      process_count: Number of slices, P.
      read_threads: Threads that read.
      prefetch_batches: Batches read ahead.

    Returns:
      An endless iterator of `{"tokens": int32 [B / P, L + 1]}`.

    Raises:
      SpiralError: The batch does not divide among the processes, or the source is shorter than one window.
    """
    if batch_size < 1 or batch_size % process_count:
        raise SpiralError(
            f"train.batch_size: found {batch_size}, allowed: positive multiples of the {process_count} processes"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} of {process_count}")
    if start_step < 0:
        raise ValueError(f"start_step {start_step}")
    # A thread reads whole batches: more threads than batches read ahead would have nothing to do.
    read_options = grain.ReadOptions(
        num_threads=min(read_threads, prefetch_batches), prefetch_buffer_size=prefetch_batches
    )
    batches = (
        grain.MapDataset.source(_Windows(source, sequence_length))
        .shuffle(seed=_shuffle_seed(seed))
        .repeat()
        .slice(slice(process_index, None, process_count))
        .batch(batch_size // process_count, drop_remainder=True)
        .slice(slice(start_step, None))
        .to_iter_dataset(read_options)
    )
    return TrainBatches(iter(batches), start_step)


def epoch_of(step: int, *, num_windows: int, batch_size: int) -> float:
    """Returns how many epochs lie before a step, as a fraction: 1.5 is the middle of the second epoch."""
    return step * batch_size / num_windows


def _shuffle_seed(seed: int) -> int:
    # grain shuffles epoch e of seed s with s + e: unhashed, seed 1 would begin with the second epoch of seed 0.
    return int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4], "big")
