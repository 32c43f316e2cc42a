"""Digests of arrays, whatever mesh they lie on: what is restored is what was saved, or it is damaged.

Every 32-bit word of an array is mixed with its position, and the results are added up modulo 2^32, twice with different
constants. A sum does not ask in which order or on which device its terms are made: sharded arrays need no exchange but
that of two numbers, and any mesh, or NumPy, gives the same digest. Against damage, not against malice.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Of the two lanes: odd factors of the position, added to the word before it is mixed.
_FACTORS = (0x9E3779B1, 0x85EBCA77)
_BLOCK = 2**18  # words at a time on the host, so that what is computed stays in a cache


class Array(NamedTuple):
    """What is known of an array before it is read, and how it is recognised afterwards.

    Attributes:
      dtype: as `float32`.
      shape: sizes of its axes.
      digest: sixteen hexadecimal digits; "" if it has not been read.
    """

    dtype: str
    shape: tuple[int, ...]
    digest: str = ""

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


class Summary(NamedTuple):
    """What a tree of arrays holds.

    Attributes:
      arrays: by path.
      not_finite: paths of arrays with an infinity or a NaN.
    """

    arrays: dict[str, Array]
    not_finite: tuple[str, ...]


def summary(tree: Any) -> Summary:
    """Reads every array of a tree once, where it lies.

    Args:
      tree: arrays of jax, on any mesh, or of NumPy.
    """
    abstract, leaves = outline(tree), jax.tree.leaves(tree)
    on_host = all(isinstance(x, np.ndarray | np.generic) for x in leaves)
    found = [_on_host(np.asarray(x)) for x in leaves] if on_host else jax.device_get(_on_devices(leaves))
    arrays = {
        path: array._replace(digest=f"{int(a):08x}{int(b):08x}")
        for (path, array), (a, b, _) in zip(abstract.items(), found, strict=True)
    }
    return Summary(arrays, tuple(path for path, (*_, finite) in zip(abstract, found, strict=True) if not finite))


def outline(tree: Any) -> dict[str, Array]:
    """The arrays of a tree, which may be ShapeDtypeStructs, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_name(path): Array(np.dtype(x.dtype).name, tuple(x.shape)) for path, x in leaves}


def path_name(path) -> str:
    """A path in a tree as `core/layers/attention_out/kernel`."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


@jax.jit
def _on_devices(leaves: list[jax.Array]) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
    """Two lanes and whether all is finite."""

    def of(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        words = _words(x)
        position, size = jnp.zeros(words.shape, jnp.uint32), 1
        for axis in reversed(range(words.ndim)):
            position += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(size % 2**32)
            size *= words.shape[axis]
        finite = jnp.all(jnp.isfinite(x)) if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.bool_(True)
        first, second = (jnp.sum(_mixed(words, position, factor), dtype=jnp.uint32) for factor in _FACTORS)
        return first, second, finite

    return [of(x) for x in leaves]


def _words(x: jax.Array) -> jax.Array:
    """The bits of an array as uint32; wider entries get an axis of their own, narrower ones a word each."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    if x.dtype.itemsize > 4:
        return jax.lax.bitcast_convert_type(x, jnp.uint32)
    kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    return jax.lax.bitcast_convert_type(x, kind).astype(jnp.uint32)


def _on_host(x: np.ndarray) -> tuple[np.uint32, np.uint32, bool]:
    """As `_on_devices`, a block at a time."""
    width = x.dtype.itemsize
    flat = np.ascontiguousarray(x).reshape(-1)
    finite = bool(np.isfinite(flat).all()) if jnp.issubdtype(x.dtype, jnp.inexact) else True
    words = flat.view({1: np.uint8, 2: np.uint16}.get(width, np.uint32))
    lanes = np.zeros(2, np.uint32)
    for begin in range(0, words.size, _BLOCK):
        block = words[begin : begin + _BLOCK].astype(np.uint32)
        position = np.arange(begin, begin + block.size, dtype=np.uint64).astype(np.uint32)
        lanes += np.array([_mixed(block, position, factor).sum(dtype=np.uint32) for factor in _FACTORS])
    return lanes[0], lanes[1], finite


def _mixed(words: Any, position: Any, factor: int) -> Any:
    """Words with their positions through MurmurHash3's last step, in which one changed bit changes half of all bits."""
    x = words + (position + np.uint32(1)) * np.uint32(factor)
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))
