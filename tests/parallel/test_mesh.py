"""What lies where: memory per device of the real 160M model, a rule for every axis, meshes that do not fit."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.experimental import mesh_utils
from jax.sharding import PartitionSpec

from spiral_jax.errors import SpiralError
from spiral_jax.model.config import ModelConfig
from spiral_jax.model.spiralformer import SpiralFormer
from spiral_jax.parallel.mesh import (
    RULES,
    MeshConfig,
    abstract_mesh,
    constrain,
    make_mesh,
    partition_spec,
    shardings_of,
)
from spiral_jax.run.config import RunConfig
from spiral_jax.training.config import TrainConfig
from spiral_jax.training.step import abstract_state

FAMILIES = {
    "vanilla": dict(chunks=(), topology="base"),
    "pythia_mesh": dict(chunks=(1, 1), shared_core=False),
    "base": dict(chunks=(1, 1, 1), topology="base"),
    "residual": dict(chunks=(1, 1, 1), topology="residual"),
    "anchor": dict(chunks=(1, 1, 1), topology="anchor"),
    "anchor_star": dict(chunks=(1, 1, 1), topology="anchor_star"),
    "gated": dict(chunks=(2, 1), topology="gated"),
    "injection": dict(chunks=(2, 1), topology="injection"),
    "looped_mesh": dict(chunks=(1, 1, 1)),
    "spiral_b": dict(),
    "spiral_l": dict(chunks=(4, 4, 2, 2, 1, 1)),
    "spiral_plain_operators": dict(pooling="mean", allocation="uniform"),
}


def device_bytes(tree, whole: bool) -> int:
    """Bytes of a tree of ShapeDtypeStructs: all of it, or one device's part."""
    return sum(
        math.prod(x.shape if whole else x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


@pytest.mark.parametrize(
    "family, mesh",
    [
        *(("spiral_b", mesh) for mesh in [(1, 8, 1), (1, 256, 1), (4, 2, 2), (1, 1, 4), (1, 64, 4), (8, 1, 1)]),
        *((family, (2, 16, 2)) for family in ["spiral_l", "pythia_mesh", "vanilla"]),
    ],
)
def test_parameters_and_optimizer_are_spread_evenly(family, mesh):
    """At most 1.1 x total / (fsdp x tensor) on each device; the moments lie where the parameters lie."""
    config = RunConfig(model=ModelConfig(**FAMILIES[family]))
    state = abstract_state(config, abstract_mesh(MeshConfig(*mesh), math.prod(mesh)))
    _, fsdp, tensor = mesh
    for tree in (state.params, state.opt_state, state):
        assert device_bytes(tree, whole=False) <= 1.1 * device_bytes(tree, whole=True) / (fsdp * tensor)
    # fp32 parameters, and two fp32 moments of each.
    assert device_bytes(state.params, whole=True) == 4 * config.model.total_parameters
    assert device_bytes(state.opt_state, whole=True) == pytest.approx(8 * config.model.total_parameters, abs=64)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_axis_has_a_name_and_a_rule(family):
    model = SpiralFormer(ModelConfig(vocab_size=64, d_model=32, num_heads=4, **FAMILIES[family]))
    boxed = jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)), jnp.zeros((1, 1), jnp.int32))
    is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)  # noqa: E731
    for path, x in jax.tree_util.tree_leaves_with_path(boxed["params"], is_leaf=is_box):
        name = jax.tree_util.keystr(path)
        assert is_box(x), f"{name} has no logical axes"
        assert len(x.names) == x.value.ndim, f"{name}: {x.names} name {x.value.shape}"
        assert set(x.names) - {None} <= RULES.keys(), name


def test_rules_use_the_axes_of_the_mesh():
    used = {axis for rule in RULES.values() for axis in ([rule] if isinstance(rule, str) else rule or ())}
    assert used == {"data", "fsdp", "tensor"}


def test_an_axis_without_a_rule_is_an_error():
    with pytest.raises(KeyError, match="colour"):
        partition_spec(("embed", "colour"))
    box = nn.LogicallyPartitioned(jax.ShapeDtypeStruct((2,), jnp.float32), names=("colour",))
    with pytest.raises(KeyError, match="colour"):
        shardings_of({"x": box}, abstract_mesh(MeshConfig(), 1))
    with pytest.raises(KeyError, match="colour"):
        constrain(make_mesh(MeshConfig()), jnp.zeros(8), "colour")
    assert partition_spec(("layers", None, "embed", "heads")) == PartitionSpec(None, None, "fsdp", "tensor")


@pytest.mark.parametrize(
    "axes, devices, expected",
    [
        ((-1, 1, 1), 8, (8, 1, 1)),
        ((1, -1, 2), 8, (1, 4, 2)),
        ((2, 2, -1), 8, (2, 2, 2)),
        ((2, 2, 2), 8, (2, 2, 2)),
        ((-1, 8, 1), 8, (1, 8, 1)),
    ],
)
def test_mesh_shape(axes, devices, expected):
    assert MeshConfig(*axes).shape(devices) == expected
    if devices == jax.device_count():
        assert tuple(make_mesh(MeshConfig(*axes)).shape.items()) == tuple(
            zip(("data", "fsdp", "tensor"), expected, strict=True)
        )


@pytest.mark.parametrize("axes, devices", [((3, -1, 1), 8), ((2, 2, 1), 8), ((-1, 16, 1), 8), ((4, 4, 1), 8)])
def test_mesh_that_does_not_fit_names_its_axes(axes, devices):
    with pytest.raises(SpiralError, match=r"mesh\.data .* mesh\.fsdp .* mesh\.tensor .* 8 devices") as error:
        MeshConfig(*axes).shape(devices)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "axes, field",
    [((0, 1, 1), "mesh.data"), ((1, -2, 1), "mesh.fsdp"), ((1, 1, 0), "mesh.tensor"), ((-1, -1, 1), "mesh")],
)
def test_bad_mesh_axes_are_refused(axes, field):
    with pytest.raises(SpiralError, match=f"^{field} "):
        MeshConfig(*axes)


@pytest.mark.parametrize(
    "change, field",
    [
        (dict(mesh=MeshConfig(8), train=dict(batch_size=12)), "train.batch_size"),
        (dict(mesh=MeshConfig(1, 8), train=dict(batch_size=12)), "train.batch_size"),
        (dict(mesh=MeshConfig(2, 2, 2), train=dict(batch_size=8, accumulation=4)), "train.batch_size"),
        (dict(mesh=MeshConfig(1, 8), model=dict(d_model=36)), "model.d_model"),
        (dict(mesh=MeshConfig(1, 1, 8)), "model.num_heads"),
        (dict(mesh=MeshConfig(2, 1, 4), model=dict(vocab_size=66)), "model.vocab_size"),
        (dict(mesh=MeshConfig(3)), "mesh.data"),
    ],
)
def test_what_does_not_divide_is_refused_by_name(change, field):
    model = ModelConfig(**(dict(vocab_size=64, d_model=32, num_heads=4, rotary_fraction=0) | change.get("model", {})))
    train = TrainConfig(**(dict(batch_size=32, sequence_length=16) | change.get("train", {})))
    config = RunConfig(model=model, train=train, mesh=change["mesh"])
    with pytest.raises(SpiralError, match=f"^{field} ") as error:
        config.check_mesh(8)
    assert "\n" not in str(error.value)
    assert dataclasses.replace(config, mesh=MeshConfig(1, 1, 1)).check_mesh(1) == (1, 1, 1)


@pytest.mark.parametrize(
    "topology, sizes",
    [
        ("v5p:4x4x4", [(1, 64, 1), (2, 32, 1), (1, 32, 2), (2, 8, 4)]),
        ("v6e:8x8", [(1, 64, 1), (2, 32, 1), (4, 16, 1), (1, 32, 2), (1, 16, 4)]),
        ("v5e:4x4", [(2, 4, 2), (1, 16, 1)]),
    ],
)
def test_every_mesh_lies_on_a_slice(described, topology, sizes):
    """An axis of the torus may have to be cut in two, which `jax.make_mesh` does for v5e only."""
    devices = described(topology)
    for size in sizes:
        mesh = make_mesh(MeshConfig(*size), devices)
        assert mesh.devices.shape == size and set(mesh.devices.flat) == set(devices)


def test_a_mesh_that_a_torus_cannot_be_cut_into_is_a_line(monkeypatch):
    def refuse(*args, **more):
        raise NotImplementedError("Failed to find assignment for logical_axis_index 1\nof size 3")

    monkeypatch.setattr(mesh_utils, "create_device_mesh", refuse)
    with pytest.raises(SpiralError, match=r"mesh is \(1, 8, 1\) on a slice of cpu; allowed: axes .*index 1 of size 3"):
        make_mesh(MeshConfig(1, 8, 1))
