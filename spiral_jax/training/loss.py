"""Cross-entropy a block of positions at a time."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from spiral_jax.model.spiralformer import SpiralFormer, unembed


def token_nats(
    h_BxLxD: jax.Array, kernel_DxV: jax.Array, targets_BxL: jax.Array, block: int, constrain: Callable
) -> jax.Array:
    """-log p(target) at every position, without ever holding the logits of more than `block` positions.

    The scan's body is checkpointed, so the backward pass walks the same blocks, computing each one's logits again.

    Args:
      h_BxLxD: final hidden states.
      kernel_DxV: the head.
      targets_BxL: the token to predict at each position.
      block: positions per block.
      constrain: pins activations to the mesh (`model.neox.Backend.constrain`).

    Returns:
      nats_BxL, at least float32.
    """
    B, L, D = h_BxLxD.shape
    block = min(block, L)
    padding = -L % block
    h_NxBxPxD = jnp.pad(h_BxLxD, ((0, 0), (0, padding), (0, 0))).reshape(B, -1, block, D).swapaxes(0, 1)
    targets_NxBxP = jnp.pad(targets_BxL, ((0, 0), (0, padding))).reshape(B, -1, block).swapaxes(0, 1)
    # Gathered over fsdp once, not once per block; and float32, so that its gradient is summed in float32.
    kernel_DxV = constrain(kernel_DxV, "activation_embed", "vocab")

    @jax.checkpoint
    def nats_of_block(h_BxPxD, targets_BxP):
        logits_BxPxV = constrain(unembed(h_BxPxD, kernel_DxV), "batch", "length", "vocab")
        # A comparison instead of a gather: it stays local where the vocabulary is sharded.
        is_target_BxPxV = jnp.arange(logits_BxPxV.shape[-1]) == targets_BxP[..., None]
        target_BxP = jnp.sum(jnp.where(is_target_BxPxV, logits_BxPxV, 0), axis=-1)
        return jax.nn.logsumexp(logits_BxPxV, axis=-1) - target_BxP

    _, nats_NxBxP = jax.lax.scan(lambda _, xs: (None, nats_of_block(*xs)), None, (h_NxBxPxD, targets_NxBxP))
    return nats_NxBxP.swapaxes(0, 1).reshape(B, -1)[:, :L]


def window_nats(model: SpiralFormer, params, windows_BxW: jax.Array, block: int) -> tuple[jax.Array, dict]:
    """-log p of tokens 1..L of windows of L + 1 tokens: nats_BxL and the model's metrics."""
    h_BxLxD, metrics = model.apply({"params": params}, windows_BxW[:, :-1], method="hidden")
    nats_BxL = token_nats(h_BxLxD, params["head"]["kernel"], windows_BxW[:, 1:], block, model.backend.constrain)
    return nats_BxL, metrics
