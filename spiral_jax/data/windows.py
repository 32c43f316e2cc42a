"""Training windows: how a stream of tokens is cut into sequences."""

import abc
from collections.abc import Iterable, Sequence

import numpy as np

from spiral_jax.errors import SpiralError, require


class TokenSource(abc.ABC):
    """All that training asks of data: a named stream of tokens with random access from many threads.

    Attributes:
      name: what to call the source in messages: its folder or URL.
      num_tokens: length of the stream.
      fingerprint: changes when the tokens do; what a checkpoint records.
      sequence_tokens: where the stream is nothing but sequences of one length that do not continue each other, that
        length; None otherwise.
    """

    name: str
    num_tokens: int
    fingerprint: str = ""
    sequence_tokens: int | None = None

    @abc.abstractmethod
    def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """Returns tokens start to stop - 1 of each (start, stop), int32 [stop - start], the caller's own.

        A remote source has all the ranges in flight at once.
        """

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns tokens start to stop - 1, int32 [stop - start]."""
        return self.read_many([(start, stop)])[0]

    def locate(self, position: int) -> str:
        """Says where a token is, for messages: file, document and offset, as far as the source knows."""
        return f"{self.name}: token {position}"


class TokensInMemory(TokenSource):
    """The tokens of an array."""

    def __init__(self, name: str, tokens_N: np.ndarray):
        self.name = name
        self.num_tokens = len(tokens_N)
        self.tokens_N = tokens_N

    def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        return [self.tokens_N[start:stop].astype(np.int32) for start, stop in ranges]


def num_windows(source: TokenSource, sequence_length: int) -> int:
    """Counts the windows of a source, 1 or more, for `sequence_length` predictions per window.

    Windows have `sequence_length + 1` tokens and start every `sequence_length` tokens. Neighbours thus share one
    token, and each token but the very first is predicted in exactly one window (a rest too short for a window
    is left out). Only where the source is made of sequences of just `sequence_length + 1` tokens (the preshuffled
    Pile has 2049), each of them is a window.

    Raises:
      SpiralError: not even one window fits.
    """
    require(sequence_length >= 1, "train.sequence_length", sequence_length, "1 or more")
    stride = _stride(source, sequence_length)
    windows = (source.num_tokens - (sequence_length + 1)) // stride + 1
    if windows < 1:
        raise SpiralError(
            f"train.sequence_length is {sequence_length}, which takes {sequence_length + 1} tokens for a window, "
            f"and {source.name} has {source.num_tokens}; allowed: up to {max(source.num_tokens - 1, 0)}, or more text"
        )
    return windows


def read_windows(source: TokenSource, indices_B: Iterable[int], sequence_length: int) -> np.ndarray:
    """Returns windows, read all at once, int32 [B, L + 1]: inputs are all but the last, targets all but the first.

    Args:
      source: the tokens.
      indices_B: each from 0 to `num_windows(source, sequence_length) - 1`.
      sequence_length: predictions per window, L.
    """
    starts = [window_start(source, index, sequence_length) for index in indices_B]
    return np.stack(source.read_many([(start, start + sequence_length + 1) for start in starts]))


def window_start(source: TokenSource, index: int, sequence_length: int) -> int:
    """Returns the position of a window's first token."""
    return int(index) * _stride(source, sequence_length)


def _stride(source: TokenSource, sequence_length: int) -> int:
    return sequence_length + (source.sequence_tokens == sequence_length + 1)
