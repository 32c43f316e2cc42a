"""Sampling a continuation by full forward passes over a buffer of fixed length."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from spiral_jax.model.spiralformer import SpiralFormer, unembed


def sample(
    model: SpiralFormer,
    params,
    prompt_ids: np.ndarray,
    *,
    new_tokens: int,
    num_ids: int,
    separator_id: int,
    temperature: float,
    seed: int,
) -> np.ndarray:
    """Continues a prompt, one program for all tokens.

    Args:
      model: the model.
      params: its parameters.
      prompt_ids: [P] tokens, at least one.
      new_tokens: tokens to add.
      num_ids: ids from here on stand for no token and are never sampled.
      separator_id: sampling it ends the text.
      temperature: 0 is greedy.
      seed: of the random choices.

    Returns:
      The new tokens, up to and without a separator.
    """
    length = len(prompt_ids) + new_tokens
    tokens_1xL = np.zeros((1, length), np.int32)
    tokens_1xL[0, : len(prompt_ids)] = prompt_ids
    tokens_1xL = _fill(
        model, num_ids, params, tokens_1xL, jnp.int32(len(prompt_ids)), jnp.float32(temperature), jax.random.key(seed)
    )
    new_ids = np.asarray(tokens_1xL)[0, len(prompt_ids) :]
    ends = np.flatnonzero(new_ids == separator_id)
    return new_ids[: ends[0]] if ends.size else new_ids


@functools.partial(jax.jit, static_argnums=(0, 1))
def _fill(model: SpiralFormer, num_ids: int, params, tokens_1xL, start, temperature, key):
    """Fills positions start.. of the buffer; what stands after the position being filled cannot be seen by it."""

    def step(position, tokens_1xL):
        h_1xLxD, _ = model.apply({"params": params}, tokens_1xL, method="hidden")
        h_1x1xD = jax.lax.dynamic_slice_in_dim(h_1xLxD, position - 1, 1, axis=1)
        logits_V = unembed(h_1x1xD, params["head"]["kernel"])[0, 0]
        logits_V = jnp.where(jnp.arange(logits_V.size) < num_ids, logits_V, -jnp.inf)
        noise_V = jax.random.gumbel(jax.random.fold_in(key, position), logits_V.shape)
        return tokens_1xL.at[0, position].set(jnp.argmax(logits_V + temperature * noise_V))

    return jax.lax.fori_loop(start, tokens_1xL.shape[1], step, tokens_1xL)
