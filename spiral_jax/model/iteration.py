"""What an iteration does besides running its core, and what its operators declare (docs/spec.md sections 2 and 3).

Pure functions of arrays and of the model's configuration, for the pass over all positions and for one token at a time.
An iteration's arrays are `{name: {"kernel", "bias"}}` for the Linears that its operators declare.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from spiral_jax.errors import require
from spiral_jax.model.chunks import Level, to_chunks, to_tokens
from spiral_jax.model.config import ModelConfig
from spiral_jax.model.operators import bind
from spiral_jax.model.topology import States, Update

Arrays = Mapping[str, Mapping[str, jax.Array]]


def enter(
    config: ModelConfig, arrays: Arrays, h_emb_BxLxD: jax.Array, h_BxLxD: jax.Array
) -> tuple[States, Mapping[str, jax.Array]]:
    """From the embeddings and the prelude's output to h(0), and what the topology records."""
    topology = config.operators.topology
    states = States(h_BxLxD, h_BxLxD, h_emb_BxLxD)
    states, metrics = _updated(states, topology.enter(states, bind(topology.entry_linears(), arrays)))
    return states._replace(h0_BxLxD=states.h_BxLxD), metrics


def core_input(config: ModelConfig, level: Level, arrays: Arrays, states: States) -> jax.Array:
    """What the iteration starts from, at token level."""
    topology = config.operators.topology
    h_BxLxD = topology.core_input(states, bind(topology.linears(level), arrays))
    return h_BxLxD.astype(states.h_BxLxD.dtype)


def down_scale(config: ModelConfig, level: Level, arrays: Arrays, h_BxLxD: jax.Array) -> jax.Array:
    """One vector per complete chunk, z_BxNxD; there must be one."""
    pooling = config.operators.pooling
    z_BxNxD = pooling.pool(*to_chunks(h_BxLxD, level), level, bind(pooling.linears(level), arrays))
    return z_BxNxD.astype(h_BxLxD.dtype)


def up_scale(config: ModelConfig, level: Level, arrays: Arrays, zhat_BxNxD: jax.Array, length: int) -> jax.Array:
    """The update e(t) of `length` tokens: each chunk's vector spread over its tokens, then shifted right."""
    u_BxNxGxD = spread(config, level, arrays, zhat_BxNxD)
    return to_tokens(u_BxNxGxD, level, length)


def spread(config: ModelConfig, level: Level, arrays: Arrays, zhat_BxNxD: jax.Array) -> jax.Array:
    """Each chunk's vector spread over its places, u_BxNxGxD."""
    spreading = config.operators.spreading
    u_BxNxGxD = spreading.spread(zhat_BxNxD, level, bind(spreading.linears(level), arrays))
    return u_BxNxGxD.astype(zhat_BxNxD.dtype)


def advance(
    config: ModelConfig, level: Level, arrays: Arrays, states: States, e_BxLxD: jax.Array
) -> tuple[States, Mapping[str, jax.Array]]:
    """From h(t) and e(t) to h(t+1), and what the topology records."""
    topology = config.operators.topology
    return _updated(states, topology.update(states, e_BxLxD, bind(topology.linears(level), arrays)))


def _updated(states: States, update: Update) -> tuple[States, Mapping[str, jax.Array]]:
    require(isinstance(update, Update), "what a topology makes of an iteration", _kind(update), "an Update")
    require(isinstance(update.kept, tuple), "Update.kept", _kind(update.kept), "a tuple, as in (x,)")
    h_BxLxD = update.h_BxLxD.astype(states.h_BxLxD.dtype)
    return states._replace(h_BxLxD=h_BxLxD, kept=(*states.kept, *update.kept)), update.metrics


def _kind(x: Any) -> str:
    return "array" if isinstance(x, jax.Array) else type(x).__name__


# One token at a time.


def add_member(
    config: ModelConfig, level: Level, arrays: Arrays, chunk: Any, place_B: jax.Array, is_first_B, h_BxD: jax.Array
) -> Any:
    """The open chunk of each row with one more member.

    Args:
      config: the model's.
      level: the iteration's.
      arrays: the iteration's.
      chunk: the members so far, as the pooling keeps them.
      place_B: the new member's place.
      is_first_B: whether it opens a chunk, and what `chunk` holds is of the one before.
      h_BxD: its state.
    """
    pooling = config.operators.pooling
    chunk = where_rows(is_first_B, pooling.open(level, h_BxD.shape[0]), chunk)
    return pooling.add(chunk, place_B, h_BxD, level, bind(pooling.linears(level), arrays))


def close_chunk(config: ModelConfig, level: Level, arrays: Arrays, chunk: Any, chunk_B: jax.Array, dtype) -> jax.Array:
    """z_BxD of each row's open chunk, were it complete; `chunk_B` is its index, as the first may lack members."""
    pooling = config.operators.pooling
    is_token_BxG = (chunk_B[:, None] > 0) | (jnp.arange(level.chunk) >= level.offset)
    return pooling.close(chunk, is_token_BxG, level, bind(pooling.linears(level), arrays)).astype(dtype)


def where_rows(is_new_B: jax.Array, new: Any, old: Any) -> Any:
    """Row by row `new` or `old`, pytrees of arrays that begin with the axis B."""

    def choose(x, y):
        return jnp.where(is_new_B.reshape(-1, *[1] * (x.ndim - 1)), x, y)

    return jax.tree.map(choose, new, old)
