"""Which weights of operators are shown: those of the formulas that run, and none where that is not known."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from spiral_jax.errors import SpiralError
from spiral_jax.model.config import ModelConfig
from spiral_jax.model.declarations import check_operators
from spiral_jax.model.pooling import Mean, Pooling, SelfAggregation, poolings
from spiral_jax.model.spreading import Learned, Spreading, Uniform
from spiral_jax.model.topology import Anchor, Gated, MeSH, Topology, topologies

MODEL = ModelConfig(d_model=8, num_heads=1, core_layers=1, chunks=(2, 1), topology="anchor", dtype="float32")
OF = {Pooling: ("weights", "pool"), Spreading: ("shares", "spread"), Topology: ("routes", "update", "next_state")}


def shows(operator: type) -> bool:
    base = next(base for base in OF if issubclass(operator, base))
    return operator(MODEL).shows(*OF[base])


def subclass(base: type, *methods: str) -> type:
    return type("Mine", (base,), dict.fromkeys(methods, lambda self, *_: None))


def test_what_is_shown():
    assert all(map(shows, (SelfAggregation, Mean, Learned, Uniform, Gated, MeSH)))
    assert not shows(Anchor) and not shows(subclass(Pooling, "pool")) and not shows(subclass(Spreading, "spread"))
    assert shows(subclass(Spreading, "shares")) and shows(subclass(Pooling, "pool", "weights"))


CHANGED = [(SelfAggregation, "pool"), (Mean, "pool"), (Learned, "spread"), (Gated, "next_state"), (MeSH, "update"),
           (MeSH, "next_state")]  # fmt: skip


@pytest.mark.parametrize(("base", "method"), CHANGED)
def test_a_formula_that_was_changed_alone_shows_nothing(base, method):
    weights = OF[next(of for of in OF if issubclass(base, of))][0]
    assert not shows(subclass(base, method))
    assert shows(subclass(base, method, weights)) and shows(subclass(base, weights)) and shows(subclass(base))


class Half(Anchor):
    """Routes of two axes."""

    def routes(self, states, linears):
        return {"half": jnp.full(states.h_BxLxD.shape[:2], 0.5)}

    def next_state(self, states, e_BxLxD, linears):
        return e_BxLxD


class Wide(Mean):
    """One weight more than places."""

    def pool(self, h_BxNxGxD, is_token_NxG, level, linears):
        return jnp.mean(h_BxNxGxD, axis=2)

    def weights(self, h_BxNxGxD, is_token_NxG, level, linears):
        return jnp.ones((1, 1, level.chunk + 1))


class Lost(Gated):
    """No weights where some are due."""

    def routes(self, states, linears):
        return jax.nn.sigmoid(linears["gate"](states.h_BxLxD))

    def next_state(self, states, e_BxLxD, linears):
        return e_BxLxD


@pytest.mark.parametrize(("registry", "operator", "words"), [
    (topologies, Half, "what routes 'half' gives is (3, 4); allowed: an array of shape (3, 4, 1)"),
    (poolings, Wide, "weights: ValueError"),
    (topologies, Lost, "routes"),
])  # fmt: skip
def test_weights_of_another_shape_are_one_line(registry, operator, words):
    """Before anything is computed, as for every other function of an operator."""
    registry.register("test_shown")(operator)
    try:
        field = registry.field.removeprefix("model.")
        with pytest.raises(SpiralError) as caught:
            check_operators(dataclasses.replace(MODEL, **{field: "test_shown"}))
        assert words in str(caught.value) and "\n" not in str(caught.value), str(caught.value)
        assert str(caught.value).startswith(f"{registry.field} 'test_shown' (")
    finally:
        registry._entries.pop("test_shown")
