"""The steps of an iteration beside its core (docs/spec.md sections 2 and 3), by the operators that the model names.

Pure functions of arrays and of the model's configuration, for the pass over all positions and for one token at a time.
`arrays` are those of the Linears that the iteration's operators declare.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from spiral_jax.errors import require
from spiral_jax.model.chunks import Level, to_chunks, to_tokens
from spiral_jax.model.config import ModelConfig
from spiral_jax.model.operators import Arrays, bind
from spiral_jax.model.topology import States, Update

Weights = Mapping[str, jax.Array]


def enter(
    config: ModelConfig, arrays: Arrays, h_emb_BxLxD: jax.Array, h_BxLxD: jax.Array
) -> tuple[States, Mapping[str, jax.Array]]:
    """From the embeddings and the prelude's output to h(0), and what the topology records."""
    topology = config.operators.topology
    states = States(h_BxLxD, h_BxLxD, h_emb_BxLxD)
    states, metrics = _updated(states, topology.enter(states, bind(topology.entry_linears(), arrays)))
    return states._replace(h0_BxLxD=states.h_BxLxD), metrics


def core_input(config: ModelConfig, level: Level, arrays: Arrays, states: States) -> jax.Array:
    """What iteration t starts from at token level, h_BxLxD: h(t) unless the topology says otherwise."""
    topology = config.operators.topology
    h_BxLxD = topology.core_input(states, bind(topology.linears(level), arrays))
    return h_BxLxD.astype(states.h_BxLxD.dtype)


def down_scale(config: ModelConfig, level: Level, arrays: Arrays, h_BxLxD: jax.Array) -> jax.Array:
    """z_BxNxD, one vector per complete chunk; there must be one."""
    pooling = config.operators.pooling
    h_BxNxGxD, is_token_NxG = to_chunks(h_BxLxD, level)
    z_BxNxD = pooling.pool(h_BxNxGxD, is_token_NxG, level, bind(pooling.linears(level), arrays))
    return z_BxNxD.astype(h_BxLxD.dtype)


def up_scale(config: ModelConfig, level: Level, arrays: Arrays, zhat_BxNxD: jax.Array, length: int) -> jax.Array:
    """e_BxLxD, the update e(t) of `length` tokens: each chunk's vector spread over its places, then shifted right."""
    return to_tokens(spread(config, level, arrays, zhat_BxNxD), level, length)


def spread(config: ModelConfig, level: Level, arrays: Arrays, zhat_BxNxD: jax.Array) -> jax.Array:
    """u_BxNxGxD, each chunk's vector spread over its places."""
    spreading = config.operators.spreading
    u_BxNxGxD = spreading.spread(zhat_BxNxD, level, bind(spreading.linears(level), arrays))
    return u_BxNxGxD.astype(zhat_BxNxD.dtype)


def advance(
    config: ModelConfig, level: Level, arrays: Arrays, states: States, e_BxLxD: jax.Array
) -> tuple[States, Mapping[str, jax.Array]]:
    """From h(t) and e(t) to h(t+1), and what the topology records."""
    topology = config.operators.topology
    return _updated(states, topology.update(states, e_BxLxD, bind(topology.linears(level), arrays)))


# The weights that operators mix with, by name, for probes; nothing where an operator shows none.


def entry_routes(config: ModelConfig, arrays: Arrays, h_emb_BxLxD: jax.Array, h_BxLxD: jax.Array) -> Weights:
    """Those of `enter`, [B, L, W]."""
    topology, states = config.operators.topology, States(h_BxLxD, h_BxLxD, h_emb_BxLxD)
    is_shown = topology.shows("entry_routes", "enter", "update", "next_state")
    return dict(topology.entry_routes(states, bind(topology.entry_linears(), arrays))) if is_shown else {}


def routes(config: ModelConfig, level: Level, arrays: Arrays, states: States) -> Weights:
    """Those of `advance`, [B, L, W]; the states are those before the iteration."""
    topology = config.operators.topology
    is_shown = topology.shows("routes", "update", "next_state")
    return dict(topology.routes(states, bind(topology.linears(level), arrays))) if is_shown else {}


def pooling_weights(config: ModelConfig, level: Level, arrays: Arrays, h_BxLxD: jax.Array) -> Weights:
    """Those of `down_scale`, [B, N, G], of the chunks that have a token at every place."""
    pooling = config.operators.pooling
    h_BxNxGxD, is_token_NxG = to_chunks(h_BxLxD, level)
    is_full_N = is_token_NxG.all(axis=1)
    if not is_full_N.any() or not pooling.shows("weights", "pool"):
        return {}
    h_BxNxGxD, is_token_NxG = h_BxNxGxD[:, is_full_N], is_token_NxG[is_full_N]
    weights = pooling.weights(h_BxNxGxD, is_token_NxG, level, bind(pooling.linears(level), arrays))
    return {"pooling": jnp.broadcast_to(weights, h_BxNxGxD.shape[:-1])}


def shares(config: ModelConfig, level: Level, arrays: Arrays, zhat_BxNxD: jax.Array) -> Weights:
    """Those of `up_scale`, [B, N, G]."""
    spreading = config.operators.spreading
    if not spreading.shows("shares", "spread"):
        return {}
    share = spreading.shares(zhat_BxNxD, level, bind(spreading.linears(level), arrays))
    return {"allocation": jnp.broadcast_to(share, (*zhat_BxNxD.shape[:2], level.chunk))}


def _updated(states: States, update: Update) -> tuple[States, Mapping[str, jax.Array]]:
    require(isinstance(update, Update), "what a topology makes of an iteration", _kind(update), "an Update")
    require(isinstance(update.kept, tuple), "Update.kept", _kind(update.kept), "a tuple, as in (x,)")
    h_BxLxD = update.h_BxLxD.astype(states.h_BxLxD.dtype)
    return states._replace(h_BxLxD=h_BxLxD, kept=(*states.kept, *update.kept)), update.metrics


def _kind(x: Any) -> str:
    return "array" if isinstance(x, jax.Array) else type(x).__name__


# One token at a time.


def add_member(
    config: ModelConfig,
    level: Level,
    arrays: Arrays,
    chunk: Any,
    place_B: jax.Array,
    is_first_B: jax.Array,
    h_BxD: jax.Array,
) -> Any:
    """The open chunk of each row with one more member.

    Args:
      config: the model's configuration.
      level: the iteration's resolution.
      arrays: the iteration's.
      chunk: the members so far, as the pooling keeps them.
      place_B: the place of the new member.
      is_first_B: whether the new member opens a chunk, so that `chunk` is of the one before and is forgotten.
      h_BxD: the state of the new member.
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
