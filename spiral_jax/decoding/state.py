"""What decoding remembers between tokens (docs/spec.md section 4): of static shape, every row at its own place."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from spiral_jax.errors import require
from spiral_jax.model.chunks import Level
from spiral_jax.model.config import ModelConfig
from spiral_jax.parallel.mesh import batch_sharding, partition_spec, replicated


class KeyValues(NamedTuple):
    """Keys (rotated) and values of some layers. N is C tokens, or the chunks of an iteration in C tokens.

    An entry is written when its row comes to it, before it is read: what stands behind a row's place means nothing.

    Attributes:
      keys: [layers, B, N, H, K] in the compute dtype.
      values: the same.
    """

    keys: jax.Array
    values: jax.Array


class IterationState(NamedTuple):
    """One iteration of the core.

    Attributes:
      cache: the core's keys and values at this iteration's resolution.
      open: the unfinished chunk, as the pooling keeps it: a pytree of arrays that begin with the axis B; None at full
        resolution.
      zhat_BxRxD: what the core made of the last R = ceil((shift + 1) / chunk) chunks, chunk j in slot j % R: a token
        never reads further back. None at full resolution.
    """

    cache: KeyValues
    open: Any
    zhat_BxRxD: Any


class Work(NamedTuple):
    """What `step` has run, counted where it runs. (What a prefill runs is known beforehand.)

    Attributes:
      core_calls: [] passes through a core's weights, for however many rows at once.
      runs_T: [T] rows for which iteration t ran its core.
    """

    core_calls: jax.Array
    runs_T: jax.Array


class DecodeState(NamedTuple):
    """A pytree; MeSH's slots live within one token's pass and are not in it.

    Attributes:
      position_B: tokens that each row has consumed.
      prelude: keys and values of every token.
      iterations: one each.
      coda: keys and values of every token.
      work: of all steps since the state was empty.
    """

    position_B: jax.Array
    prelude: KeyValues
    iterations: tuple[IterationState, ...]
    coda: KeyValues
    work: Work

    @property
    def capacity(self) -> int:
        """C, tokens that a row has room for."""
        return self.coda.keys.shape[2]


def bucket_of(length: int, longest: int | None = None, *, shortest: int = 32, factor: int = 2) -> int:
    """What a length is padded to: few sizes, as every one is a program to compile.

    The smallest of `shortest`, `factor` times that, and so on that is at least `length`; at most `longest`.
    """
    bucket = shortest
    while bucket < length:
        bucket *= factor
    return bucket if longest is None else min(bucket, longest)


def num_slots(level: Level) -> int:
    """R, the chunks back from the last complete one that a token may still read."""
    return math.ceil((level.shift + 1) / level.chunk)


def empty_state(config: ModelConfig, batch: int, capacity: int) -> DecodeState:
    """The state before the first token.

    Args:
      config: the model.
      batch: B, rows.
      capacity: C, prompt and continuation of the longest row. Nothing can be refused inside a compiled program: the
        caller must not go on beyond it.

    Raises:
      SpiralError: no rows or no tokens.
    """
    require(batch >= 1, "rows of a decoding state", batch, "1 or more")
    require(capacity >= 1, "tokens of a decoding state", capacity, "1 or more")

    def cache(layers: int, entries: int) -> KeyValues:
        shape = (layers, batch, entries, config.num_heads, config.head_width)
        return KeyValues(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))

    def iteration(level: Level) -> IterationState:
        entries = cache(config.core_layers, level.num_chunks(capacity))
        if level.chunk == 1:
            return IterationState(entries, None, None)
        chunk = config.operators.pooling.open(level, batch)
        return IterationState(entries, chunk, jnp.zeros((batch, num_slots(level), config.d_model), config.dtype))

    return DecodeState(
        jnp.zeros(batch, jnp.int32),
        cache(config.prelude_layers, capacity),
        tuple(iteration(level) for level in config.schedule),
        cache(config.coda_layers, capacity),
        Work(jnp.int32(0), jnp.zeros(config.num_iterations, jnp.int32)),
    )


def state_shardings(state: DecodeState, mesh: Mesh) -> DecodeState:
    """Where each array lies: rows over the axes that share the batch, heads over `tensor`, as in training."""
    entries = NamedSharding(mesh, partition_spec(("layers", "batch", "length", "heads", "head_width")))
    by_row, everywhere = batch_sharding(mesh), replicated(mesh)
    return _map_by_kind(lambda _: entries, lambda _: by_row, lambda _: everywhere, state)


def put_rows(state: DecodeState, new: DecodeState, rows_W: jax.Array) -> DecodeState:
    """`state` with its rows `rows_W` replaced by those of `new`, which may have room for fewer tokens.

    A row number behind the end writes nothing. The work counted stays that of `state`.
    """

    def put_cache(old, new):
        # What stands behind the new entries is of the row's last use, and is written before it is read.
        return old.at[:, rows_W, : new.shape[2]].set(new, mode="drop")

    def put_row(old, new):
        return old.at[rows_W].set(new, mode="drop")

    return _map_by_kind(put_cache, put_row, lambda old, _: old, state, new)


def repeat_rows(state: DecodeState, times: int) -> DecodeState:
    """Every row `times` times, one beside the other."""
    repeat = functools.partial(jnp.repeat, repeats=times)
    return _map_by_kind(functools.partial(repeat, axis=1), functools.partial(repeat, axis=0), lambda x: x, state)


def _map_by_kind(of_cache: Callable, of_rows: Callable, of_work: Callable, *states: DecodeState) -> Any:
    """States of equal structure to one: what is done to arrays of caches, to those that begin with rows, to counts."""

    def map_part(part, *others):
        of_each = of_cache if isinstance(part, KeyValues) else of_work if isinstance(part, Work) else of_rows
        return jax.tree.map(of_each, part, *others)

    return jax.tree.map(map_part, *states, is_leaf=lambda part: isinstance(part, KeyValues | Work))


def put(cache: KeyValues, new: KeyValues, index_B: jax.Array) -> KeyValues:
    """One entry per row, `new` of [layers, B, 1, H, K], at `index_B`; an index behind the end writes nothing."""
    rows_B = jnp.arange(index_B.shape[0])
    return jax.tree.map(lambda old, x: old.at[:, rows_B, index_B].set(x[:, :, 0], mode="drop"), cache, new)


def put_front(cache: KeyValues, new: KeyValues) -> KeyValues:
    """The first M entries of every row, `new` of [layers, B, M, H, K]."""
    return jax.tree.map(lambda old, x: old.at[:, :, : x.shape[2]].set(x), cache, new)


def slots_after(zhat_BxNxD: jax.Array, lengths_B: jax.Array, level: Level) -> jax.Array:
    """zhat_BxRxD of rows that have consumed `lengths_B` tokens: slot r holds the last chunk j with j % R = r."""
    last_Bx1 = level.num_chunks(lengths_B)[:, None] - 1
    R = num_slots(level)
    return take(zhat_BxNxD, last_Bx1 - (last_Bx1 - jnp.arange(R)) % R)


def take(x_BxNxD: jax.Array, index_BxM: jax.Array) -> jax.Array:
    """Row b's entries at `index_BxM[b]`, [B, M, D]; an index outside gives some entry of the row."""
    return jnp.take_along_axis(x_BxNxD, jnp.clip(index_BxM, 0, x_BxNxD.shape[1] - 1)[:, :, None], axis=1)
