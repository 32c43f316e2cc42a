"""Causal attention by Pallas splash attention: TPU only, never with the [L, L] scores in HBM."""

import jax
import jax.numpy as jnp

from spiral_jax.model import attention as plain
from spiral_jax.model.attention import ATTENTION

# Rows of queries and keys that a kernel holds at a time, by `device_kind` and head width: the most of 512 and 1024 that
# the TPU compiler fits into VMEM in bfloat16, forward and backward, at 8 rows of the batch (1 or 2 take less). 2048
# overflows it on v4, v5e and v5p; so does 1024 in float32 on some, which gets 512. Not timed on a chip.
LARGEST_BLOCK = {
    **{kind: {64: 1024, 128: 1024, 256: 512} for kind in ("TPU v4", "TPU v5 lite", "TPU v5e", "TPU v5", "TPU v5p")},
    **{kind: {64: 1024, 128: 1024, 256: 1024} for kind in ("TPU v6 lite", "TPU v6e", "TPU7x", "TPU7")},
}
# Other head widths are padded with zeros to the next of these.
HEAD_WIDTHS = (64, 128, 256)
# Lengths that the kernel takes are multiples of this.
LANES = 128


def causal_attention(
    q_BxLxHxK: jax.Array,
    k_BxLxHxK: jax.Array,
    v_BxLxHxK: jax.Array,
    *,
    device_kind: str,
    interpret: bool = False,
) -> jax.Array:
    """softmax(q k / sqrt(K)) v with keys up to the query's own position (docs/spec.md section 1); softmax in float32.

    Sees the heads and rows of one device: on several it goes inside `shard_map`. Sequences shorter than 128 (the
    coarse levels of short inputs) have few scores, and plain XLA computes them.

    Args:
      q_BxLxHxK: queries, float32 or bfloat16; heads of at most 256.
      k_BxLxHxK: keys.
      v_BxLxHxK: values.
      device_kind: of the TPU, which decides the block sizes.
      interpret: run the kernel in Python, on any platform.

    Returns:
      out_BxLxHxK in the dtype of the inputs.
    """
    _, L, H, K = q_BxLxHxK.shape
    if L < LANES:
        return plain.causal_attention(q_BxLxHxK, k_BxLxHxK, v_BxLxHxK)
    # The scale's rounding to bfloat16 would be the same for every score; in float32 there is the product's only.
    scaled_BxLxHxK = (q_BxLxHxK.astype(jnp.float32) * K**-0.5).astype(q_BxLxHxK.dtype)
    # Padding on the right is in no query's past, and its own queries are cut off again.
    padding = ((0, 0), (0, 0), (0, -L % LANES), (0, padded_head_width(K) - K))
    q_BxHxLxK, k_BxHxLxK, v_BxHxLxK = (
        jnp.pad(x.swapaxes(1, 2), padding) for x in (scaled_BxLxHxK, k_BxLxHxK, v_BxLxHxK)
    )
    size = block_size(q_BxHxLxK.shape[2], q_BxHxLxK.shape[3], q_BxHxLxK.dtype, device_kind)
    kernel = _kernel(H, q_BxHxLxK.shape[2], size, interpret)
    out_BxHxLxK = jax.vmap(kernel)(q_BxHxLxK, k_BxHxLxK, v_BxHxLxK)
    return out_BxHxLxK[:, :, :L, :K].swapaxes(1, 2)


def takes(dtype: str, head_width: int) -> bool:
    """Whether the kernel runs with these inputs."""
    return dtype in ("float32", "bfloat16") and head_width <= HEAD_WIDTHS[-1]


def padded_head_width(head_width: int) -> int:
    """The head width that the kernel runs at."""
    return next(width for width in HEAD_WIDTHS if head_width <= width)


def block_size(length: int, head_width: int, dtype: jnp.dtype, device_kind: str) -> int:
    """Rows of queries and keys per block: the largest multiple of 128 that divides the length and is not above a limit.

    Args:
      length: a multiple of 128.
      head_width: one of HEAD_WIDTHS.
      dtype: of the inputs.
      device_kind: of the TPU; generations that are not in the table get blocks of 512 at most.
    """
    limit = LARGEST_BLOCK.get(device_kind, {}).get(head_width, 512) if dtype == jnp.bfloat16 else 512
    # Blocks above the diagonal are skipped: four a side cost 10/16 of the scores, one costs all.
    limit = min(limit, max(512, length // 4))
    return max(size for size in range(LANES, limit + 1, LANES) if length % size == 0)


def _kernel(num_heads: int, length: int, size: int, interpret: bool):
    """(q, k, v) of [H, L, K] to [H, L, K], with its gradients, in blocks of `size`; q is scaled already."""
    # Pallas takes a while to import, and only TPUs need it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    sizes = splash_attention_kernel.BlockSizes(
        block_q=size,
        block_kv=size,
        block_q_dkv=size,
        block_kv_dkv=size,
        # Gradients of queries in a kernel of their own: the fused one writes L / block copies of them in q's dtype.
        block_q_dq=size,
        block_kv_dq=size,
    )
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((length, length))] * num_heads)
    return splash_attention_kernel.make_splash_mha(
        mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, residual_checkpoint_name=ATTENTION, interpret=interpret
    )
