"""One pass over some sequences that looks at everything the probes are about (docs/spec.md section 6).

The model's own parts in the order of `model/spiralformer.py`, written out so that what goes from one to the next can be
seen. Of an attention map a block of queries of one layer is there at a time.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from spiral_jax.decoding.entry import Iteration, iterations, run_layers
from spiral_jax.model.iteration import (
    advance,
    core_input,
    down_scale,
    enter,
    entry_routes,
    pooling_weights,
    routes,
    shares,
    up_scale,
)
from spiral_jax.model.neox import Stack, rotary_tables
from spiral_jax.model.operators import at_least_float32
from spiral_jax.model.spiralformer import Embedding, SpiralFormer
from spiral_jax.probes.heads import head_statistics, window
from spiral_jax.probes.states import relative_update


class Sums(NamedTuple):
    """What is averaged over sequences: of each sequence its mean, added up.

    Attributes:
      entropy_TxCxH: key-marginal entropy of each core layer's heads in each iteration.
      local_mass_TxCxH: local attention mass.
      update_R: relative update of prelude, the core in each iteration, and coda; R = T + 2.
      weights: by `name.where`, as in `write.entry`, `write.0`, `pooling.0`: the mean weight of each slot or place.
    """

    entropy_TxCxH: jax.Array
    local_mass_TxCxH: jax.Array
    update_R: jax.Array
    weights: Mapping[str, jax.Array]


def look(
    model: SpiralFormer, params: Any, tokens_BxL: jax.Array, real_B: jax.Array, chosen_BxK: jax.Array
) -> tuple[Sums, jax.Array]:
    """Probes a batch.

    Args:
      model: the model, tied to its mesh; every iteration must have a chunk in L tokens.
      params: its parameters.
      tokens_BxL: the sequences.
      real_B: 1 for those that count, 0 for others.
      chosen_BxK: positions whose states are wanted.

    Returns:
      The sums over sequences, and states_SxBxKxD of the chosen tokens, at least float32: h_emb, h(0)..h(T), and h_out,
      which is what the coda gives to the final LayerNorm.
    """
    config = model.config
    h_emb_BxLxD = _apply(Embedding(config, model.backend), params["embed"], tokens_BxL)
    h_BxLxD = _apply(Stack(config, config.prelude_layers, model.backend), params.get("prelude", {}), h_emb_BxLxD)
    updates = [relative_update(h_emb_BxLxD, h_BxLxD)]

    entry = params.get("entry", {})
    weights = _named("entry", entry_routes(config, entry, h_emb_BxLxD, h_BxLxD))
    states, _ = enter(config, entry, h_emb_BxLxD, h_BxLxD)
    seen, heads = [h_emb_BxLxD, states.h_BxLxD], []
    for t, iteration in enumerate(iterations(config, params)):
        level, arrays = iteration.level, iteration.arrays
        weights |= _named(str(t), routes(config, level, arrays, states))
        h_BxLxD = core_input(config, level, arrays, states)
        if level.chunk == 1:
            e_BxLxD, update_BxN, of_heads = _core(model, iteration, h_BxLxD)
        else:
            weights |= _named(str(t), pooling_weights(config, level, arrays, h_BxLxD))
            zhat_BxNxD, update_BxN, of_heads = _core(model, iteration, down_scale(config, level, arrays, h_BxLxD))
            weights |= _named(str(t), shares(config, level, arrays, zhat_BxNxD))
            e_BxLxD = up_scale(config, level, arrays, zhat_BxNxD, h_BxLxD.shape[1])
        states, _ = advance(config, level, arrays, states, e_BxLxD)
        updates.append(update_BxN)
        heads.append(of_heads)
        seen.append(states.h_BxLxD)
    h_out_BxLxD = _apply(Stack(config, config.coda_layers, model.backend), params.get("coda", {}), states.h_BxLxD)
    updates.append(relative_update(states.h_BxLxD, h_out_BxLxD))

    entropy_TxCxBxH, local_mass_TxCxBxH = (jnp.stack(values) for values in zip(*heads, strict=True))
    update_RxB = jnp.stack([jnp.mean(update_BxN, axis=1) for update_BxN in updates])

    def total(x_xB: jax.Array) -> jax.Array:
        """The sum over the sequences that count, whatever is in the others."""
        return jnp.sum(jnp.where(real_B > 0, x_xB, 0), axis=-1)

    sums = Sums(
        total(entropy_TxCxBxH.swapaxes(-1, -2)),
        total(local_mass_TxCxBxH.swapaxes(-1, -2)),
        total(update_RxB),
        {name: total(w_BxW.T) for name, w_BxW in weights.items()},
    )
    states_SxBxKxD = jnp.stack(
        [jnp.take_along_axis(x_BxLxD, chosen_BxK[..., None], axis=1) for x_BxLxD in (*seen, h_out_BxLxD)]
    )
    return sums, states_SxBxKxD.astype(at_least_float32(config.dtype))


def _core(model: SpiralFormer, iteration: Iteration, z_BxNxD: jax.Array):
    """zhat_BxNxD, its relative update [B, N], and the core's (entropy, local mass), each [C, B, H]."""
    near = window(iteration.level)

    def attention(q_BxNxHxK, k_BxNxHxK, v_BxNxHxK, _):
        out_BxNxHxK = model.backend.attention(q_BxNxHxK, k_BxNxHxK, v_BxNxHxK)
        return out_BxNxHxK, head_statistics(q_BxNxHxK, k_BxNxHxK, near)

    rotary = rotary_tables(z_BxNxD.shape[1], model.config)
    zhat_BxNxD, of_heads = run_layers(model, iteration.layers, z_BxNxD, rotary, attention)
    return zhat_BxNxD, relative_update(z_BxNxD, zhat_BxNxD), of_heads


def _named(where: str, weights: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Weights [B, N, W] as means [B, W] under `name.where`."""
    return {f"{name}.{where}": jnp.mean(w_BxNxW, axis=1) for name, w_BxNxW in weights.items()}


def _apply(module: nn.Module, params: Any, x: jax.Array) -> Any:
    return module.apply({"params": params}, x)
