"""Whether operators of the user's own fit what they declare: found out from shapes, before anything is compiled."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from spiral_jax.errors import SpiralError, guarded, require
from spiral_jax.model import iteration
from spiral_jax.model.config import ModelConfig
from spiral_jax.model.operators import Linear, Operator
from spiral_jax.model.pooling import poolings
from spiral_jax.model.spreading import spreadings
from spiral_jax.model.topology import topologies
from spiral_jax.registry import Registry

# Rows of the abstract arrays: a size that nothing else has by itself.
B = 3
# What a row of metrics.jsonl has already, so that a topology may not record it.
RESERVED = ("step", "loss", "learning_rate", "gradient_norm", "skipped", "step_time", "input_wait", "tokens", "epoch")


def check_operators(config: ModelConfig) -> None:
    """Whether every operator's functions take what it declares, and give arrays of the shapes that are due.

    Operators of the package have tests: a model without others is not checked, and its start costs nothing here.

    Raises:
      SpiralError: naming the operator, its file, and what is wrong.
    """
    named = (topologies, config.topology), (poolings, config.pooling), (spreadings, config.allocation)
    if all(registry.code(name).is_ours for registry, name in named):
        return
    if config.dtype == "float64":  # which jax may not have here; shapes are the same
        config = dataclasses.replace(config, dtype="float32")
    # The classes themselves: a name may be registered anew.
    _check(config, tuple(map(type, config.operators)))


@functools.lru_cache(maxsize=1024)
def _check(config: ModelConfig, classes: tuple[type, ...]) -> None:
    del classes
    operators, D = config.operators, config.d_model
    topology = _Checked(topologies, config.topology, operators.topology)
    pooling = _Checked(poolings, config.pooling, operators.pooling)
    spreading = _Checked(spreadings, config.allocation, operators.spreading)
    fields = [field.name for field in dataclasses.fields(config)]
    used = operators.topology.fields
    require(set(used) <= set(fields), f"{topology.where}: fields", used, ", ".join(fields))

    def abstract(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(config.dtype))

    def enter(length: int):
        token_BxLxD = abstract(B, length, D)
        arrays = topology.arrays("entry_linears")
        return topology.shapes("enter", iteration.enter, (config,), arrays, token_BxLxD, token_BxLxD)

    L = 2 * max(config.chunks, default=1)
    states, metrics = enter(L)
    topology.expect("enter", states.h_BxLxD, B, L, D)
    token_BxLxD, arrays = abstract(B, L, D), topology.arrays("entry_linears")
    shown = topology.shapes("entry_routes", iteration.entry_routes, (config,), arrays, token_BxLxD, token_BxLxD)
    for name, weights in shown.items():
        topology.expect(f"entry_routes {name!r}", weights, B, L, *(weights.shape[2:3] or (1,)))
    recorded, kept = [metrics] if metrics else [], []
    for level in dict.fromkeys(config.schedule):
        # Of a length for each level: what a topology records may not depend on it.
        G, L, N = level.chunk, 2 * level.chunk, level.num_chunks(2 * level.chunk)
        token_BxLxD, at = abstract(B, L, D), (config, level)
        states, _ = enter(L)
        own = topology.arrays("linears", level)
        found = topology.shapes("core_input", iteration.core_input, at, own, states)
        topology.expect("core_input", found, B, L, D)
        found, metrics = topology.shapes("next_state", iteration.advance, at, own, states, token_BxLxD)
        topology.expect("next_state", found.h_BxLxD, B, L, D)
        for name, weights in topology.shapes("routes", iteration.routes, at, own, states).items():
            topology.expect(f"routes {name!r}", weights, B, L, *(weights.shape[2:3] or (1,)))
        recorded.append(metrics)
        kept.append(jax.tree.structure(found.kept[len(states.kept) :]))
        if G == 1:
            continue

        scorers = pooling.arrays("linears", level)
        found = pooling.shapes("pool", iteration.down_scale, at, scorers, token_BxLxD)
        pooling.expect("pool", found, B, N, D)
        pooling.shapes("weights", iteration.pooling_weights, at, scorers, token_BxLxD)
        opened, added, closed = pooling.shapes("one token at a time", _one_token, at, scorers, abstract(B, D))
        require(opened == added, f"{pooling.where}: what add gives", added, f"what open gives, {opened}")
        pooling.expect("close", closed, B, D)
        allocators = spreading.arrays("linears", level)
        found = spreading.shapes("spread", iteration.spread, at, allocators, abstract(B, N, D))
        spreading.expect("spread", found, B, N, G, D)
        spreading.shapes("shares", iteration.shares, at, allocators, abstract(B, N, D))

        every = [*own, *scorers, *allocators]
        where = f"{topology.where}, {pooling.where} and {spreading.where}: names of Linears"
        require(len(set(every)) == len(every), where, every, "every name once")

    taken = sorted({name for metrics in recorded for name in metrics} & set(RESERVED))
    require(not taken, f"{topology.where}: metrics", taken, f"other names than {', '.join(RESERVED)}")
    require(_are_equal(recorded), f"{topology.where}: metrics", recorded, "the same from every iteration")
    require(_are_equal(kept), f"{topology.where}: kept", kept, "as many of one structure from every iteration")


def _are_equal(values: Sequence[Any]) -> bool:
    return all(value == values[0] for value in values)


class _Checked:
    """An operator under check; its errors begin with its field, name and file."""

    def __init__(self, registry: Registry, name: str, operator: Operator):
        self.operator = operator
        self.file = registry.code(name).file
        self.where = f"{registry.field} {name!r} ({self.file})"

    def arrays(self, function: str, *arguments: Any) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        """Abstract arrays of the Linears that a function of the operator declares, by name."""
        declared = self._guarded(function, lambda: dict(getattr(self.operator, function)(*arguments)))
        for name, linear in declared.items():
            require(isinstance(linear, Linear), f"{self.where}: {function} {name!r}", linear, "a Linear")
        # The name of what a stack of layers has.
        require("layers" not in declared, f"{self.where}: {function}", "layers", "another name")

        def array(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, jnp.float32)

        return {name: {"kernel": array(x.kernel_shape), "bias": array(x.outputs)} for name, x in declared.items()}

    def shapes(self, function: str, call: Callable, static: tuple[Any, ...], *arguments: Any) -> Any:
        """The shapes that `call(*static, *arguments)` gives, which calls a function of the operator."""
        return self._guarded(function, lambda: jax.eval_shape(functools.partial(call, *static), *arguments))

    def expect(self, function: str, found: Any, *shape: int) -> None:
        given = getattr(found, "shape", found)
        require(given == shape, f"{self.where}: what {function} gives", given, f"an array of shape {shape}")

    def _guarded(self, function: str, call: Callable[[], Any]) -> Any:
        try:
            with guarded(function, self.file):
                return call()
        except SpiralError as error:
            raise SpiralError(f"{self.where}: {error}") from error


def _one_token(config, level, arrays, h_BxD):
    """The open chunk before and after its first member, and what it would close as."""
    place_B = jnp.zeros(B, jnp.int32)
    opened = config.operators.pooling.open(level, B)
    added = iteration.add_member(config, level, arrays, opened, place_B, place_B == 0, h_BxD)
    return opened, added, iteration.close_chunk(config, level, arrays, added, place_B, h_BxD.dtype)
