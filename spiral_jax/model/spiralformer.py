"""Every model of the papers as one module tree: embed, prelude, loop, coda, head (SPEC sections 1 to 3)."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from spiral_jax.model.config import Level, ModelConfig
from spiral_jax.model.neox import ACTIVATIONS, Backend, Stack, layer_norm, param_dtype, small_init
from spiral_jax.model.resolution import at_least_float32, down_scale, up_scale
from spiral_jax.model.topology import Memory, empty_memory, next_state, route


class IterationLinear(nn.Module):
    """Declares a Linear of each iteration, stacked on a leading axis, and returns the arrays.

    The loop hands iteration t its slice, so that a scan over iterations can take the slices as inputs while the
    core's parameters are broadcast (one lifted scan cannot do both to one collection).
    """

    config: ModelConfig
    num_iterations: int
    features: int
    out_axis: str
    use_bias: bool
    kernel_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        """Returns `{"kernel": [T, D, features], "bias": [T, features]}`."""
        T, dtype = self.num_iterations, param_dtype(self.config)
        kernel_init = nn.with_logical_partitioning(self.kernel_init, ("iterations", "embed", self.out_axis))
        arrays = {"kernel": self.param("kernel", kernel_init, (T, self.config.d_model, self.features), dtype)}
        if self.use_bias:
            bias_init = nn.with_logical_partitioning(nn.initializers.zeros, ("iterations", self.out_axis))
            arrays["bias"] = self.param("bias", bias_init, (T, self.features), dtype)
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
        self.final_norm = layer_norm(c)
        self.head = Head(c)

        if c.topology == "mesh":
            # Random, not zero: slots with equal routers would never part.
            init = nn.initializers.normal((2 / (c.num_slots * c.d_model)) ** 0.5)
            self.write_routers = IterationLinear(c, c.num_iterations + 1, c.num_slots, "slots", True, init)
            self.read_routers = IterationLinear(c, c.num_iterations + 1, c.num_slots, "slots", True, init)
        # Scorers and allocators start at zero, which is the mean and the uniform operator.
        zeros = nn.initializers.zeros
        coarse = {str(k): (level.chunk, count) for k, (level, count) in enumerate(c.runs) if level.chunk > 1}
        if c.pooling == "self_aggregation":
            self.scorers = {k: IterationLinear(c, n, 1, "score", False, zeros) for k, (_, n) in coarse.items()}
        if c.allocation == "learned":
            self.allocators = {k: IterationLinear(c, n, g, "place", True, zeros) for k, (g, n) in coarse.items()}

    def __call__(self, tokens_BxL: jax.Array) -> jax.Array:
        """Logits [B, L, V] at every position, at least float32."""
        h_BxLxD, _ = self.hidden(tokens_BxL)
        return unembed(h_BxLxD, self.head())

    def hidden(self, tokens_BxL: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Everything before the head.

        Returns:
          h_BxLxD, the final LayerNorm's output, and metrics: for topology `mesh`, `router_entropy` [T + 1, 2], the
          mean entropy in nats of the write and read routers of the transition and each iteration.
        """
        c = self.config
        h_emb_BxLxD = self._pin(self.embed(tokens_BxL))
        h_BxLxD = self.prelude(h_emb_BxLxD)
        memory, entropies = Memory((), ()), []
        if c.topology == "mesh":
            routers = {"write": self.write_routers(), "read": self.read_routers()}
            memory = empty_memory(c.num_slots, h_emb_BxLxD)
            h_BxLxD, memory, entropy_2 = self._light(route)(slice_of(routers, 0), h_BxLxD, h_BxLxD, memory)
            entropies.append(entropy_2[None])
        h0_BxLxD = h_BxLxD

        t = 0
        for k, (level, count) in enumerate(c.runs):
            steps = {}
            if c.topology == "mesh":
                steps["router"] = slice_of(routers, slice(t + 1, t + 1 + count))
            if level.chunk > 1 and c.pooling == "self_aggregation":
                steps["scorer"] = self.scorers[str(k)]()
            if level.chunk > 1 and c.allocation == "learned":
                steps["allocator"] = self.allocators[str(k)]()
            if c.scans(count):
                h_BxLxD, memory, entropy = self._scan(level, count, steps, h_BxLxD, memory, h0_BxLxD, h_emb_BxLxD)
                entropies.append(entropy)
            else:
                for i in range(count):
                    core = self.core if c.shared_core else self.cores[t + i]
                    h_BxLxD, memory, entropy = self._iterate(
                        core, level, slice_of(steps, i), h_BxLxD, memory, h0_BxLxD, h_emb_BxLxD
                    )
                    entropies.append(entropy)
            t += count

        h_BxLxD = self.final_norm(self.coda(h_BxLxD))
        return h_BxLxD, {"router_entropy": jnp.concatenate(entropies)} if c.topology == "mesh" else {}

    def _iterate(self, core, level: Level, step: dict, h_BxLxD, memory: Memory, h0_BxLxD, h_emb_BxLxD, at=None):
        """One iteration: (h(t), memory) to (h(t+1), memory, entropies [1, 2])."""
        e_BxLxD = self._refine(core, level, step, h_BxLxD)
        if self.config.topology == "mesh":
            h_BxLxD, memory, entropy_2 = self._light(route)(step["router"], h_BxLxD, e_BxLxD, memory, at)
            return self._pin(h_BxLxD), memory, entropy_2[None]
        h_BxLxD = next_state(self.config.topology, e_BxLxD, h_BxLxD, h0_BxLxD, h_emb_BxLxD)
        return self._pin(h_BxLxD), memory, jnp.zeros((1, 2))

    def _refine(self, core: Callable, level: Level, step: dict, h_BxLxD: jax.Array) -> jax.Array:
        """e(t): down-scale, core, up-scale and shift; at full resolution the core alone."""
        if level.chunk == 1:
            return core(h_BxLxD)
        length = h_BxLxD.shape[1]
        if level.num_chunks(length) == 0:
            if self.is_initializing():
                core(h_BxLxD)  # its parameters exist whatever the length
            return jnp.zeros_like(h_BxLxD)
        down = self._light(lambda h, scorer: down_scale(h, level, scorer))
        up = self._light(lambda z, allocator: up_scale(z, level, length, allocator, self.config.update_scale))
        z_BxNxD = self._pin(down(h_BxLxD, step.get("scorer")))
        return self._pin(up(core(z_BxNxD), step.get("allocator")))

    def _scan(self, level: Level, count: int, steps: dict, h_BxLxD, memory: Memory, h0_BxLxD, h_emb_BxLxD):
        """`count` iterations of one level under one scan: the core broadcast, what is each iteration's own scanned."""
        # The scan's carry cannot grow: its writes go to entries reserved for them. What was written before is a
        # constant of the scan, so that it is not stored again for every iteration.
        before = len(memory.values)
        reserved = Memory((), ())
        if self.config.topology == "mesh":
            reserved = Memory((jnp.zeros_like(h_BxLxD),) * count, (jnp.zeros_like(memory.writes[0]),) * count)

        def body(core, carry, step):
            h_BxLxD, written, t = carry
            both = Memory(memory.values + written.values, memory.writes + written.writes)
            h_BxLxD, both, entropy_1x2 = self._iterate(
                core, level, step, h_BxLxD, both, h0_BxLxD, h_emb_BxLxD, at=before + t
            )
            return (h_BxLxD, Memory(both.values[before:], both.writes[before:]), t + 1), entropy_1x2[0]

        scan = nn.scan(body, variable_broadcast="params", split_rngs={"params": False}, length=count)
        (h_BxLxD, written, _), entropy_Tx2 = scan(self.core, (h_BxLxD, reserved, jnp.int32(0)), steps)
        return h_BxLxD, Memory(memory.values + written.values, memory.writes + written.writes), entropy_Tx2

    def _pin(self, h_BxLxD: jax.Array) -> jax.Array:
        return self.backend.constrain(h_BxLxD, *ACTIVATIONS)

    def _light(self, function: Callable) -> Callable:
        """Cheap elementwise work in float32: under remat it is recomputed rather than kept."""
        return function if self.config.remat == "keep_all" else jax.checkpoint(function)


class Embedding(nn.Module):
    config: ModelConfig
    backend: Backend

    @nn.compact
    def __call__(self, tokens_BxL: jax.Array) -> jax.Array:
        """Embeddings times sqrt(d), [B, L, D] in the compute dtype."""
        c = self.config
        init = nn.with_logical_partitioning(small_init(c), ("vocab", "embed"))
        embedding_VxD = self.param("embedding", init, (c.vocab_size, c.d_model), param_dtype(c))
        # Looked up in a table sharded over its width, rows would come out in pieces, and the compiler would replicate
        # the whole batch to put them together.
        embedding_VxD = self.backend.constrain(embedding_VxD, "vocab", "activation_embed")
        return (jnp.take(embedding_VxD, tokens_BxL, axis=0) * c.d_model**0.5).astype(c.dtype)


class Head(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self) -> jax.Array:
        """The output projection's kernel [D, V]: whoever wants logits decides for how many positions at a time."""
        c = self.config
        init = nn.with_logical_partitioning(small_init(c), ("embed", "vocab"))
        return self.param("kernel", init, (c.d_model, c.vocab_size), param_dtype(c))


def unembed(h_BxLxD: jax.Array, kernel_DxV: jax.Array) -> jax.Array:
    """Logits [B, L, V]: inputs in the compute dtype, sums and result at least float32."""
    kernel_DxV, dtype = kernel_DxV.astype(h_BxLxD.dtype), at_least_float32(h_BxLxD.dtype)
    return jnp.einsum("bld,dv->blv", h_BxLxD, kernel_DxV, preferred_element_type=dtype)


def slice_of(tree, index):
    """The same index into the leading axis of every leaf."""
    return jax.tree.map(lambda x: x[index], tree)
