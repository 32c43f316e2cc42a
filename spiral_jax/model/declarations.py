"""Whether operators fit what they declare: found out from shapes, before anything is compiled."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from spiral_jax.errors import SpiralError, require
from spiral_jax.model import iteration
from spiral_jax.model.config import ModelConfig
from spiral_jax.model.operators import Linear
from spiral_jax.model.pooling import poolings
from spiral_jax.model.registry import Registry, guarded
from spiral_jax.model.spreading import spreadings
from spiral_jax.model.topology import RESERVED, topologies

# Rows of the abstract arrays: a size that nothing else has by itself.
B = 3


def check_operators(config: ModelConfig) -> None:
    """Whether every operator's functions take what it declares, and give arrays of the shapes that are due.

    Those of the package are tested, and cost a start nothing here.

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
    topology, pooling, spreading = config.operators
    of_topology = _Checked(topologies, config.topology)
    of_pooling, of_spreading = _Checked(poolings, config.pooling), _Checked(spreadings, config.allocation)
    D = config.d_model
    fields = [field.name for field in dataclasses.fields(config)]
    require(set(topology.fields) <= set(fields), f"{of_topology.where}: fields", topology.fields, ", ".join(fields))

    entry = of_topology.declared("entry_linears", topology.entry_linears)
    token_BxLxD = _abstract(config, B, 2 * max(config.chunks, default=1), D)
    enter = functools.partial(iteration.enter, config)
    states, metrics = of_topology.shape("enter", enter, _arrays(entry), token_BxLxD, token_BxLxD)
    of_topology.expect("enter", states.h_BxLxD, *token_BxLxD.shape)
    recorded = [metrics] if metrics else []
    kept = []
    for level in dict.fromkeys(config.schedule):
        # Of a length for each level: what a topology records may not depend on it.
        G, L, N = level.chunk, 2 * level.chunk, level.num_chunks(2 * level.chunk)
        token_BxLxD = _abstract(config, B, L, D)

        def at(function, level=level):
            return functools.partial(function, config, level)

        states, _ = of_topology.shape("enter", enter, _arrays(entry), token_BxLxD, token_BxLxD)
        named = of_topology.declared("linears", functools.partial(topology.linears, level))
        found = of_topology.shape("core_input", at(iteration.core_input), _arrays(named), states)
        of_topology.expect("core_input", found, B, L, D)
        found, metrics = of_topology.shape("next_state", at(iteration.advance), _arrays(named), states, token_BxLxD)
        of_topology.expect("next_state", found.h_BxLxD, B, L, D)
        recorded.append(metrics)
        kept.append(jax.tree.structure(found.kept[len(states.kept) :]))
        if G == 1:
            continue

        scorers = of_pooling.declared("linears", functools.partial(pooling.linears, level))
        found = of_pooling.shape("pool", at(iteration.down_scale), _arrays(scorers), token_BxLxD)
        of_pooling.expect("pool", found, B, N, D)
        opened, added, closed = of_pooling.shape(
            "one token at a time", at(_one_token), _arrays(scorers), _abstract(config, B, D)
        )
        require(opened == added, f"{of_pooling.where}: what add gives", added, f"what open gives, {opened}")
        of_pooling.expect("close", closed, B, D)
        allocators = of_spreading.declared("linears", functools.partial(spreading.linears, level))
        found = of_spreading.shape("spread", at(iteration.spread), _arrays(allocators), _abstract(config, B, N, D))
        of_spreading.expect("spread", found, B, N, G, D)

        every = [*named, *scorers, *allocators]
        where = f"{of_topology.where}, {of_pooling.where} and {of_spreading.where}: names of Linears"
        require(len(set(every)) == len(every), where, every, "every name once")

    taken = sorted({name for metrics in recorded for name in metrics} & set(RESERVED))
    require(not taken, f"{of_topology.where}: metrics", taken, f"other names than {', '.join(RESERVED)}")
    require(_are_equal(recorded), f"{of_topology.where}: metrics", recorded, "the same from every iteration")
    require(_are_equal(kept), f"{of_topology.where}: kept", kept, "as many of one structure from every iteration")


def _are_equal(values: Sequence[Any]) -> bool:
    return all(value == values[0] for value in values)


class _Checked:
    """An operator, as errors name it."""

    def __init__(self, registry: Registry, name: str):
        self.file = registry.code(name).file
        self.where = f"{registry.field} {name!r} ({self.file})"

    def declared(self, function: str, linears: Callable[[], Any]) -> dict[str, Linear]:
        """The Linears that a function of the operator gives."""
        found = self._guarded(function, lambda: dict(linears()))
        for name, linear in found.items():
            require(isinstance(linear, Linear), f"{self.where}: {function} {name!r}", linear, "a Linear")
        # The name of what a stack of layers has.
        require("layers" not in found, f"{self.where}: {function}", "layers", "another name")
        return found

    def shape(self, function: str, call: Callable, *arguments: Any) -> Any:
        """The shapes that `call`, which calls a function of the operator, gives."""
        return self._guarded(function, lambda: jax.eval_shape(call, *arguments))

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


def _abstract(config: ModelConfig, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(config.dtype))


def _arrays(linears: Mapping[str, Linear]) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """Abstract parameters."""

    def array(shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    return {
        name: {"kernel": array(linear.kernel_shape), "bias": array(linear.outputs)} for name, linear in linears.items()
    }
