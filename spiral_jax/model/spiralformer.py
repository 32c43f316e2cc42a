"""Every model of the papers as one module tree: embed, prelude, loop, coda, head (docs/spec.md sections 1 to 3)."""

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from spiral_jax.model.backend import Backend
from spiral_jax.model.chunks import Level
from spiral_jax.model.config import ModelConfig
from spiral_jax.model.iteration import advance, core_input, down_scale, enter, up_scale
from spiral_jax.model.neox import ACTIVATIONS, LayerNorm, Stack, named_axes, param_dtype, small_init
from spiral_jax.model.operators import Arrays, Linear, at_least_float32
from spiral_jax.model.topology import States


class Linears(nn.Module):
    """The parameters of declared Linears: of one iteration, or of the entry into the loop.

    Attributes:
      config: the architecture.
      group: `entry` or `steps_{t}`, as in `Declared.group`.
    """

    config: ModelConfig
    group: str

    @nn.compact
    def __call__(self) -> dict[str, dict[str, jax.Array]]:
        """`{name: {"kernel": [*inputs, *outputs], "bias": [*outputs]}}`."""
        declared = [found for found in self.config.operators.declared() if found.group == self.group]
        return {found.name: LinearArrays(self.config, found.linear, name=found.name)() for found in declared}


class LinearArrays(nn.Module):
    """The parameters of one declared Linear."""

    config: ModelConfig
    linear: Linear

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        linear, dtype = self.linear, param_dtype(self.config)
        kernel_init = named_axes(linear.init, *linear.axes(self.config.d_model))
        arrays = {"kernel": self.param("kernel", kernel_init, linear.kernel_shape, dtype)}
        if linear.bias:
            bias_init = named_axes(nn.initializers.zeros, *linear.out_axes)
            arrays["bias"] = self.param("bias", bias_init, linear.outputs, dtype)
        return arrays


class SpiralFormer(nn.Module):
    """A causal language model of any family.

    `model.apply({"params": params}, tokens_BxL)` gives float32 logits [B, L, V]; `method="hidden"` stops before
    the head, where training and scoring take over so that logits never exist for all positions at once.

    Attributes:
      config: the architecture.
      backend: attention and sharding constraints of the machine it runs on.
    """

    config: ModelConfig
    backend: Backend = Backend()

    def setup(self):
        c = self.config
        self.embed = Embedding(c, self.backend)
        self.prelude = Stack(c, c.prelude_layers, self.backend)
        if c.shared_core:
            self.core = Stack(c, c.core_layers, self.backend)
        else:
            self.cores = [Stack(c, c.core_layers, self.backend) for _ in c.chunks]
        self.coda = Stack(c, c.coda_layers, self.backend)
        self.final_norm = LayerNorm(c, self.backend)
        self.head = Head(c)

        # Every iteration has its own, so that weights can move between schedules; a scan stacks those that it runs.
        self.entry = Linears(c, "entry")
        self.steps = [Linears(c, f"steps_{t}") for t in range(c.num_iterations)]

    def __call__(self, tokens_BxL: jax.Array) -> jax.Array:
        """Logits [B, L, V] at every position, at least float32."""
        h_BxLxD, _ = self.hidden(tokens_BxL)
        return unembed(h_BxLxD, self.head())

    def hidden(self, tokens_BxL: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Everything before the head.

        Returns:
          h_BxLxD, the final LayerNorm's output, and what the topology records. Its arrays have an axis in front for
          the entry (if something is recorded there) and the iterations: for `mesh`, `router_entropy` [T + 1, 2] is the
          mean entropy in nats of the write and read routers of the transition and of each iteration.
        """
        c = self.config
        h_emb_BxLxD = self._pin(self.embed(tokens_BxL))
        h_BxLxD = self.prelude(h_emb_BxLxD)
        states, metrics = self._light(functools.partial(enter, c))(self.entry(), h_emb_BxLxD, h_BxLxD)
        recorded = [_with_axis(metrics)]

        t = 0
        for level, count in c.runs:
            steps = [linears() for linears in self.steps[t : t + count]]
            if c.scans(count):
                states, metrics = self._scan(level, steps, states)
                recorded.append(metrics)
            else:
                for i, arrays in enumerate(steps):
                    core = self.core if c.shared_core else self.cores[t + i]
                    states, metrics = self._iterate(core, level, arrays, states)
                    recorded.append(_with_axis(metrics))
            t += count

        h_BxLxD = self.final_norm(self.coda(states.h_BxLxD))
        names = dict.fromkeys(name for metrics in recorded for name in metrics)
        return h_BxLxD, {name: jnp.concatenate([m[name] for m in recorded if name in m]) for name in names}

    def _iterate(self, core: Callable, level: Level, arrays: Arrays, states: States):
        """One iteration: from h(t) to h(t+1), and what the topology records."""
        h_BxLxD = self._light(functools.partial(core_input, self.config, level))(arrays, states)
        e_BxLxD = self._refine(core, level, arrays, h_BxLxD)
        states, metrics = self._light(functools.partial(advance, self.config, level))(arrays, states, e_BxLxD)
        return states._replace(h_BxLxD=self._pin(states.h_BxLxD)), metrics

    def _refine(self, core: Callable, level: Level, arrays: Arrays, h_BxLxD: jax.Array) -> jax.Array:
        """e(t): down-scale, core, up-scale and shift; at full resolution the core alone."""
        if level.chunk == 1:
            return core(h_BxLxD)
        length = h_BxLxD.shape[1]
        if level.num_chunks(length) == 0:
            if self.is_initializing():
                core(h_BxLxD)  # so that its parameters exist whatever the length
            return jnp.zeros_like(h_BxLxD)
        down = self._light(functools.partial(down_scale, self.config, level))
        up = self._light(functools.partial(up_scale, self.config, level, length=length))
        z_BxNxD = self._pin(down(arrays, h_BxLxD))
        return self._pin(up(arrays, core(z_BxNxD)))

    def _scan(self, level: Level, steps: list[Arrays], states: States):
        """Neighbouring iterations of one level as one scan over their own arrays, with the core's broadcast."""
        # The carry of a scan cannot grow: what iterations keep goes to places reserved for it. What was kept before is
        # a constant of the scan, so that it is not stored again for every iteration.
        count, before = len(steps), states.kept
        own = jax.eval_shape(functools.partial(advance, self.config, level), steps[0], states, states.h_BxLxD)
        kept = own[0].kept[len(before) :]
        reserved = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (kept,) * count)

        def body(core, carry, arrays):
            h_BxLxD, written, t = carry
            now = states._replace(h_BxLxD=h_BxLxD, kept=(*before, *itertools.chain(*written)))
            now, metrics = self._iterate(core, level, arrays, now)
            new = now.kept[len(now.kept) - len(kept) :]
            written = tuple(
                jax.tree.map(functools.partial(jnp.where, t == i), new, old) for i, old in enumerate(written)
            )
            return (now.h_BxLxD, written, t + 1), metrics

        stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *steps)
        scan = nn.scan(
            body,
            variable_broadcast="params",
            split_rngs={"params": False},
            length=count,
            check_constancy_invariants=self.is_initializing(),  # a body that makes parameters has to be traced twice
        )
        (h_BxLxD, written, _), metrics = scan(self.core, (states.h_BxLxD, reserved, jnp.int32(0)), stacked)
        return states._replace(h_BxLxD=h_BxLxD, kept=(*before, *itertools.chain(*written))), metrics

    def _pin(self, h_BxLxD: jax.Array) -> jax.Array:
        return self.backend.constrain(h_BxLxD, *ACTIVATIONS)

    def _light(self, function: Callable) -> Callable:
        """Marks cheap elementwise work in float32, which is computed again under remat rather than kept."""
        return function if self.config.remat == "keep_all" else jax.checkpoint(function)


class Embedding(nn.Module):
    """The token embeddings, times sqrt(d): h_emb."""

    config: ModelConfig
    backend: Backend

    @nn.compact
    def __call__(self, tokens_BxL: jax.Array) -> jax.Array:
        """h_emb_BxLxD in the compute dtype."""
        c = self.config
        init = named_axes(small_init(c), "vocab", "embed")
        embedding_VxD = self.param("embedding", init, (c.vocab_size, c.d_model), param_dtype(c))
        # Looked up in a table sharded over its width, rows would come out in pieces, and the compiler would replicate
        # the whole batch to put them together.
        embedding_VxD = self.backend.constrain(embedding_VxD, "vocab", "activation_embed")
        return (jnp.take(embedding_VxD, tokens_BxL, axis=0) * c.d_model**0.5).astype(c.dtype)


class Head(nn.Module):
    """The output projection, untied and without bias."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> jax.Array:
        """kernel_DxV: whoever wants logits decides for how many positions at a time."""
        c = self.config
        init = named_axes(small_init(c), "embed", "vocab")
        return self.param("kernel", init, (c.d_model, c.vocab_size), param_dtype(c))


def unembed(h_BxLxD: jax.Array, kernel_DxV: jax.Array) -> jax.Array:
    """Logits [B, L, V]: a product in the compute dtype, with sums and result at least float32."""
    kernel_DxV, dtype = kernel_DxV.astype(h_BxLxD.dtype), at_least_float32(h_BxLxD.dtype)
    return jnp.einsum("bld,dv->blv", h_BxLxD, kernel_DxV, preferred_element_type=dtype)


def _with_axis(metrics: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """What one iteration recorded, with an axis of iterations in front."""
    return {name: value[None] for name, value in metrics.items()}


def boxed_params(config: ModelConfig) -> Any:
    """Shapes and dtypes of a model's parameters, boxed with the logical names of their axes."""
    tokens_1x1 = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(SpiralFormer(config).init, jax.eval_shape(lambda: jax.random.key(0)), tokens_1x1)["params"]


def abstract_params(config: ModelConfig) -> Any:
    """Shapes and dtypes of a model's parameters."""
    return nn.unbox(boxed_params(config))
