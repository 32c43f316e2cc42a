"""Decoding that does for each token only what is due (docs/spec.md section 4): `prefill` once, then `step` by step.

Pure functions, for the caller to compile with the model closed over and the state donated. Rows are independent: each
is at its own position, and none sees another. The logits are those of the full forward pass.

A coarse core runs for a row only where the row's token closes a chunk. With one row that is a branch of the program for
every coarse iteration. With several, the rows close chunks of different levels at once: neighbouring coarse iterations
of a shared core are run in rounds, each row with the level that is due for it, as many rounds as chunks can close at
one token (one, under half-chunk offsets).
"""

import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from spiral_jax.decoding.entry import iterations, layers_of, open_after, run_coarse, run_entry, run_layers
from spiral_jax.decoding.state import DecodeState, IterationState, KeyValues, Work, put, put_front, slots_after, take
from spiral_jax.errors import require
from spiral_jax.model.iteration import advance, core_input, down_scale, enter, up_scale
from spiral_jax.model.neox import LayerNorm, rotary_tables
from spiral_jax.model.spiralformer import Embedding, SpiralFormer, unembed


def prefill(
    model: SpiralFormer, params, tokens_BxP: jax.Array, lengths_B: jax.Array, state: DecodeState
) -> tuple[jax.Array, DecodeState]:
    """Reads the prompts in one pass over all positions.

    Args:
      model: the model, tied to its mesh.
      params: its parameters.
      tokens_BxP: prompts, padded on the right; ids of the padding are valid but otherwise arbitrary.
      lengths_B: tokens of each prompt, 1 to P.
      state: `empty_state` of at least P tokens. What it holds is forgotten.

    Returns:
      Logits [B, V] at the last token of each row, and the state after it.

    Raises:
      SpiralError: the prompts do not fit the state.
    """
    config = model.config
    B, P = tokens_BxP.shape
    rows, capacity = state.position_B.shape[0], state.capacity
    allowed = f"{rows} rows and 1 to {capacity} tokens, as the decoding state has"
    require(rows == B and 1 <= P <= capacity, "shape of the prompts", tokens_BxP.shape, allowed)

    def run(layers, h_BxLxD, cache):
        """All entries through layers, and the cache with them in front."""

        def attention(q_BxLxHxK, k_BxLxHxK, v_BxLxHxK, _):
            out_BxLxHxK = model.backend.attention(q_BxLxHxK, k_BxLxHxK, v_BxLxHxK)
            return out_BxLxHxK, KeyValues(k_BxLxHxK, v_BxLxHxK)

        h_BxLxD, new = run_layers(model, layers, h_BxLxD, rotary_tables(h_BxLxD.shape[1], config), attention)
        return h_BxLxD, put_front(cache, new)

    h_emb_BxPxD = _apply(Embedding(config, model.backend), params["embed"], tokens_BxP)
    h_BxPxD, prelude = run(layers_of(params, "prelude"), h_emb_BxPxD, state.prelude)

    (states, _), after = enter(config, params.get("entry", {}), h_emb_BxPxD, h_BxPxD), []
    for iteration, old in zip(iterations(config, params), state.iterations, strict=True):
        level, arrays = iteration.level, iteration.arrays
        h_BxPxD = core_input(config, level, arrays, states)
        if level.chunk == 1:
            e_BxPxD, cache = run(iteration.layers, h_BxPxD, old.cache)
            after.append(old._replace(cache=cache))
        else:
            cache, e_BxPxD, slots_BxRxD = old.cache, jnp.zeros_like(h_BxPxD), jnp.zeros_like(old.zhat_BxRxD)
            if level.num_chunks(P):
                zhat_BxNxD, cache = run(iteration.layers, down_scale(config, level, arrays, h_BxPxD), cache)
                slots_BxRxD = slots_after(zhat_BxNxD, lengths_B, level)
                e_BxPxD = up_scale(config, level, arrays, zhat_BxNxD, P)
            after.append(IterationState(cache, open_after(config, iteration, h_BxPxD, lengths_B), slots_BxRxD))
        states, _ = advance(config, level, arrays, states, e_BxPxD)

    h_BxPxD, coda = run(layers_of(params, "coda"), states.h_BxLxD, state.coda)
    work = jax.tree.map(jnp.zeros_like, state.work)
    state = DecodeState(lengths_B.astype(jnp.int32), prelude, tuple(after), coda, work)
    return _logits(model, params, take(h_BxPxD, lengths_B[:, None] - 1)), state


def step(
    model: SpiralFormer, params, token_B: jax.Array, state: DecodeState, active_B: jax.Array | None = None
) -> tuple[jax.Array, DecodeState]:
    """One more token for every row.

    Args:
      model: the model, tied to its mesh.
      params: its parameters.
      token_B: the tokens.
      state: after the tokens before, with room for one more.
      active_B: rows to go on with, None for all. No core runs for the others; their logits mean nothing, and their
        state neither, until a prompt is put there.

    Returns:
      Logits [B, V] at these tokens, and the state after them.
    """
    config, position_B = model.config, state.position_B
    active_B = jnp.ones_like(position_B, bool) if active_B is None else active_B

    def run(layers, h_Bx1xD, cache):
        """One token of each row through layers, and the cache with it."""
        h_Bx1xD, new = run_entry(model, layers, h_Bx1xD, position_B, state.capacity, [cache], [position_B])
        return h_Bx1xD, put(cache, new, position_B)

    h_emb_Bx1xD = _apply(Embedding(config, model.backend), params["embed"], token_B[:, None])
    h_Bx1xD, prelude = run(layers_of(params, "prelude"), h_emb_Bx1xD, state.prelude)

    (states, _), after = enter(config, params.get("entry", {}), h_emb_Bx1xD, h_Bx1xD), []
    core_calls, runs = state.work.core_calls, [jnp.zeros(0, jnp.int32)]
    every = zip(iterations(config, params), state.iterations, strict=True)
    for is_fine, group in itertools.groupby(every, key=lambda pair: pair[0].level.chunk == 1):
        if is_fine:
            for iteration, old in group:
                level, arrays = iteration.level, iteration.arrays
                e_Bx1xD, cache = run(iteration.layers, core_input(config, level, arrays, states), old.cache)
                after.append(old._replace(cache=cache))
                states, _ = advance(config, level, arrays, states, e_Bx1xD)
                core_calls += 1
                runs.append(jnp.sum(active_B, dtype=jnp.int32)[None])
            continue
        # Rows that differ in what is due share one pass through a core; a core of its own shares nothing.
        together = position_B.shape[0] > 1 and config.shared_core
        for part in [list(group)] if together else [[pair] for pair in group]:
            coarse, olds = [iteration for iteration, _ in part], [old for _, old in part]
            states, news, work = run_coarse(model, coarse, states, position_B, active_B, state.capacity, olds)
            after += news
            core_calls += work.core_calls
            runs.append(work.runs_T)

    h_Bx1xD, coda = run(layers_of(params, "coda"), states.h_BxLxD, state.coda)
    work = Work(core_calls, state.work.runs_T + jnp.concatenate(runs))
    state = DecodeState(position_B + active_B.astype(jnp.int32), prelude, tuple(after), coda, work)
    return _logits(model, params, h_Bx1xD), state


def _apply(module: nn.Module, params, x: jax.Array) -> Any:
    """What a module of the model makes of x with parameters of its own."""
    return module.apply({"params": params}, x)


def _logits(model: SpiralFormer, params, h_Bx1xD: jax.Array) -> jax.Array:
    """Logits [B, V] of the coda's output at one token of each row."""
    constrain = model.backend.constrain
    kernel_DxV = constrain(params["head"]["kernel"], "activation_embed", "vocab")
    h_Bx1xD = _apply(LayerNorm(model.config, model.backend), params["final_norm"], h_Bx1xD)
    return constrain(unembed(h_Bx1xD, kernel_DxV), "batch", "length", "vocab")[:, 0]
