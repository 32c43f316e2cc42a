"""Geometry of a level (docs/spec.md section 3): which tokens are a chunk, and when a token reads what came of it.

A level's geometry is static, so that everything here is padding, reshaping and slicing: with `offset` zeros in front of
the sequence, chunk j is the j-th row of a [.., N, G, ..] reshape.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Level(NamedTuple):
    """The resolution of one loop iteration: r = 1 / chunk.

    Attributes:
      chunk: g, tokens per chunk.
      offset: w, where chunk(i) = (i + w) // g and place(i) = (i + w) % g.
      shift: s; token i reads what was computed for token i - s.
    """

    chunk: int
    offset: int
    shift: int

    def num_chunks(self, length):
        """Complete chunks in `length` tokens; the trailing incomplete one is dropped."""
        return (length + self.offset) // self.chunk

    def chunk_of(self, token):
        """chunk(i), the chunk that token i is in."""
        return (token + self.offset) // self.chunk

    def place_of(self, token):
        """place(i), the place of token i in its chunk: 0..g-1."""
        return (token + self.offset) % self.chunk

    def closes(self, token):
        """Whether token i is the last of its chunk."""
        return self.place_of(token) == self.chunk - 1


def to_chunks(h_BxLxD: jax.Array, level: Level) -> tuple[jax.Array, np.ndarray]:
    """The tokens of the complete chunks.

    Args:
      h_BxLxD: token states.
      level: the geometry; `level.num_chunks(L)` must be positive.

    Returns:
      h_BxNxGxD, and is_token_NxG, which is False for the places that an offset leaves empty at the start of the first
      chunk. They hold zeros.
    """
    B, L, D = h_BxLxD.shape
    G, N = level.chunk, level.num_chunks(L)
    complete_BxMxD = h_BxLxD[:, : N * G - level.offset]
    h_BxNxGxD = jnp.pad(complete_BxMxD, ((0, 0), (level.offset, 0), (0, 0))).reshape(B, N, G, D)
    return h_BxNxGxD, (np.arange(N * G) >= level.offset).reshape(N, G)


def to_tokens(u_BxNxGxD: jax.Array, level: Level, length: int) -> jax.Array:
    """Places of chunks back to tokens, shifted right: e(t)_i = u_(i - s), and zero where there is none.

    Args:
      u_BxNxGxD: what each place of each complete chunk has.
      level: the geometry.
      length: L, tokens of the sequence.

    Returns:
      e_BxLxD.
    """
    B, N, G, D = u_BxNxGxD.shape
    # Token i - s is entry i - s + w of the flattened chunks.
    u_BxMxD = u_BxNxGxD.reshape(B, N * G, D)[:, level.offset : level.offset + max(length - level.shift, 0)]
    front = min(level.shift, length)
    return jnp.pad(u_BxMxD, ((0, 0), (front, length - front - u_BxMxD.shape[1]), (0, 0)))
