"""The model's layers and iterations as functions of their parameters, for passes that keep something between calls.

One entry per row through layers with a cache, and neighbouring coarse iterations at one token.
"""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spiral_jax.decoding.state import IterationState, KeyValues, Work, num_slots, put, take
from spiral_jax.model.chunks import Level
from spiral_jax.model.config import ModelConfig
from spiral_jax.model.iteration import Arrays, add_member, advance, close_chunk, core_input, spread, where_rows
from spiral_jax.model.neox import Layer, rotary_tables
from spiral_jax.model.operators import at_least_float32
from spiral_jax.model.spiralformer import SpiralFormer
from spiral_jax.model.topology import States

# Parameters: stacked, or each layer's by themselves (`with_separate_layers`).
Layers = dict | list[dict]


class Iteration(NamedTuple):
    """What iteration t runs with.

    Attributes:
      level: its resolution.
      layers: parameters of its core; None with a core of 0 layers.
      arrays: of the Linears that its operators declare.
    """

    level: Level
    layers: Layers | None
    arrays: Arrays


def layers_of(params, part: str) -> Layers | None:
    """The layers of `prelude`, `core`, `cores_{t}` or `coda`; None where it has none."""
    return params[part]["layers"] if part in params else None


def with_separate_layers(params):
    """Parameters whose layers are lists of arrays of their own.

    On a CPU, a scan over stacked layers copies each layer's arrays before it reads them, and a step for a few rows does
    little but read them.
    """

    def separate(stacked):
        count = len(jax.tree.leaves(stacked)[0])
        return [jax.tree.map(operator.itemgetter(i), stacked) for i in range(count)]

    return {
        name: part | {"layers": separate(part["layers"])} if "layers" in part else part for name, part in params.items()
    }


def iterations(config: ModelConfig, params) -> list[Iteration]:
    """The loop's iterations in order."""
    cores = ["core" if config.shared_core else f"cores_{t}" for t in range(config.num_iterations)]
    return [
        Iteration(level, layers_of(params, core), params.get(f"steps_{t}", {}))
        for t, (level, core) in enumerate(zip(config.schedule, cores, strict=True))
    ]


def run_layers(
    model: SpiralFormer, layers: Layers | None, h_BxLxD: jax.Array, rotary, attention: Callable, caches=()
) -> tuple[jax.Array, Any]:
    """The model's own layers with an attention that may look beyond its arguments, and reports.

    Args:
      model: the model.
      layers: None for no layers.
      h_BxLxD: their input.
      rotary: cos and sin, each [L, F], or [B, L, F] where rows are at positions of their own.
      attention: (q, k, v, cache) to [B, L, H, K] and a tree of arrays to report, keys and queries rotated already.
      caches: a tree of [layers, ...] arrays, of which each layer's attention is given its own.

    Returns:
      h_BxLxD, and what was reported, a tree of [layers, ...] arrays.
    """
    config = model.config
    if layers is None:
        x_BxLxHxK = jax.ShapeDtypeStruct((*h_BxLxD.shape[:2], config.num_heads, config.head_width), h_BxLxD.dtype)
        cache = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), caches)
        _, report = jax.eval_shape(attention, x_BxLxHxK, x_BxLxHxK, x_BxLxHxK, cache)
        return h_BxLxD, jax.tree.map(lambda x: jnp.zeros((0, *x.shape), x.dtype), report)

    def body(h_BxLxD, layer):
        params, cache = layer
        reports = []

        def reporting(q_BxLxHxK, k_BxLxHxK, v_BxLxHxK):
            out_BxLxHxK, report = attention(q_BxLxHxK, k_BxLxHxK, v_BxLxHxK, cache)
            reports.append(report)
            return out_BxLxHxK

        h_BxLxD, _ = Layer(config, model.backend._replace(attention=reporting, gather=None)).apply(
            {"params": params}, h_BxLxD, rotary
        )
        return h_BxLxD, reports[0]

    if isinstance(layers, list):
        reports = []
        for i, layer in enumerate(layers):
            h_BxLxD, report = body(h_BxLxD, (layer, jax.tree.map(operator.itemgetter(i), caches)))
            reports.append(report)
        return h_BxLxD, jax.tree.map(lambda *report: jnp.stack(report), *reports)
    return jax.lax.scan(body, h_BxLxD, (layers, caches), unroll=config.unroll)


def run_entry(
    model: SpiralFormer,
    layers: Layers | None,
    h_Bx1xD: jax.Array,
    index_B: jax.Array,
    capacity: int,
    caches: list[KeyValues],
    seen: list[jax.Array],
) -> tuple[jax.Array, KeyValues]:
    """One new token or chunk per row.

    Args:
      model: the model.
      layers: None for no layers.
      h_Bx1xD: the entries.
      index_B: which each is, in its row's sequence of entries.
      capacity: indices are below.
      caches: where the entries before may be.
      seen: for each cache [B], how many of its entries, from the first on, are before the row's new one.

    Returns:
      h_Bx1xD, and the keys and values to `put` at `index_B`.
    """
    config = model.config
    rotary = tuple(jnp.take(table_LxF, index_B, axis=0)[:, None] for table_LxF in rotary_tables(capacity, config))
    visible = [
        (jnp.arange(cache.keys.shape[2]) < seen_B[:, None])[:, None, None]
        for cache, seen_B in zip(caches, seen, strict=True)
    ]

    def attention(q_Bx1xHxK, k_Bx1xHxK, v_Bx1xHxK, caches):
        # One softmax over the caches and the entry itself, so that the caches are neither copied nor joined.
        dtype = at_least_float32(q_Bx1xHxK.dtype)
        every = [*caches, KeyValues(k_Bx1xHxK, v_Bx1xHxK)]
        score = [
            jnp.einsum("bqhk,bnhk->bhqn", q_Bx1xHxK, keys, preferred_element_type=dtype) * config.head_width**-0.5
            for keys, _ in every
        ]
        score[:-1] = [jnp.where(mask, x, -jnp.inf) for mask, x in zip(visible, score, strict=False)]
        weight = jax.nn.softmax(jnp.concatenate(score, axis=-1), axis=-1).astype(q_Bx1xHxK.dtype)
        ends = np.cumsum([x.shape[-1] for x in score])[:-1]
        out = sum(
            jnp.einsum("bhqn,bnhk->bqhk", x, values, preferred_element_type=dtype)
            for x, (_, values) in zip(jnp.split(weight, ends, axis=-1), every, strict=True)
        )
        return out.astype(q_Bx1xHxK.dtype), KeyValues(k_Bx1xHxK, v_Bx1xHxK)

    return run_layers(model, layers, h_Bx1xD, rotary, attention, caches)


def run_coarse(
    model: SpiralFormer,
    group: list[Iteration],
    states: States,
    position_B: jax.Array,
    active_B: jax.Array,
    capacity: int,
    olds: list[IterationState],
) -> tuple[States, list[IterationState], Work]:
    """Neighbouring coarse iterations at one token of each row, the core only where a chunk closes.

    Which levels close is known from the position, and what the others add comes from earlier chunks. So the first
    level due has its input after a walk through all of them with what is known; with its output known as well, the
    second has. In round r each row runs the core with its r-th level due, all rows in one pass.

    Args:
      model: the model.
      group: the iterations, all with the same core.
      states: the states before the first of them.
      position_B: the token's.
      active_B: rows for which nothing is due whatever their position are not.
      capacity: positions are below.
      olds: the iterations' states.

    Returns:
      The states after the last of them, the iterations' new states, and the work done, [len(group)] runs.
    """
    config = model.config
    # With several rows, attention reads the caches of all these levels and masks all but the one due for the row: no
    # more than a run for every level would read, and one pass over the weights.
    levels = [iteration.level for iteration in group]
    caches, slots = [old.cache for old in olds], [old.zhat_BxRxD for old in olds]
    chunks, closes = zip(*(locate(position_B, level) for level in levels), strict=True)
    due = [closes_B & active_B for closes_B in closes]
    work = Work(jnp.int32(0), jnp.zeros(len(group), jnp.int32))

    def walk():
        at, opened, pooled = states, [], []
        for iteration, old, slots_BxRxD, chunk_B in zip(group, olds, slots, chunks, strict=True):
            level, arrays = iteration.level, iteration.arrays
            h_BxD = core_input(config, level, arrays, at)[:, 0]
            place_B, is_first_B = level.place_of(position_B), opens(position_B, level)
            opened.append(add_member(config, level, arrays, old.open, place_B, is_first_B, h_BxD))
            pooled.append(close_chunk(config, level, arrays, opened[-1], chunk_B, h_BxD.dtype))
            e_Bx1xD = update(config, iteration, slots_BxRxD, position_B)
            at, _ = advance(config, level, arrays, at, e_Bx1xD)
        return at, opened, pooled

    rank_TxB = jnp.cumsum(jnp.stack(due), axis=0) - 1
    for r in range(most_at_once(levels, capacity)):
        _, _, z = walk()
        chosen = [is_due_B & (rank_B == r) for is_due_B, rank_B in zip(due, rank_TxB, strict=True)]
        index_B = jnp.select(chosen, chunks, 0)
        z_Bx1xD = jnp.select([chosen_B[:, None] for chosen_B in chosen], z, 0)[:, None].astype(states.h_BxLxD.dtype)
        seen = [jnp.where(chosen_B, index_B, 0) for chosen_B in chosen]

        def run(z_Bx1xD, caches=caches, chosen=chosen, index_B=index_B, seen=seen):
            zhat_Bx1xD, new = run_entry(model, group[0].layers, z_Bx1xD, index_B, capacity, caches, seen)
            return zhat_Bx1xD, new, Work(jnp.int32(1), jnp.sum(jnp.stack(chosen), axis=1, dtype=jnp.int32))

        zhat_Bx1xD, new, done = run_if(jnp.any(jnp.stack(chosen)), run, z_Bx1xD)
        work = jax.tree.map(jnp.add, work, done)
        # Rows that had nothing to run write behind the end, which is nowhere.
        caches = [
            put(cache, new, jnp.where(chosen_B, index_B, cache.keys.shape[2]))
            for cache, chosen_B in zip(caches, chosen, strict=True)
        ]
        slots = [
            x.at[jnp.arange(x.shape[0]), jnp.where(chosen_B, index_B % x.shape[1], x.shape[1])].set(
                zhat_Bx1xD[:, 0], mode="drop"
            )
            for x, chosen_B in zip(slots, chosen, strict=True)
        ]

    states, opened, _ = walk()
    return states, [IterationState(*state) for state in zip(caches, opened, slots, strict=True)], work


def run_if(is_due: jax.Array, run: Callable, x: jax.Array):
    """run(x) in a branch of the program, zeros where it is not due.

    `run` may read caches, but what it returns is to be put into them outside: a branch would copy them on its way out.
    """
    nothing = jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), jax.eval_shape(run, x))
    return jax.lax.cond(is_due, run, lambda _: nothing, x)


def locate(position_B: jax.Array, level: Level) -> tuple[jax.Array, jax.Array]:
    """The chunk that each row's token is in, and whether it closes it."""
    return level.chunk_of(position_B), level.closes(position_B)


def open_after(config: ModelConfig, iteration: Iteration, h_BxLxD: jax.Array, lengths_B: jax.Array) -> Any:
    """The open chunk of rows that have consumed the first `lengths_B` of these tokens, perhaps without members.

    Args:
      config: the model's.
      iteration: which one.
      h_BxLxD: what it started from at every token.
      lengths_B: tokens consumed.
    """
    level = iteration.level
    start_B = level.num_chunks(lengths_B) * level.chunk - level.offset
    h_BxGxD = take(h_BxLxD, start_B[:, None] + jnp.arange(level.chunk))

    def add(chunk, place):
        index_B = start_B + place
        place_B, is_first_B = jnp.full_like(start_B, place), opens(index_B, level)
        h_BxD = jax.lax.dynamic_index_in_dim(h_BxGxD, place, axis=1, keepdims=False)
        new = add_member(config, level, iteration.arrays, chunk, place_B, is_first_B, h_BxD)
        return where_rows((index_B >= 0) & (index_B < lengths_B), new, chunk), None

    empty = config.operators.pooling.open(level, h_BxLxD.shape[0])
    return jax.lax.scan(add, empty, jnp.arange(level.chunk))[0]


def opens(position_B: jax.Array, level: Level) -> jax.Array:
    """Whether each row's token is the first of its chunk; with an offset the first chunk starts later than place 0."""
    return (level.place_of(position_B) == 0) | (position_B == 0)


def most_at_once(levels: list[Level], capacity: int) -> int:
    """The largest number of levels that close a chunk at the same token."""
    position_C = np.arange(capacity)
    return int(sum(level.closes(position_C) for level in levels).max())


def update(config: ModelConfig, iteration: Iteration, slots_BxRxD: jax.Array, position_B: jax.Array) -> jax.Array:
    """e(t) of one token per row, [B, 1, D]: its share of the chunk `shift` tokens back, zero before that."""
    source_B = position_B - iteration.level.shift
    chunk_B, place_B = iteration.level.chunk_of(source_B), iteration.level.place_of(source_B)
    zhat_Bx1xD = take(slots_BxRxD, (chunk_B % num_slots(iteration.level))[:, None])
    u_BxGxD = spread(config, iteration.level, iteration.arrays, zhat_Bx1xD)[:, 0]
    return jnp.where(source_B[:, None, None] >= 0, take(u_BxGxD, place_B[:, None]), 0)
