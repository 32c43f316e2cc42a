"""Training windows: how a stream of tokens is cut into sequences."""

import dataclasses
from typing import Protocol

import numpy as np

from spiral_jax.errors import SpiralError


class TokenSource(Protocol):
    """All that the pipeline asks of data: a named stream of tokens with random access from many threads."""

    @property
    def name(self) -> str:
        """What to call the source in errors."""

    @property
    def num_tokens(self) -> int:
        """Length of the stream."""

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns tokens start to stop - 1, int32 [stop - start]."""


@dataclasses.dataclass(frozen=True)
class TokensInMemory:
    """A `TokenSource` of an array."""

    name: str
    tokens_N: np.ndarray

    @property
    def num_tokens(self) -> int:
        return len(self.tokens_N)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.tokens_N[start:stop]


def num_windows(source: TokenSource, sequence_length: int) -> int:
    """Counts the windows of a source.

    Windows have `sequence_length + 1` tokens and start every `sequence_length` tokens. Neighbours thus share one
    token, and each token but the very first is predicted in exactly one window (a rest too short for a window
    is left out).

    Args:
      source: The tokens.
      sequence_length: Predictions per window.

    Returns:
      Number of windows, at least 1.

    Raises:
      SpiralError: Not even one window fits.
    """
    if sequence_length < 1:
        raise SpiralError(f"train.sequence_length: found {sequence_length}, allowed: at least 1")
    windows = (source.num_tokens - 1) // sequence_length
    if windows < 1:
        raise SpiralError(
            f"train.sequence_length: {sequence_length} needs {sequence_length + 1} tokens for a window, "
            f"but {source.name} has {source.num_tokens}; allowed: at most {max(source.num_tokens - 1, 0)}, or more text"
        )
    return windows


def window(source: TokenSource, index: int, sequence_length: int) -> np.ndarray:
    """Reads one window.

    Args:
      source: The tokens.
      index: 0 to `num_windows(source, sequence_length) - 1`.
      sequence_length: Predictions per window.

    Returns:
      Tokens, int32 [sequence_length + 1]: inputs are all but the last, targets all but the first.
    """
    start = index * sequence_length
    return source.read(start, start + sequence_length + 1)
