"""Cross-entropy a block of positions at a time: logits never exist for all of them at once."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from spiral_jax.data.examples import Examples
from spiral_jax.model.operators import at_least_float32
from spiral_jax.model.spiralformer import SpiralFormer, unembed


def window_nats(model: SpiralFormer, params, windows_BxW: jax.Array, block: int) -> jax.Array:
    """-log p of tokens 1..L of windows of L + 1 tokens: nats_BxL, at least float32. For scoring, not for training."""
    h_BxLxD, _ = model.apply({"params": params}, windows_BxW[:, :-1], method="hidden")
    return _from_logits(model, params, h_BxLxD, windows_BxW[:, 1:], block, lambda *given: _nats(*given)[0])


def nats_and_greedy(
    model: SpiralFormer, params, h_BxLxD: jax.Array, targets_BxL: jax.Array, block: int
) -> tuple[jax.Array, jax.Array]:
    """-log p(target) at every position, and whether the target was the likeliest token; not to be differentiated.

    Args:
      model: the model, tied to its mesh.
      params: its parameters.
      h_BxLxD: final hidden states.
      targets_BxL: the token to predict at each position.
      block: positions whose logits exist at one time.

    Returns:
      nats_BxL, at least float32, and greedy_BxL.
    """

    def score(logits_BxPxV: jax.Array, targets_BxP: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _nats(logits_BxPxV, targets_BxP)[0], jnp.argmax(logits_BxPxV, axis=-1) == targets_BxP

    return _from_logits(model, params, h_BxLxD, targets_BxL, block, score)


def _from_logits(model: SpiralFormer, params, h_BxLxD, targets_BxL, block: int, score: Callable) -> Any:
    """What `score` makes of each block's logits_BxPxV and targets_BxP, put together over all positions."""
    kernel_DxV, constrain = _head(model, params), model.backend.constrain

    def of_block(carry, h_BxPxD, targets_BxP, is_real_P):
        return carry, score(_logits(h_BxPxD, kernel_DxV, constrain), targets_BxP)

    return _over_blocks(of_block, None, h_BxLxD, targets_BxL, block)[1]


def mean_window_nats(model: SpiralFormer, params, windows_BxW: jax.Array, block: int) -> tuple[jax.Array, Any]:
    """The mean of `window_nats`, to be differentiated, and the model's metrics.

    Args:
      model: the model, tied to its mesh.
      params: its parameters.
      windows_BxW: tokens, W = L + 1.
      block: positions whose logits exist at one time.
    """
    h_BxLxD, metrics = model.apply({"params": params}, windows_BxW[:, :-1], method="hidden")
    kernel_DxV = _head(model, params)
    return mean_nats(h_BxLxD, kernel_DxV, windows_BxW[:, 1:], block, model.backend.constrain), metrics


def mean_example_nats(model: SpiralFormer, params, examples: Examples, block: int) -> tuple[jax.Array, Any]:
    """The mean over positions of -log p(target) times weight, and the model's metrics; otherwise as `mean_window_nats`.

    Where the weights have mean 1 that is the mean over all weights.
    """
    h_BxLxD, metrics = model.apply({"params": params}, examples.tokens_BxL, method="hidden")
    kernel_DxV, constrain = _head(model, params), model.backend.constrain
    return weighted_nats(h_BxLxD, kernel_DxV, examples.targets_BxL, examples.weights_BxL, block, constrain), metrics


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def mean_nats(
    h_BxLxD: jax.Array, kernel_DxV: jax.Array, targets_BxL: jax.Array, block: int, constrain: Callable
) -> jax.Array:
    """Mean of -log p(target) over all positions, at least float32.

    When it is differentiated, the gradients of a block are computed with its loss, as they differ from those of any
    function of the mean by a factor only: three products with the head, where recomputing the logits would take four.

    Args:
      h_BxLxD: final hidden states.
      kernel_DxV: the head, float32 whatever the compute dtype, as its gradient is summed over blocks.
      targets_BxL: the token to predict at each position.
      block: positions per block.
      constrain: pins activations to the mesh (`model.neox.Backend.constrain`).
    """
    return _mean_nats_and_gradients(h_BxLxD, kernel_DxV, targets_BxL, block, constrain)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def weighted_nats(
    h_BxLxD: jax.Array,
    kernel_DxV: jax.Array,
    targets_BxL: jax.Array,
    weights_BxL: jax.Array,
    block: int,
    constrain: Callable,
) -> jax.Array:
    """As `mean_nats`, with every position's loss times its weight. Weights are constants: they get no gradient."""
    return _weighted_nats_and_gradients(h_BxLxD, kernel_DxV, targets_BxL, weights_BxL, block, constrain)[0]


def _mean_nats_and_gradients(h_BxLxD, kernel_DxV, targets_BxL, block, constrain):
    return _nats_and_gradients(h_BxLxD, kernel_DxV, targets_BxL, (), block, constrain)


def _weighted_nats_and_gradients(h_BxLxD, kernel_DxV, targets_BxL, weights_BxL, block, constrain):
    return _nats_and_gradients(h_BxLxD, kernel_DxV, targets_BxL, (weights_BxL,), block, constrain)


def _nats_and_gradients(h_BxLxD, kernel_DxV, targets_BxL, weights: tuple[jax.Array, ...], block, constrain):
    """The sum of nats times weights, if there are any, over the number of positions; and its gradients."""
    dtype = at_least_float32(h_BxLxD.dtype)

    def add(carry, h_BxPxD, targets_BxP, is_real_P, *weights_BxP):
        total, d_kernel_DxV = carry
        (weight_BxP,) = weights_BxP or (is_real_P,)  # weights are 0 beyond the sequence, too
        logits_BxPxV = _logits(h_BxPxD, kernel_DxV, constrain)
        nats_BxP, log_sum_BxP, is_target_BxPxV = _nats(logits_BxPxV, targets_BxP)
        p_BxPxV = jnp.exp(logits_BxPxV - log_sum_BxP[..., None])
        d_logits_BxPxV = (p_BxPxV - is_target_BxPxV) * (weight_BxP / targets_BxL.size)[..., None]
        # Inputs of the products in the compute dtype, sums at least in float32, as in `unembed`.
        d_logits_BxPxV = d_logits_BxPxV.astype(h_BxPxD.dtype)
        kernel = kernel_DxV.astype(h_BxPxD.dtype)
        d_h_BxPxD = jnp.einsum("bpv,dv->bpd", d_logits_BxPxV, kernel, preferred_element_type=dtype)
        d_kernel_DxV += jnp.einsum("bpd,bpv->dv", h_BxPxD, d_logits_BxPxV, preferred_element_type=dtype)
        d_kernel_DxV = constrain(d_kernel_DxV, "activation_embed", "vocab")
        return (total + jnp.sum(nats_BxP * weight_BxP), d_kernel_DxV), d_h_BxPxD.astype(h_BxPxD.dtype)

    start = jnp.zeros((), dtype), jnp.zeros(kernel_DxV.shape, dtype)
    (total, d_kernel_DxV), d_h_BxLxD = _over_blocks(add, start, h_BxLxD, targets_BxL, block, *weights)
    return total / targets_BxL.size, (d_h_BxLxD, d_kernel_DxV.astype(kernel_DxV.dtype))


def _scaled_gradients(block, constrain, gradients, factor):
    del block, constrain
    d_h_BxLxD, d_kernel_DxV = gradients
    return (d_h_BxLxD * factor.astype(d_h_BxLxD.dtype), d_kernel_DxV * factor, None)


def _scaled_weighted_gradients(block, constrain, gradients, factor):
    return *_scaled_gradients(block, constrain, gradients, factor), None


mean_nats.defvjp(_mean_nats_and_gradients, _scaled_gradients)
weighted_nats.defvjp(_weighted_nats_and_gradients, _scaled_weighted_gradients)


def _head(model: SpiralFormer, params) -> jax.Array:
    # Pinned once, not once per block.
    return model.backend.constrain(params["head"]["kernel"], "activation_embed", "vocab")


def _over_blocks(body: Callable, carry, h_BxLxD: jax.Array, targets_BxL: jax.Array, block: int, *more_BxL: jax.Array):
    """Scans a sequence a block of positions at a time.

    Args:
      body: (carry, h_BxPxD, targets_BxP, is_real_P, *more_BxP) to (carry, tree of [B, P, ..]); `is_real_P` and the
        others are 0 where the last block goes beyond the sequence.
      carry: of the first block.
      h_BxLxD: final hidden states.
      targets_BxL: the token to predict at each position.
      block: P, or more than there are.
      *more_BxL: whatever else there is of each position.

    Returns:
      The last carry, and the tree of [B, L, ..].
    """
    B, L, _ = h_BxLxD.shape
    block = min(block, L)
    padding = -L % block

    def cut(x_BxLx: jax.Array) -> jax.Array:
        widths = [(0, 0), (0, padding)] + [(0, 0)] * (x_BxLx.ndim - 2)
        return jnp.pad(x_BxLx, widths).reshape(B, -1, block, *x_BxLx.shape[2:]).swapaxes(0, 1)

    def joined(x_NxBxPx: jax.Array) -> jax.Array:
        return x_NxBxPx.swapaxes(0, 1).reshape(B, -1, *x_NxBxPx.shape[3:])[:, :L]

    is_real_NxP = (jnp.arange(L + padding) < L).astype(at_least_float32(h_BxLxD.dtype)).reshape(-1, block)
    blocks = cut(h_BxLxD), cut(targets_BxL), is_real_NxP, *map(cut, more_BxL)
    carry, outputs = jax.lax.scan(lambda carry, xs: body(carry, *xs), carry, blocks)
    return carry, jax.tree.map(joined, outputs)


def _logits(h_BxPxD: jax.Array, kernel_DxV: jax.Array, constrain: Callable) -> jax.Array:
    return constrain(unembed(h_BxPxD, kernel_DxV), "batch", "length", "vocab")


def _nats(logits_BxPxV: jax.Array, targets_BxP: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """-log p(target), the logits' log-sum-exp, and where the targets are."""
    # A comparison instead of a gather: it stays local where the vocabulary is sharded.
    is_target_BxPxV = jnp.arange(logits_BxPxV.shape[-1]) == targets_BxP[..., None]
    target_BxP = jnp.sum(jnp.where(is_target_BxPxV, logits_BxPxV, 0), axis=-1)
    log_sum_BxP = jax.nn.logsumexp(logits_BxPxV, axis=-1)
    return log_sum_BxP - target_BxP, log_sum_BxP, is_target_BxPxV
