"""Causal attention by cuDNN's flash attention: NVIDIA GPUs, bfloat16 and float16, never with the [L, L] scores."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from spiral_jax.model.attention import ATTENTION

# What cuDNN takes (`model.dtype` has no float16 today).
DTYPES = ("bfloat16", "float16")


def causal_attention(q_BxLxHxK: jax.Array, k_BxLxHxK: jax.Array, v_BxLxHxK: jax.Array) -> jax.Array:
    """softmax(q k / sqrt(K)) v with keys up to the query's own position (docs/spec.md section 1); softmax in float32.

    Args:
      q_BxLxHxK: queries, bfloat16 or float16; heads that `takes` accepts.
      k_BxLxHxK: keys.
      v_BxLxHxK: values.

    Returns:
      out_BxLxHxK in the dtype of the inputs.
    """
    L, K = q_BxLxHxK.shape[1], q_BxLxHxK.shape[-1]
    # Gradients need an even length. Padding on the right is in no query's past, and its own query is cut off again.
    padding = ((0, 0), (0, L % 2), (0, 0), (0, 0))
    qkv = (jnp.pad(x, padding) for x in (q_BxLxHxK, k_BxLxHxK, v_BxLxHxK))
    out_BxLxHxK = jax.nn.dot_product_attention(*qkv, scale=K**-0.5, is_causal=True, implementation="cudnn")[:, :L]
    return checkpoint_name(out_BxLxHxK, ATTENTION)


def takes(device: jax.Device, dtype: str, head_width: int) -> bool:
    """Whether cuDNN's flash attention runs on a GPU, with these inputs."""
    # "9.0"; "gfx942" on AMD, and nothing on a GPU that is only described.
    major = str(getattr(device, "compute_capability", "")).partition(".")[0]
    if not major.isdigit() or int(major) < 8:
        return False
    widest = 256 if int(major) >= 9 else 128
    return jnp.dtype(dtype).name in DTYPES and head_width % 8 == 0 and head_width <= widest
