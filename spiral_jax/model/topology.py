"""How an iteration's update e(t) becomes the next state h(t+1) (docs/spec.md section 2).

A topology never sees chunks: the down-scale, the core, the up-scale and the right shift are done when it runs, and
every array is [B, L, D]. Its one rule: the state at token i may use arrays at token i only. Everything that mixes
tokens is in the core and in the chunk operators, where the right shift keeps it causal. So the pass of one token at a
time is the same function, and decoding has nothing of a topology to remember.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from spiral_jax.model.chunks import Level
from spiral_jax.model.operators import Bound, Linear, Operator, at_least_float32
from spiral_jax.registry import Registry


class States(NamedTuple):
    """The token-level states on their way through the loop.

    Attributes:
      h_BxLxD: h(t).
      h0_BxLxD: h(0), what the loop starts from.
      h_emb_BxLxD: h_emb, the scaled embeddings.
      kept: what the topology has kept so far, one pytree after the other.
    """

    h_BxLxD: jax.Array
    h0_BxLxD: jax.Array
    h_emb_BxLxD: jax.Array
    kept: tuple[Any, ...] = ()


class Update(NamedTuple):
    """What a topology makes of an iteration.

    Attributes:
      h_BxLxD: the next state.
      kept: pytrees to add to `States.kept`, as many of the same structure from every iteration.
      metrics: small arrays to record, at least float32, of every iteration the same names and shapes. The names are
        none that a row of metrics.jsonl has already.
    """

    h_BxLxD: jax.Array
    kept: tuple[Any, ...] = ()
    metrics: Mapping[str, jax.Array] = {}


class Topology(Operator):
    """Base of all topologies; a subclass gives `next_state`, and with parameters `linears`.

    Results may have any dtype: they are cast to that of the states.

    Attributes:
      fields: the fields of ModelConfig that only this topology reads; they are exported with it.
      scans: whether neighbouring iterations of one level may be one scan. In a scan `States.kept` has zeros in place of
        what its later iterations will keep, so a topology for which such zeros count must say False.
    """

    fields: ClassVar[tuple[str, ...]] = ()
    scans: ClassVar[bool] = True

    def next_state(self, states: States, e_BxLxD: jax.Array, linears: Bound) -> jax.Array:
        """h(t+1).

        Args:
          states: before the iteration.
          e_BxLxD: its update e(t).
          linears: what `linears` declares, as functions.
        """
        raise NotImplementedError

    def update(self, states: States, e_BxLxD: jax.Array, linears: Bound) -> Update:
        """`next_state`, and what is kept and recorded: for topologies with a memory of their own."""
        return Update(self.next_state(states, e_BxLxD, linears))

    def core_input(self, states: States, linears: Bound) -> jax.Array:
        """What iteration t starts from, at token level, before the down-scale; by default h(t)."""
        del linears
        return states.h_BxLxD

    def entry_linears(self) -> dict[str, Linear]:
        """The Linears of `enter`, by name; none by default."""
        return {}

    def enter(self, states: States, linears: Bound) -> Update:
        """h(0), by default the prelude's output; `states.h_BxLxD` is that output."""
        del linears
        return Update(states.h_BxLxD)

    @property
    def enters(self) -> bool:
        """Whether h(0) is not simply the prelude's output, so that a model without iterations is not vanilla."""
        return type(self).enter is not Topology.enter

    def routes(self, states: States, linears: Bound) -> dict[str, jax.Array]:
        """By name, the weights [B, L, W] that `update` mixes with, for probes; `states` is what it was given."""
        del states, linears
        return {}

    def entry_routes(self, states: States, linears: Bound) -> dict[str, jax.Array]:
        """The same of `enter`."""
        del states, linears
        return {}

    def exported(self, t: int, name: str) -> str:
        """Exported name of a Linear of iteration t, or with t = -1 of the entry (docs/spec.md section 7)."""
        return f"steps.{t}.{name}" if t >= 0 else f"entry.{name}"

    def kept_vectors(self) -> int:
        """Vectors of width d per token that the backward pass needs beside those of layers (`training/costs.py`)."""
        return 0


topologies: Registry[type[Topology]] = Registry("model.topology", Topology)


@topologies.register("base")
class Base(Topology):
    """h(t+1) = e(t)."""

    def next_state(self, states, e_BxLxD, linears):
        return e_BxLxD


@topologies.register("residual")
class Residual(Topology):
    """h(t+1) = e(t) + h(t)."""

    def next_state(self, states, e_BxLxD, linears):
        return e_BxLxD + states.h_BxLxD


@topologies.register("anchor")
class Anchor(Topology):
    """h(t+1) = e(t) + h(0)."""

    def next_state(self, states, e_BxLxD, linears):
        return e_BxLxD + states.h0_BxLxD


@topologies.register("anchor_star")
class AnchorStar(Topology):
    """h(t+1) = e(t) + h_emb."""

    def next_state(self, states, e_BxLxD, linears):
        return e_BxLxD + states.h_emb_BxLxD


@topologies.register("gated")
class Gated(Topology):
    """h(t+1) = a e(t) + (1 - a) h(t), a = sigmoid(gate_t(h(t))) per token. The gate starts at 1/2."""

    def linears(self, level: Level) -> dict[str, Linear]:
        return {"gate": Linear(self.config.d_model, 1)}

    def routes(self, states, linears):
        return {"gate": jax.nn.sigmoid(linears["gate"](states.h_BxLxD))}

    def next_state(self, states, e_BxLxD, linears):
        a_BxLx1 = self.routes(states, linears)["gate"]
        return a_BxLx1 * e_BxLxD + (1 - a_BxLx1) * states.h_BxLxD

    def kept_vectors(self) -> int:
        # Every e(t), and h(t) where it is not the input of the core's first layer.
        return self.config.num_iterations + sum(level.chunk > 1 for level in self.config.schedule)


@topologies.register("injection")
class Injection(Topology):
    """h(t+1) = e(t), where the core starts from inject_t([h(t), h_emb]) (after Huginn, arXiv 2502.05171).

    The Linear 2d -> d starts as the one that passes h(t) on.
    """

    def linears(self, level: Level) -> dict[str, Linear]:
        d = self.config.d_model
        return {"inject": Linear(2 * d, d, ("embed",), ("activation_embed",), init=_pass_first_half, is_matrix=True)}

    def core_input(self, states, linears):
        return linears["inject"](jnp.concatenate([states.h_BxLxD, states.h_emb_BxLxD], axis=-1))

    def next_state(self, states, e_BxLxD, linears):
        return e_BxLxD

    def kept_vectors(self) -> int:
        # Every h(t), the embeddings, and what coarse iterations start from, which their scorers look at.
        return self.config.num_iterations + 1 + sum(level.chunk > 1 for level in self.config.schedule)


def _pass_first_half(key: jax.Array, shape: tuple[int, int], dtype) -> jax.Array:
    """Identity on top of zero."""
    del key
    return jnp.eye(*shape, dtype=dtype)


class Write(NamedTuple):
    """One write into MeSH's slots.

    Attributes:
      value_BxLxD: what was written.
      share_BxLxS: w, the part of it that each slot took, at least float32.
    """

    value_BxLxD: jax.Array
    share_BxLxS: jax.Array


@topologies.register("mesh")
class MeSH(Topology):
    """A memory of S slots m_b, written and read by routers (arXiv 2510.07739); at first m_0 = h_emb, the others 0.

    route(state, new): w = softmax(write(state)), r = softmax(read(state)); m_b += w_b new for every b; return sum_b r_b
    m_b. With the prelude's output v, h(0) = route(v, v); then h(t+1) = route(h(t), e(t)).

    Slots are kept as what was written rather than as S arrays of width D: slot b holds m_b = sum_j w_j[b] v_j over the
    writes so far, so a read is sum_b r_b m_b = sum_j (r . w_j) v_j, of the T + 2 vectors that the backward pass needs
    anyway, and there is no [S, L, D] buffer per iteration.
    """

    fields = ("memory_slots",)

    def linears(self, level: Level) -> dict[str, Linear]:
        return self.entry_linears()

    def entry_linears(self) -> dict[str, Linear]:
        # Random, not zero: slots with equal routers would never part.
        S, d = self.config.num_slots, self.config.d_model
        router = Linear(d, S, out_axes=("slots",), init=jax.nn.initializers.normal((2 / (S * d)) ** 0.5))
        return {"write": router, "read": router}

    def enter(self, states, linears):
        S, dtype = self.config.num_slots, at_least_float32(states.h_BxLxD.dtype)
        slot_S = jax.nn.one_hot(0, S, dtype=dtype)
        first = Write(states.h_emb_BxLxD, jnp.broadcast_to(slot_S, (*states.h_BxLxD.shape[:2], S)))
        update = self.update(states._replace(kept=(first,)), states.h_BxLxD, linears)
        return update._replace(kept=(first, *update.kept))

    def routes(self, states, linears):
        return {side: jax.nn.softmax(linears[side](states.h_BxLxD)) for side in ("write", "read")}

    entry_routes = routes

    def update(self, states, e_BxLxD, linears):
        routes = self.routes(states, linears)
        write_BxLxS, read_BxLxS = routes["write"], routes["read"]
        new = Write(e_BxLxD, write_BxLxS)
        h_BxLxD = sum(
            jnp.sum(read_BxLxS * share_BxLxS, axis=-1, keepdims=True) * value_BxLxD.astype(read_BxLxS.dtype)
            for value_BxLxD, share_BxLxS in (*states.kept, new)
        )
        entropy_2 = jnp.stack([_mean_entropy(write_BxLxS), _mean_entropy(read_BxLxS)])
        return Update(h_BxLxD, (new,), {"router_entropy": entropy_2})

    def exported(self, t: int, name: str) -> str:
        return f"memory.{t + 1}.{name}"

    def kept_vectors(self) -> int:
        # What was written (embeddings, prelude, T updates), and h(t) of coarse iterations, for their routers.
        return 2 + self.config.num_iterations + sum(level.chunk > 1 for level in self.config.schedule)


def _mean_entropy(p_BxLxS: jax.Array) -> jax.Array:
    """The mean entropy in nats, a scalar; not differentiated."""
    return jax.lax.stop_gradient(-jnp.mean(jnp.sum(p_BxLxS * jnp.log(jnp.maximum(p_BxLxS, 1e-30)), axis=-1)))
