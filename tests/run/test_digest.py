"""Digests that any mesh and NumPy agree on, and that every changed bit changes."""

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from spiral_jax.parallel.mesh import MeshConfig, make_mesh
from spiral_jax.run.digest import outline, summary

RNG = np.random.default_rng(0)
TREE = {
    "matrix": RNG.normal(size=(8, 16, 12)).astype(np.float32),
    "half": RNG.normal(size=(4, 3)).astype(ml_dtypes.bfloat16),
    "numbers": {"step": np.int32(7).reshape(()), "key": np.uint32([3, 4])},
    "flags": RNG.integers(2, size=5) > 0,
    "empty": np.zeros((0, 3), np.float32),
}


def from_the_definition(x: np.ndarray) -> str:
    """The sum of mixed words, one word after the other, in Python's integers."""
    words = [int(word) for word in np.frombuffer(x.tobytes(), {2: np.uint16, 4: np.uint32}[x.dtype.itemsize])]
    lanes = []
    for factor in (0x9E3779B1, 0x85EBCA77):
        total = 0
        for i, word in enumerate(words):
            h = (word + (i + 1) * factor) % 2**32
            h = (h ^ (h >> 16)) * 0x85EBCA6B % 2**32
            h = (h ^ (h >> 13)) * 0xC2B2AE35 % 2**32
            total += h ^ (h >> 16)
        lanes.append(f"{total % 2**32:08x}")
    return "".join(lanes)


def test_numpy_against_the_definition():
    arrays = summary(TREE).arrays
    for path, x in [("matrix", TREE["matrix"]), ("half", TREE["half"]), ("numbers/key", TREE["numbers"]["key"])]:
        assert arrays[path].digest == from_the_definition(x)
    assert str(arrays["matrix"]) == "float32[8, 16, 12]" and arrays["empty"].digest == "0" * 16
    assert {path: array._replace(digest="") for path, array in arrays.items()} == outline(TREE)


@pytest.mark.parametrize("mesh", [(1, 1, 1), (8, 1, 1), (2, 2, 2), (1, 4, 2)], ids=str)
def test_any_mesh_gives_the_same(mesh):
    devices = make_mesh(MeshConfig(*mesh), jax.devices()[: int(np.prod(mesh))])

    def place(x):
        spec = (
            PartitionSpec("fsdp", ("data", "tensor")) if x.ndim > 1 and x.size and x.shape[1] > 3 else PartitionSpec()
        )
        return jax.device_put(x, NamedSharding(devices, spec))

    assert summary(jax.tree.map(place, TREE)) == summary(TREE)


def test_wide_words(monkeypatch):
    with jax.enable_x64(True):
        x = RNG.normal(size=(5, 3))
        assert summary({"x": jax.numpy.asarray(x)}) == summary({"x": x})


@pytest.mark.parametrize("name", ["matrix", "half", "flags"])
def test_every_bit_counts(name):
    before = summary(TREE).arrays[name].digest
    for _ in range(100):
        changed = TREE[name].copy()
        raw = changed.view(np.uint8).reshape(-1)
        if name == "flags":
            raw[RNG.integers(raw.size)] ^= 1
        else:
            raw[RNG.integers(raw.size)] ^= 1 << RNG.integers(8)
        assert summary({name: changed}).arrays[name].digest != before


def test_an_exchange_counts():
    """Two equal rows exchanged are nothing; two others are."""
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    assert summary({"x": x[[1, 0, 2]]}) != summary({"x": x})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("on_host", [True, False])
def test_what_is_not_finite_is_named(value, on_host):
    x = np.ones((4, 4), np.float32)
    x[2, 1] = value
    tree = {"a": np.ones(3, np.float32), "b": {"c": x}, "n": np.int32([1])}
    tree = tree if on_host else jax.tree.map(jax.numpy.asarray, tree)
    assert summary(tree).not_finite == ("b/c",)
