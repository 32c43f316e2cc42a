"""Geometry of a level (docs/spec.md section 3): which tokens are a chunk, and when a token reads what came of it.

Pure functions of arrays. A level's geometry is static, so that everything here is padding, reshaping and slicing:
with `offset` zeros in front of the sequence, chunk j is the j-th row of a [.., N, G, ..] reshape.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Level(NamedTuple):
    """The resolution of one loop iteration: r = 1 / chunk."""

    chunk: int  # g: tokens per chunk
    offset: int  # w: chunk(i) = (i + w) // g
    shift: int  # s: token i reads what was computed for token i - s

    def num_chunks(self, length):
        """Complete chunks in `length` tokens; the trailing incomplete one is dropped."""
        return (length + self.offset) // self.chunk

    def chunk_of(self, token):
        """The chunk that a token is in."""
        return (token + self.offset) // self.chunk

    def place_of(self, token):
        """Its place there, 0..g-1."""
        return (token + self.offset) % self.chunk

    def closes(self, token):
        """Whether it is its chunk's last."""
        return self.place_of(token) == self.chunk - 1


def to_chunks(h_BxLxD: jax.Array, level: Level) -> tuple[jax.Array, np.ndarray]:
    """The complete chunks, h_BxNxGxD, and which of their places are tokens, is_token_NxG.

    An offset leaves the first chunk short of members: its first places are zeros and no tokens.

    Args:
      h_BxLxD: token states.
      level: geometry; `level.num_chunks(L)` must be positive.
    """
    B, L, D = h_BxLxD.shape
    G, N = level.chunk, level.num_chunks(L)
    complete_BxMxD = h_BxLxD[:, : N * G - level.offset]
    h_BxNxGxD = jnp.pad(complete_BxMxD, ((0, 0), (level.offset, 0), (0, 0))).reshape(B, N, G, D)
    return h_BxNxGxD, (np.arange(N * G) >= level.offset).reshape(N, G)


def to_tokens(u_BxNxGxD: jax.Array, level: Level, length: int) -> jax.Array:
    """Places of chunks back to tokens, shifted right: e_BxLxD, where e_i = u_(i - shift), and zero where there is none.

    Args:
      u_BxNxGxD: what each place of each complete chunk has.
      level: geometry; `level.shift` zeros come in front.
      length: L, tokens of the sequence.
    """
    B, N, G, D = u_BxNxGxD.shape
    # Token i reads padded position i - shift + offset.
    u_BxMxD = u_BxNxGxD.reshape(B, N * G, D)[:, level.offset : level.offset + max(length - level.shift, 0)]
    front = min(level.shift, length)
    return jnp.pad(u_BxMxD, ((0, 0), (front, length - front - u_BxMxD.shape[1]), (0, 0)))
