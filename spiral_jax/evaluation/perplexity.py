"""Exact loss of a model on a token stream: every token predicted once, after a separator."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spiral_jax.data.windows import TokenSource
from spiral_jax.errors import SpiralError, require
from spiral_jax.evaluation.rows import jit_on_rows
from spiral_jax.parallel.placed_model import PlacedModel
from spiral_jax.progress import Progress, Report
from spiral_jax.training.config import StepConfig
from spiral_jax.training.loss import window_nats


@dataclasses.dataclass(frozen=True)
class Score:
    """What a stream of tokens cost.

    Attributes:
      nats: sum of -log p over the tokens.
      tokens: how many were predicted.
      utf8_bytes: length of the text they stand for.
    """

    nats: float
    tokens: int
    utf8_bytes: float

    @property
    def loss(self) -> float:
        """Mean nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 709 else self.loss * math.inf  # NaN stays NaN

    @property
    def bits_per_byte(self) -> float:
        """nats / (ln 2 x UTF-8 bytes): comparable between tokenizers, and to a compressor."""
        return self.nats / (math.log(2) * self.utf8_bytes)


def num_scoring_windows(num_tokens: int, sequence_length: int, stride: int) -> int:
    """Windows that predict every token once: the first all its positions, the others their last `stride`."""
    return 1 + max(0, -(-(num_tokens - sequence_length) // stride))


def scoring_batches(
    source: TokenSource, separator_id: int, sequence_length: int, stride: int, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cuts `separator, token 0, token 1, ...` into windows.

    Yields:
      windows_BxW int32 of L + 1 tokens and weights_BxL float32: 1 where the prediction counts, 0 where the token was
      predicted by an earlier window or is padding. The last batch is filled with rows of weight 0.
    """
    L, N = sequence_length, source.num_tokens
    count = num_scoring_windows(N, L, stride)
    for first in range(0, count, batch_size):
        windows_BxW = np.full((batch_size, L + 1), separator_id, np.int32)
        weights_BxL = np.zeros((batch_size, L), np.float32)
        windows = [(k * stride, min(k * stride + L + 1, N + 1)) for k in range(first, min(first + batch_size, count))]
        # Position p of the stream is token p - 1; position 0 is the separator. A remote source reads all at once.
        found = source.read_many([(max(start - 1, 0), stop - 1) for start, stop in windows])
        for row, ((start, stop), read) in enumerate(zip(windows, found, strict=True)):
            windows_BxW[row, (1 if start == 0 else 0) : stop - start] = read
            weights_BxL[row, (0 if start == 0 else L - stride) : stop - start - 1] = 1
        yield windows_BxW, weights_BxL


class WindowScorer:
    """Weighted nats of the positions of windows, parameters gathered as in training: what fits there fits here."""

    def __init__(self, config: StepConfig, placed: PlacedModel, *, ahead: bool = False):
        """Builds the step.

        Args:
          config: the run's; a batch is one of its micro-batches.
          placed: its model on its mesh.
          ahead: whether to compile now rather than at the first batch.
        """
        train = config.train
        self.batch_size, self._sequence_length = train.micro_batch_size, train.sequence_length
        self._placed = placed

        def nats(model, params, windows_BxW: jax.Array, weights_BxL: jax.Array) -> jax.Array:
            return window_nats(model, params, windows_BxW, train.loss_block) * weights_BxL

        self.step = jit_on_rows(config, placed, nats)
        if ahead:
            self.step = self.lowered().compile()

    def lowered(self) -> jax.stages.Lowered:
        """The step for the shapes that it is called with."""
        B, L, batch = self.batch_size, self._sequence_length, self._placed.batch
        windows_BxW = jax.ShapeDtypeStruct((B, L + 1), jnp.int32, sharding=batch)
        weights_BxL = jax.ShapeDtypeStruct((B, L), jnp.float32, sharding=batch)
        return self.step.lower(self._placed.abstract_params, windows_BxW, weights_BxL)

    def __call__(self, params: Any, windows_BxW: np.ndarray, weights_BxL: np.ndarray) -> jax.Array:
        """nats_BxL, -log p of each position's target times its weight."""
        return self.step(params, self._placed.put(windows_BxW), self._placed.put(weights_BxL))


def score(
    nats_of: Callable[[Any, np.ndarray, np.ndarray], jax.Array],
    params: Any,
    source: TokenSource,
    *,
    utf8_bytes: int,
    separator_id: int,
    sequence_length: int,
    batch_size: int,
    stride: int | None = None,
    max_batches: int = 0,
    report: Report = lambda line: None,
    check: Callable[[], None] = lambda: None,
    take: Callable[[np.ndarray], None] = lambda nats_N: None,
) -> Score:
    """Scores a token stream.

    Args:
      nats_of: (params, windows_BxW, weights_BxL) to weighted nats_BxL, as a `WindowScorer`.
      params: the model's.
      source: the tokens.
      utf8_bytes: length of the text behind all of `source`.
      separator_id: what the first token is predicted from.
      sequence_length: L, positions per window.
      batch_size: windows per call of `nats_of`.
      stride: how far windows advance; None for L, so that windows do not overlap. A smaller one gives every
        prediction at least L - stride tokens of context.
      max_batches: stop after so many batches; 0 for the whole stream. Bytes are then counted by the stream's mean
        bytes per token.
      report: takes a line about the progress every few seconds.
      check: called before every batch; raises to leave the rest.
      take: called with the nats of the next tokens of the stream, float64 [N], batch by batch.

    Raises:
      SpiralError: an empty stream, or a stride outside 1..L.
    """
    stride = sequence_length if stride is None else stride
    require(1 <= stride <= sequence_length, "--stride", stride, f"1 to the sequence length, {sequence_length}")
    if source.num_tokens == 0:
        raise SpiralError(f"{source.name}: no tokens to score")
    total = -(-num_scoring_windows(source.num_tokens, sequence_length, stride) // batch_size)
    total = min(total, max_batches) if max_batches else total
    nats, tokens = 0.0, 0
    pending: tuple[jax.Array, np.ndarray] | None = None

    def read() -> float:
        if pending is None:
            return 0.0
        result_BxL, weights_BxL = pending
        nats_N = np.asarray(result_BxL).astype(np.float64)[weights_BxL > 0]
        take(nats_N)
        return float(nats_N.sum())

    progress = Progress("scoring", total, unit="batches", report=report, seconds=5)
    batches = scoring_batches(source, separator_id, sequence_length, stride, batch_size)
    for done, (windows_BxW, weights_BxL) in enumerate(batches):
        if done == total:
            break
        check()
        result_BxL = nats_of(params, windows_BxW, weights_BxL)
        tokens += int(weights_BxL.sum())
        # Read the previous batch only now that the next one is on its way.
        nats += read()
        pending = (result_BxL, weights_BxL)
        progress.advance(1)
    nats += read()
    return Score(nats, tokens, utf8_bytes * (tokens / source.num_tokens))


def nats_of_documents(nats_N: np.ndarray, document_offsets_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cuts a store's nats, as `score` gives them to `take`, at its documents.

    Args:
      nats_N: of every token of the store.
      document_offsets_M: where each document starts, and the end of the last one, as `TokenStore` has them.

    Returns:
      Total nats of each document, float64 [M - 1], and its tokens, its separator included, int64 [M - 1].
    """
    offsets_M = document_offsets_M.astype(np.int64)
    return np.add.reduceat(nats_N, offsets_M[:-1]), np.diff(offsets_M)
