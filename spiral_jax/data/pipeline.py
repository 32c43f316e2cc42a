"""Training batches: windows shuffled over each whole source, mixed, sliced per process, read ahead in threads.

The order of the stages is what makes training independent of the number of hosts: shuffle first, over all windows,
then slice. The stream is a pure function of the seed and the position in it, so its whole state is the step number.
"""

import contextlib
import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from spiral_jax.data.mixture import Mixture
from spiral_jax.data.windows import TokenSource, read_windows, window_start
from spiral_jax.errors import SpiralError, require


class WindowOrder:
    """Which window comes n-th in a run: random access to an endless stream.

    Without weights an epoch takes every window of every source once, in an order of its own. With weights the sources
    are mixed in these shares; each goes through epochs of its own.
    """

    def __init__(
        self,
        windows_per_source: Sequence[int],
        *,
        batch_size: int,
        seed: int,
        weights: Sequence[Sequence[float]] = (),
        stage_starts: Sequence[int] = (0,),
    ):
        """Fixes the order.

        Args:
          windows_per_source: how many windows there are.
          batch_size: windows per step over all processes.
          seed: any integer.
          weights: a row per stage with the share of each source; none to take all windows once per epoch.
          stage_starts: step at which each stage begins.

        Raises:
          SpiralError: weights that cannot be kept exactly.
        """
        self.windows_per_source = tuple(windows_per_source)
        self.batch_size = batch_size
        self._mixture = Mixture(weights, [step * batch_size for step in stage_starts]) if weights else None
        # Of each source with weights; of all of them one after the other without.
        lengths = self.windows_per_source if weights else (sum(self.windows_per_source),)
        self._shuffled = [
            grain.MapDataset.range(length).shuffle(seed=_shuffle_seed(seed, stream)).repeat()
            for stream, length in enumerate(lengths)
        ]
        self._first_window = np.cumsum([0, *self.windows_per_source])

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, position: int) -> tuple[int, int]:
        """Returns (source, index of the window in it)."""
        if self._mixture is not None:
            source, earlier = self._mixture[position]
            return source, int(self._shuffled[source][earlier])
        window = int(self._shuffled[0][position])
        source = int(np.searchsorted(self._first_window, window, "right")) - 1
        return source, window - int(self._first_window[source])

    def epoch(self, step: int) -> float:
        """Returns the windows taken before a step as a share of all windows: 1.5 is the middle of the second epoch."""
        return step * self.batch_size / sum(self.windows_per_source)

    def epochs_of_sources(self, step: int) -> list[float] | None:
        """Returns the same for each source, where weights make them differ; None without weights."""
        if self._mixture is None:
            return None
        return (self._mixture.counts(step * self.batch_size) / np.array(self.windows_per_source)).tolist()


class TrainBatches(Iterator[Any], contextlib.AbstractContextManager["TrainBatches"]):
    """An endless iterator over batches, read ahead by threads. Close it, or use it in a `with` statement.

    Attributes:
      step: step of the batch that comes next: all there is to save.
    """

    def __init__(self, batches: grain.DatasetIterator, step: int):
        self._batches = batches
        self.step = step
        self._batches.start_prefetch()

    def __next__(self) -> Any:
        try:
            batch = next(self._batches)
        except BaseException:
            # After a failed read grain would go on with the next batch, and the step would no longer say where we are.
            self.close()
            raise
        self.step += 1
        return batch

    def close(self) -> None:
        """Ends the reading threads and drops what was read ahead. May be called more than once."""
        self._batches.close()

    def __exit__(self, *exception) -> None:
        self.close()


def train_batches(
    read: Callable[[np.ndarray, np.ndarray], Any],
    order: WindowOrder,
    *,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    read_threads: int = 2,
    prefetch_batches: int = 4,
) -> TrainBatches:
    """Makes the stream of this process's training batches.

    Batches run on across the end of an epoch. The batch of a step, over all processes together, is the same set of
    windows for any `process_count`. A thread reads whole batches, all windows of one at once.

    Args:
      read: (source_R, window_R) to a batch of these R = B / P windows, as `WindowReader`; called by threads.
      order: which window of which source comes when; B windows per step over all processes.
      start_step: step of the first batch. Earlier batches are not read.
      process_index: which slice of the global batch to return.
      process_count: number of slices, P.
      read_threads: threads that read.
      prefetch_batches: batches read ahead.

    Returns:
      An endless iterator of what `read` makes.

    Raises:
      SpiralError: the batch does not divide among the processes.
    """
    batch_size = order.batch_size
    divides = batch_size >= 1 and batch_size % process_count == 0
    require(divides, "train.batch_size", batch_size, f"positive multiples of the {process_count} processes")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} of {process_count}")
    if start_step < 0:
        raise ValueError(f"start_step {start_step}")
    # A thread reads whole batches: more threads than batches read ahead would have nothing to do.
    read_options = grain.ReadOptions(
        num_threads=min(read_threads, prefetch_batches), prefetch_buffer_size=prefetch_batches
    )
    batches = (
        grain.MapDataset.source(order)
        .slice(slice(process_index, None, process_count))
        .batch(batch_size // process_count, drop_remainder=True)
        .slice(slice(start_step, None))
        .map(lambda places: read(*places))
        .to_iter_dataset(read_options)
    )
    return TrainBatches(iter(batches), start_step)


class WindowReader:
    """Windows of token sources as batches."""

    def __init__(self, sources: Sequence[TokenSource], *, sequence_length: int, vocab_size: int):
        """Keeps what every batch needs.

        Args:
          sources: the tokens.
          sequence_length: predictions per window, L.
          vocab_size: ids the model has an embedding for; any other one stops the stream.
        """
        self._sources, self._sequence_length, self._vocab_size = sources, sequence_length, vocab_size

    def __call__(self, source_B: np.ndarray, window_B: np.ndarray) -> np.ndarray:
        """Returns int32 [B, L + 1].

        Raises:
          SpiralError: an id outside the vocabulary.
        """
        tokens_BxW = np.empty((len(source_B), self._sequence_length + 1), np.int32)
        for index in np.unique(source_B):
            rows_R = np.flatnonzero(source_B == index)
            tokens_BxW[rows_R] = read_windows(self._sources[index], window_B[rows_R], self._sequence_length)
        # A negative id counts as a large one.
        if np.max(tokens_BxW.view(np.uint32)) >= self._vocab_size:
            row, column = np.argwhere(tokens_BxW.view(np.uint32) >= self._vocab_size)[0]
            source = self._sources[source_B[row]]
            place = source.locate(window_start(source, window_B[row], self._sequence_length) + int(column))
            found = f"{place} is id {tokens_BxW[row, column]}"
            raise SpiralError(f"{found}; allowed: 0 to {self._vocab_size - 1} (model.vocab_size - 1)")
        return tokens_BxW


def _shuffle_seed(seed: int, stream: int) -> int:
    # grain shuffles epoch e of seed s with s + e: unhashed, seed 1 would begin with the second epoch of seed 0.
    name = str(seed) if stream == 0 else f"{seed}/{stream}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
