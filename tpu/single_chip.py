"""A training step that others measured on one TPU v5e and one v6e, in plain JAX, for `calibration` only.

vorushin/tpuchat, notebook 08, as far as its blog tells: queries of four heads share one head of keys and values, norms
have no parameters, everything is bfloat16, nothing is computed again, gradients are added up over micro-batches.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from tpu.llama import adamw, rotated

BLOCK = 1024  # of queries and keys, as they had it
MICRO_BATCHES = 16
SOFT_CAP = 15.0


@dataclasses.dataclass(frozen=True)
class SharedKeys:
    """Sizes.

    Attributes:
      layers: of attention and a gated MLP, each with a norm before it.
      d_model: width of the residual stream.
      d_mlp: width between the MLP's matrices.
      heads: of queries.
      vocab: of an embedding and a head that share nothing.
      length: tokens per sequence.
      loss_blocks: parts of a sequence whose logits are held one after the other.
    """

    layers: int = 8
    d_model: int = 1024
    d_mlp: int = 3072
    heads: int = 4
    vocab: int = 32_768
    length: int = 2048
    loss_blocks: int = 8

    @property
    def head_width(self) -> int:
        return self.d_model // self.heads

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the parameters; those of layers have the layer as their first axis."""
        N, D, F, K = self.layers, self.d_model, self.d_mlp, self.head_width
        layers: dict[str, tuple[int, ...]] = {
            "q": (D, D),
            "k": (D, K),
            "v": (D, K),
            "o": (D, D),
            "gate": (D, F),
            "up": (D, F),
            "down": (F, D),
        }
        outside = {"embedding": (self.vocab, D), "head": (D, self.vocab)}
        return {name: (N, *shape) for name, shape in layers.items()} | outside

    @property
    def num_params(self) -> int:
        return sum(map(math.prod, self.shapes().values()))


def lower_train_step(model: SharedKeys, rows: int, micro_batches: int, device: jax.Device):
    """The step (state, tokens_AxBxW) to (state, loss), lowered for one described device.

    Args:
      model: sizes.
      rows: B, sequences of a micro-batch.
      micro_batches: A, whose gradients make one update.
      device: where it is to run.
    """
    sharding = SingleDeviceSharding(device)

    def described(shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    arrays = {name: described(shape) for name, shape in model.shapes().items()}
    state = {"params": arrays, "mean": arrays, "square": arrays, "count": described((), jnp.int32)}
    tokens_AxBxW = described((micro_batches, rows, model.length + 1), jnp.int32)
    return jax.jit(functools.partial(_train_step, model), donate_argnums=0).lower(state, tokens_AxBxW)


def _train_step(model: SharedKeys, state: dict, tokens_AxBxW: jax.Array):
    def add(summed, tokens_BxW):
        loss, grads = jax.value_and_grad(functools.partial(_loss, model))(state["params"], tokens_BxW)
        return jax.tree.map(jnp.add, summed, (loss, grads)), None

    zeros = (jnp.float32(0), jax.tree.map(jnp.zeros_like, state["params"]))
    (loss, grads), _ = jax.lax.scan(add, zeros, tokens_AxBxW)
    A = tokens_AxBxW.shape[0]
    return adamw(state, jax.tree.map(lambda g: g / A, grads)), loss / A


def _loss(model: SharedKeys, params: dict, tokens_BxW: jax.Array) -> jax.Array:
    layers = dict(params)
    head_DxV, embedding_VxD = layers.pop("head"), layers.pop("embedding")
    h_BxLxD = _normalized(embedding_VxD[tokens_BxW[:, :-1]])
    # One after the other, no scan: it would stack what the backward pass needs, which costs a copy of all of it.
    for i in range(model.layers):
        h_BxLxD = _layer(model, h_BxLxD, jax.tree.map(lambda w: w[i], layers))  # noqa: B023
    h_BxLxD = _normalized(h_BxLxD)
    B, _, D = h_BxLxD.shape
    h_NxBxPxD = h_BxLxD.reshape(B, model.loss_blocks, -1, D).swapaxes(0, 1)
    targets_NxBxP = tokens_BxW[:, 1:].reshape(B, model.loss_blocks, -1).swapaxes(0, 1)

    @jax.checkpoint
    def nats_of_block(h_BxPxD, targets_BxP):
        logits_BxPxV = SOFT_CAP * jnp.tanh((h_BxPxD @ head_DxV) / SOFT_CAP)
        target_BxP = jnp.take_along_axis(logits_BxPxV, targets_BxP[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits_BxPxV.astype(jnp.float32), axis=-1) - target_BxP

    _, nats_NxBxP = jax.lax.scan(lambda _, xs: (None, nats_of_block(*xs)), None, (h_NxBxPxD, targets_NxBxP))
    return jnp.mean(nats_NxBxP)


def _layer(model: SharedKeys, h_BxLxD: jax.Array, weights: dict) -> jax.Array:
    B, L, _ = h_BxLxD.shape
    n_BxLxD = _normalized(h_BxLxD)
    q_BxLxHxK = (n_BxLxD @ weights["q"]).reshape(B, L, model.heads, -1)
    k_BxLx1xK, v_BxLx1xK = ((n_BxLxD @ weights[name])[:, :, None] for name in ("k", "v"))
    q_BxLxHxK, k_BxLx1xK = (_normalized(rotated(x)) for x in (q_BxLxHxK, k_BxLx1xK))
    q_BxHxLxK = (q_BxLxHxK * model.head_width**-0.5).swapaxes(1, 2)
    a_BxHxLxK = jax.vmap(_kernel(model))(q_BxHxLxK, k_BxLx1xK[:, :, 0], v_BxLx1xK[:, :, 0])
    h_BxLxD = h_BxLxD + a_BxHxLxK.swapaxes(1, 2).reshape(B, L, -1) @ weights["o"]
    n_BxLxD = _normalized(h_BxLxD)
    return h_BxLxD + (jax.nn.silu(n_BxLxD @ weights["gate"]) * (n_BxLxD @ weights["up"])) @ weights["down"]


def _kernel(model: SharedKeys):
    """(q [H, L, K], k [L, K], v [L, K]) to [H, L, K]."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    size = min(BLOCK, model.length)
    sizes = splash_attention_kernel.BlockSizes(
        block_q=size, block_kv=size, block_q_dkv=size, block_kv_dkv=size, block_q_dq=size, block_kv_dq=size
    )
    mask = splash_attention_mask.MultiHeadMask(
        [splash_attention_mask.CausalMask((model.length, model.length))] * model.heads
    )
    return splash_attention_kernel.make_splash_mqa(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)


def _normalized(x: jax.Array) -> jax.Array:
    """RMSNorm without parameters, in float32."""
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)
