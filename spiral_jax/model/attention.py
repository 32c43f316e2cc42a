"""The attention of a layer (docs/spec.md section 1) in plain XLA operations: any platform, any length."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# Under which `jax.checkpoint` policies find attention's output, and what its backward pass needs with it.
ATTENTION = "attention"


def causal_attention(q_BxLxHxK: jax.Array, k_BxLxHxK: jax.Array, v_BxLxHxK: jax.Array) -> jax.Array:
    """softmax(q k / sqrt(K)) v with keys up to the query's own position; scores and softmax at least float32.

    Materialises the [B, H, L, L] scores.

    Returns:
      out_BxLxHxK in the dtype of the inputs.
    """
    L, K = q_BxLxHxK.shape[1], q_BxLxHxK.shape[-1]
    dtype = jnp.promote_types(q_BxLxHxK.dtype, jnp.float32)
    score_BxHxLxL = jnp.einsum("bqhk,bphk->bhqp", q_BxLxHxK, k_BxLxHxK, preferred_element_type=dtype) * K**-0.5
    mask_LxL = jnp.tril(jnp.ones((L, L), bool))
    weight_BxHxLxL = jax.nn.softmax(jnp.where(mask_LxL, score_BxHxLxL, -jnp.inf), axis=-1).astype(q_BxLxHxK.dtype)
    return checkpoint_name(jnp.einsum("bhqp,bphk->bqhk", weight_BxHxLxL, v_BxLxHxK), ATTENTION)
