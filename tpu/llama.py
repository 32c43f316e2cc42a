"""The training step whose speed on TPUs others have measured: a Llama-like model in plain JAX, for `calibration` only.

What the measured runs did (Levanter, as far as their files tell), not how this package trains its own models: all
parameters sharded over all chips, gathered in bfloat16 layer by layer, every layer computed again in the backward pass.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from spiral_jax.kernels.splash import causal_attention

AXIS = "fsdp"
# Tokens whose logits a device holds at a time.
LOSS_BLOCK = 8192
LEARNING_RATE, BETAS, EPSILON, WEIGHT_DECAY = 1e-3, (0.9, 0.98), 1e-8, 0.1


@dataclasses.dataclass(frozen=True)
class Llama:
    """Sizes.

    Attributes:
      layers: of attention and a gated MLP, each with a norm before and one after.
      d_model: width of the residual stream.
      d_mlp: width between the MLP's matrices.
      heads: of queries.
      kv_heads: of keys and values; each serves heads / kv_heads of the queries'.
      vocab: of an embedding and a head that share nothing.
      length: tokens per sequence.
    """

    layers: int
    d_model: int
    d_mlp: int
    heads: int
    kv_heads: int
    vocab: int = 128_256
    length: int = 4096

    @property
    def head_width(self) -> int:
        return self.d_model // self.heads

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the parameters; those of layers have the layer as their first axis."""
        N, D, F = self.layers, self.d_model, self.d_mlp
        Q, K = self.heads * self.head_width, self.kv_heads * self.head_width
        matrices = {"q": (D, Q), "k": (D, K), "v": (D, K), "o": (D, Q), "gate": (D, F), "up": (D, F), "down": (D, F)}
        norms = {name: (D,) for name in ("before_attention", "after_attention", "before_mlp", "after_mlp")}
        outside = {"embedding": (D, self.vocab), "head": (D, self.vocab), "norm": (D,)}
        return {name: (N, *shape) for name, shape in (matrices | norms).items()} | outside

    @property
    def num_params(self) -> int:
        return sum(map(math.prod, self.shapes().values()))


def lower_train_step(model: Llama, sequences: int, devices: Sequence[jax.Device]):
    """The step (state, tokens_BxW) to (state, loss, norm of the gradients), lowered for devices of one slice.

    Args:
      model: sizes.
      sequences: in a step, over all devices.
      devices: all of them work on their own sequences and hold their part of the parameters.
    """
    mesh = jax.make_mesh((len(devices),), (AXIS,), devices=devices)
    # Every parameter is cut along d_model, norms' scales too.
    specs = {name: PartitionSpec(*_before_d(name, shape), AXIS) for name, shape in model.shapes().items()}
    state_specs = {"params": specs, "mean": specs, "square": specs, "count": PartitionSpec()}
    step = jax.shard_map(
        functools.partial(_train_step, model, devices[0].device_kind),
        mesh=mesh,
        in_specs=(state_specs, PartitionSpec(AXIS)),
        out_specs=(state_specs, PartitionSpec(), PartitionSpec()),
        check_vma=False,
    )

    def described(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    arrays = {name: described(shape, jnp.float32, specs[name]) for name, shape in model.shapes().items()}
    state = {"params": arrays, "mean": arrays, "square": arrays, "count": described((), jnp.int32, PartitionSpec())}
    tokens_BxW = described((sequences, model.length + 1), jnp.int32, PartitionSpec(AXIS))
    return jax.jit(step, donate_argnums=0).lower(state, tokens_BxW)


def _before_d(name: str, shape: tuple[int, ...]) -> tuple[None, ...]:
    """One None for every axis in front of d_model: that of layers, if there is one."""
    return () if name in ("embedding", "head", "norm") else (None,)


def _train_step(model: Llama, device_kind: str, state: dict, tokens_BxW: jax.Array):
    loss, grads = jax.value_and_grad(functools.partial(_loss, model, device_kind))(state["params"], tokens_BxW)
    grads = jax.tree.map(lambda g: g.astype(jnp.float32) / jax.lax.axis_size(AXIS), grads)
    norm = jnp.sqrt(jax.lax.psum(sum(jnp.sum(g * g) for g in jax.tree.leaves(grads)), AXIS))
    clip = jnp.minimum(1, 1 / (norm + 1e-6))
    return adamw(state, jax.tree.map(lambda g: g * clip, grads)), jax.lax.pmean(loss, AXIS), norm


def adamw(state: dict, grads: dict) -> dict:
    """The state after a step: `params`, moments `mean` and `square`, each in its dtype, and the steps' `count`."""
    count = state["count"] + 1

    def update(x, mean, square, g):
        mean = BETAS[0] * mean + (1 - BETAS[0]) * g
        square = BETAS[1] * square + (1 - BETAS[1]) * g * g
        direction = mean / (1 - BETAS[0] ** count) / (jnp.sqrt(square / (1 - BETAS[1] ** count)) + EPSILON)
        # The step's count makes float32 of what is bfloat16 otherwise.
        return tuple(y.astype(x.dtype) for y in (x - LEARNING_RATE * (direction + WEIGHT_DECAY * x), mean, square))

    updated = jax.tree.map(update, state["params"], state["mean"], state["square"], grads)
    params, mean, square = ({name: three[i] for name, three in updated.items()} for i in range(3))
    return {"params": params, "mean": mean, "square": square, "count": count}


def _gather(x: jax.Array) -> jax.Array:
    """A shard along d_model, its first axis here, to the whole in bfloat16; its gradient is summed and scattered."""
    return jax.lax.all_gather(x.astype(jnp.bfloat16), AXIS, axis=0, tiled=True)


def _loss(model: Llama, device_kind: str, params: dict, tokens_BxW: jax.Array) -> jax.Array:
    params = dict(params)
    head_DxV, embedding_DxV, norm_D = (_gather(params.pop(name)) for name in ("head", "embedding", "norm"))
    h_BxLxD = embedding_DxV.T[tokens_BxW[:, :-1]]

    # Nothing of a layer is kept but its input.
    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable)
    def layer(h_BxLxD, shards):
        return _layer(model, device_kind, h_BxLxD, jax.tree.map(_gather, shards)), None

    h_BxLxD, _ = jax.lax.scan(layer, h_BxLxD, params)
    h_BxLxD = _normalized(h_BxLxD, norm_D)
    block = min(LOSS_BLOCK, h_BxLxD.shape[0] * h_BxLxD.shape[1])
    h_NxPxD, targets_NxP = h_BxLxD.reshape(-1, block, model.d_model), tokens_BxW[:, 1:].reshape(-1, block)

    @jax.checkpoint
    def nats_of_block(h_PxD, targets_P):
        logits_PxV = jnp.matmul(h_PxD, head_DxV, preferred_element_type=jnp.float32)
        is_target_PxV = jnp.arange(model.vocab) == targets_P[:, None]
        target_P = jnp.sum(jnp.where(is_target_PxV, logits_PxV, 0), axis=-1)
        return jax.nn.logsumexp(logits_PxV, axis=-1) - target_P

    _, nats_NxP = jax.lax.scan(lambda _, xs: (None, nats_of_block(*xs)), None, (h_NxPxD, targets_NxP))
    return jnp.mean(nats_NxP)


def _layer(model: Llama, device_kind: str, h_BxLxD: jax.Array, weights: dict) -> jax.Array:
    B, L, _ = h_BxLxD.shape
    n_BxLxD = _normalized(h_BxLxD, weights["before_attention"])
    q_BxLxHxK, k_BxLxGxK, v_BxLxGxK = (
        (n_BxLxD @ weights[name]).reshape(B, L, -1, model.head_width) for name in ("q", "k", "v")
    )
    q_BxLxHxK, k_BxLxGxK = rotated(q_BxLxHxK), rotated(k_BxLxGxK)
    k_BxLxHxK, v_BxLxHxK = (jnp.repeat(x, model.heads // model.kv_heads, axis=2) for x in (k_BxLxGxK, v_BxLxGxK))
    a_BxLxHxK = causal_attention(q_BxLxHxK, k_BxLxHxK, v_BxLxHxK, device_kind=device_kind)
    a_BxLxD = a_BxLxHxK.reshape(B, L, -1) @ weights["o"].T
    h_BxLxD = h_BxLxD + _normalized(a_BxLxD, weights["after_attention"])
    n_BxLxD = _normalized(h_BxLxD, weights["before_mlp"])
    m_BxLxD = (jax.nn.silu(n_BxLxD @ weights["gate"]) * (n_BxLxD @ weights["up"])) @ weights["down"].T
    return h_BxLxD + _normalized(m_BxLxD, weights["after_mlp"])


def _normalized(x: jax.Array, scale_D: jax.Array) -> jax.Array:
    """RMSNorm, in float32."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-5)
    return (wide * scale_D).astype(x.dtype)


def rotated(x_BxLxHxK: jax.Array) -> jax.Array:
    """Rotary embedding of positions 0, 1, ..."""
    half = x_BxLxHxK.shape[-1] // 2
    angle_LxK = jnp.arange(x_BxLxHxK.shape[1])[:, None] * 10_000.0 ** (-jnp.arange(half) / half)
    cos, sin = (f(angle_LxK)[:, None, :] for f in (jnp.cos, jnp.sin))
    first, second = jnp.split(x_BxLxHxK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BxLxHxK.dtype)
