"""The GPT-NeoX layer of Pythia, and a stack of them under one scan (docs/spec.md section 1)."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from spiral_jax.model.attention import ATTENTION
from spiral_jax.model.backend import Backend
from spiral_jax.model.operators import Linear, at_least_float32

if TYPE_CHECKING:
    from spiral_jax.model.config import ModelConfig, Remat

ACTIVATIONS = ("batch", "length", "activation_embed")


def small_init(config: "ModelConfig", divide_by: float = 1.0) -> nn.initializers.Initializer:
    """Normal with std sqrt(2 / (5 d)) / divide_by (docs/spec.md section 5)."""
    return nn.initializers.normal((2 / (5 * config.d_model)) ** 0.5 / divide_by)


def param_dtype(config: "ModelConfig") -> jnp.dtype:
    return at_least_float32(config.dtype)


def named_axes(init: Callable[..., jax.Array], *names: str | None) -> Callable[..., Any]:
    """`init` whose parameter carries the logical names of its axes, which `parallel.mesh.RULES` maps to the mesh."""
    return nn.with_logical_partitioning(init, names)


def rotary_tables(length: int, config: "ModelConfig") -> tuple[jax.Array, jax.Array]:
    """cos and sin of the rotary angles at positions 0..L-1, each [L, rotary_dims / 2], at least float32."""
    half, dtype = config.rotary_dims // 2, at_least_float32(config.dtype)
    frequency_F = config.rotary_base ** -(jnp.arange(half, dtype=dtype) / max(half, 1))
    angle_LxF = jnp.arange(length, dtype=dtype)[:, None] * frequency_F
    return jnp.cos(angle_LxF), jnp.sin(angle_LxF)


@jax.custom_vjp
def apply_rotary(x_BxLxHxK: jax.Array, cos_LxF: jax.Array, sin_LxF: jax.Array) -> jax.Array:
    """Rotates the pairs (j, j + F) of the first 2 F dimensions of every head and passes the rest through.

    Written as shifts of whole heads: arrays F wide would be padded to the width of a TPU's registers, sixteenfold for
    heads of 64.
    """
    F, K = cos_LxF.shape[-1], x_BxLxHxK.shape[-1]

    def wide(first_LxF, second_LxF, beyond: float):
        """A table [L, 1, K] for whole heads: first F dimensions, second F dimensions, and those beyond."""
        table = jnp.concatenate([first_LxF, second_LxF], axis=-1)
        return jnp.pad(table, [(0, 0)] * (table.ndim - 1) + [(0, K - 2 * F)], constant_values=beyond)[..., None, :]

    def shifted(by: int):
        zero = jnp.zeros((), x_BxLxHxK.dtype)
        return jax.lax.pad(x_BxLxHxK, zero, [(0, 0, 0)] * (x_BxLxHxK.ndim - 1) + [(by, -by, 0)])

    none_LxF = jnp.zeros_like(sin_LxF)
    rotated = x_BxLxHxK * wide(cos_LxF, cos_LxF, 1.0)
    rotated += shifted(-F) * wide(-sin_LxF, none_LxF, 0.0) + shifted(F) * wide(none_LxF, sin_LxF, 0.0)
    return rotated.astype(x_BxLxHxK.dtype)


def _apply_rotary_forward(x_BxLxHxK, cos_LxF, sin_LxF):
    return apply_rotary(x_BxLxHxK, cos_LxF, sin_LxF), (cos_LxF, sin_LxF)


def _apply_rotary_backward(tables, gradient_BxLxHxK):
    # The gradient is rotated back; the angles are constants.
    cos_LxF, sin_LxF = tables
    return apply_rotary(gradient_BxLxHxK, cos_LxF, -sin_LxF), jnp.zeros_like(cos_LxF), jnp.zeros_like(sin_LxF)


apply_rotary.defvjp(_apply_rotary_forward, _apply_rotary_backward)


class LayerNorm(nn.Module):
    """LayerNorm with scale and bias."""

    config: "ModelConfig"
    backend: Backend

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array) -> jax.Array:
        """x_BxLxD in the compute dtype."""
        d, dtype = self.config.d_model, param_dtype(self.config)
        scale_D = self.param("scale", named_axes(nn.initializers.ones, "embed"), (d,), dtype)
        bias_D = self.param("bias", named_axes(nn.initializers.zeros, "embed"), (d,), dtype)
        normed_BxLxD = self.backend.layer_norm(x_BxLxD, scale_D, bias_D, self.config.layer_norm_epsilon)
        return normed_BxLxD.astype(self.config.dtype)


def layer_linears(config: "ModelConfig") -> dict[str, Linear]:
    """The four Linears of a layer, of which parameters, counts, FLOPs, sharding and exported shapes are made."""
    d, F, H, K = config.d_model, config.d_ff, config.num_heads, config.head_width
    inner, output = small_init(config), small_init(config, divide_by=max(2 * config.unrolled_layers, 1) ** 0.5)
    # Axis order [heads, q|k|v, width] is the exported row order, and lets the heads be sharded.
    return {
        "qkv": Linear(d, (H, 3, K), ("embed",), ("heads", "qkv", "head_width"), init=inner, is_matrix=True),
        "out": Linear((H, K), d, ("heads", "head_width"), ("embed",), init=output, is_matrix=True),
        "mlp_up": Linear(d, F, ("embed",), ("mlp",), init=inner, is_matrix=True),
        "mlp_down": Linear(F, d, ("mlp",), ("embed",), init=output, is_matrix=True),
    }


def layer_weights(config: "ModelConfig") -> int:
    """Numbers in a layer's matrices: 12 d^2."""
    return sum(linear.weights for linear in layer_linears(config).values())


def layer_parameters(config: "ModelConfig") -> int:
    """Numbers in a layer: matrices, biases and two LayerNorms."""
    return sum(linear.parameters for linear in layer_linears(config).values()) + 2 * 2 * config.d_model


class Layer(nn.Module):
    """x + Attn(LN1(x)) + MLP(LN2(x)): parallel residual, fused QKV, exact GELU, biases everywhere."""

    config: "ModelConfig"
    backend: Backend

    def _linear(self, name: str) -> nn.DenseGeneral:
        linear = layer_linears(self.config)[name]
        return nn.DenseGeneral(
            linear.outputs,
            axis=tuple(range(-len(linear.inputs), 0)),
            use_bias=linear.bias,
            dtype=self.config.dtype,
            param_dtype=param_dtype(self.config),
            dot_general=self.backend.dot_general,
            kernel_init=named_axes(linear.init, *linear.in_axes, *linear.out_axes),
            bias_init=named_axes(nn.initializers.zeros, *linear.out_axes),
            name=name,
        )

    @nn.compact
    def __call__(self, h_BxLxD: jax.Array, rotary: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        """Returns (next h_BxLxD, None), the carry and output of a scan over layers."""
        if self.config.unroll:
            # Without it, what layers add to their inputs would be summed again for each layer after them.
            h_BxLxD = jax.lax.optimization_barrier(h_BxLxD)
        x_BxLxD = LayerNorm(self.config, self.backend, name="attention_norm")(h_BxLxD)
        qkv_BxLxHx3xK = self._linear("qkv")(x_BxLxD)
        q_BxLxHxK, k_BxLxHxK, v_BxLxHxK = (
            self.backend.constrain(qkv_BxLxHx3xK[..., i, :], "batch", "length", "heads", "head_width") for i in range(3)
        )
        out_BxLxHxK = self.backend.attention(
            apply_rotary(q_BxLxHxK, *rotary), apply_rotary(k_BxLxHxK, *rotary), v_BxLxHxK
        )
        attention_BxLxD = self._linear("out")(out_BxLxHxK)

        x_BxLxD = LayerNorm(self.config, self.backend, name="mlp_norm")(h_BxLxD)
        up_BxLxF = self._linear("mlp_up")(x_BxLxD)
        up_BxLxF = self.backend.gelu(self.backend.constrain(up_BxLxF, "batch", "length", "mlp"))
        mlp_BxLxD = self._linear("mlp_down")(up_BxLxF)

        return self.backend.constrain(h_BxLxD + attention_BxLxD + mlp_BxLxD, *ACTIVATIONS), None


class Stack(nn.Module):
    """`num_layers` layers with parameters stacked on a leading axis, run by one scan: compile time is that of one."""

    config: "ModelConfig"
    num_layers: int
    backend: Backend

    @nn.compact
    def __call__(self, h_BxLxD: jax.Array) -> jax.Array:
        if self.num_layers == 0:
            return h_BxLxD
        layer = Layer
        if self.backend.gather is not None:
            layer = nn.map_variables(Layer, "params", trans_in_fn=self.backend.gather)
        if self.config.remat != "keep_all" or self.backend.gather is not None:
            # prevent_cse guards against what a scan cannot do anyway, and costs fusions. One layer is not scanned.
            is_loop = self.num_layers > 1 and not self.config.unroll
            layer = nn.remat(layer, policy=remat_policy(self.config.remat), prevent_cse=not is_loop)
        scan = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.num_layers,
            unroll=self.num_layers if self.config.unroll else 1,
            metadata_params={nn.PARTITION_NAME: "layers"},
            check_constancy_invariants=self.is_initializing(),  # a layer is then traced twice, which seeds count on
        )
        h_BxLxD, _ = scan(self.config, self.backend, name="layers")(
            h_BxLxD, rotary_tables(h_BxLxD.shape[1], self.config)
        )
        return h_BxLxD


def remat_policy(remat: "Remat") -> Callable:
    """What `jax.checkpoint` may keep of a layer beside its input under a remat setting; never gathered parameters."""
    policies = jax.checkpoint_policies
    attention = policies.save_only_these_names(ATTENTION)
    return {
        "keep_all": lambda primitive, *_, **params: not _gathers(primitive, params),
        "keep_products": policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, attention),
        "keep_attention": attention,
        "keep_inputs": policies.nothing_saveable,
    }[remat]


def _gathers(primitive, params: dict) -> bool:
    """Whether an operation is `all_gather`, or a function with a gradient of its own or a `shard_map` that calls it."""
    inner = params.get("call_jaxpr", params.get("jaxpr"))
    called = [] if inner is None else inner.eqns
    return primitive is jax.lax.all_gather_p or any(_gathers(eqn.primitive, eqn.params) for eqn in called)
