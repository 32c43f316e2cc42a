"""What decoding remembers between tokens (docs/spec.md section 4): of static shape, every row at its own place."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from spiral_jax.errors import SpiralError
from spiral_jax.model.chunks import Level
from spiral_jax.model.config import ModelConfig
from spiral_jax.parallel.mesh import partition_spec, replicated


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
    zhat_BxRxD: jax.Array | None


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
    """
    if batch < 1 or capacity < 1:
        raise SpiralError(f"a decoding state of {batch} rows and {capacity} tokens; both must be at least 1")

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

    def place(*axes: str) -> NamedSharding:
        return NamedSharding(mesh, partition_spec(axes))

    entries = place("layers", "batch", "length", "heads", "head_width")
    cache = KeyValues(entries, entries)

    def iteration(old: IterationState) -> IterationState:
        rest = jax.tree.map(lambda _: place("batch"), old[1:])
        return IterationState(cache, *rest)

    iterations = tuple(iteration(old) for old in state.iterations)
    return DecodeState(place("batch"), cache, iterations, cache, Work(replicated(mesh), replicated(mesh)))


def put_rows(state: DecodeState, new: DecodeState, rows_W: jax.Array) -> DecodeState:
    """`state` with its rows `rows_W` replaced by those of `new`, which may have room for fewer tokens.

    A row number behind the end writes nothing. The work counted stays that of `state`.
    """

    def cache(old: KeyValues, new: KeyValues) -> KeyValues:
        def put(old, new):
            # What stands behind the new entries is of the row's last use, and is written before it is read.
            return old.at[:, rows_W, : new.shape[2]].set(new, mode="drop")

        return KeyValues(*map(put, old, new))

    def iteration(old: IterationState, new: IterationState) -> IterationState:
        rest = jax.tree.map(lambda x, y: x.at[rows_W].set(y, mode="drop"), old[1:], new[1:])
        return IterationState(cache(old.cache, new.cache), *rest)

    return DecodeState(
        state.position_B.at[rows_W].set(new.position_B, mode="drop"),
        cache(state.prelude, new.prelude),
        tuple(map(iteration, state.iterations, new.iterations)),
        cache(state.coda, new.coda),
        state.work,
    )


def repeat_rows(state: DecodeState, times: int) -> DecodeState:
    """Every row `times` times, one beside the other."""

    def repeat(axis: int, tree):
        return jax.tree.map(lambda x: jnp.repeat(x, times, axis=axis), tree)

    return DecodeState(
        repeat(0, state.position_B),
        repeat(1, state.prelude),
        tuple(IterationState(repeat(1, old.cache), *repeat(0, old[1:])) for old in state.iterations),
        repeat(1, state.coda),
        state.work,
    )


def put(cache: KeyValues, new: KeyValues, index_B: jax.Array) -> KeyValues:
    """One entry per row, `new` of [layers, B, 1, H, K], at `index_B`; an index behind the end writes nothing."""
    rows_B = jnp.arange(index_B.shape[0])
    return KeyValues(
        *(old.at[:, rows_B, index_B].set(x[:, :, 0], mode="drop") for old, x in zip(cache, new, strict=True))
    )


def put_front(cache: KeyValues, new: KeyValues) -> KeyValues:
    """The first M entries of every row, `new` of [layers, B, M, H, K]."""
    return KeyValues(*(old.at[:, :, : x.shape[2]].set(x) for old, x in zip(cache, new, strict=True)))


def slots_after(zhat_BxNxD: jax.Array, lengths_B: jax.Array, level: Level) -> jax.Array:
    """zhat_BxRxD of rows that have consumed `lengths_B` tokens: slot r holds the last chunk j with j % R = r."""
    last_Bx1 = level.num_chunks(lengths_B)[:, None] - 1
    R = num_slots(level)
    return take(zhat_BxNxD, last_Bx1 - (last_Bx1 - jnp.arange(R)) % R)


def take(x_BxNxD: jax.Array, index_BxM: jax.Array) -> jax.Array:
    """Row b's entries at `index_BxM[b]`, [B, M, D]; an index outside gives some entry of the row."""
    return jnp.take_along_axis(x_BxNxD, jnp.clip(index_BxM, 0, x_BxNxD.shape[1] - 1)[:, :, None], axis=1)
