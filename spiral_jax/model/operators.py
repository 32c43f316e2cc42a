"""What poolings, spreadings and topologies have in common: a declaration of Linears, from which all else follows.

Parameter trees, counts, FLOPs, sharding and exported names are derived from what an operator declares.
docs/topologies.md shows one in a file of one's own.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from spiral_jax.errors import require
from spiral_jax.model.chunks import Level

if TYPE_CHECKING:
    from spiral_jax.model.config import ModelConfig

HIGHEST = jax.lax.Precision.HIGHEST

# Arrays of declared Linears: `{name: {"kernel", "bias"}}`.
Arrays = Mapping[str, Mapping[str, jax.Array]]
# Declared Linears with their arrays, by name: functions of [..., *inputs].
Bound = Mapping[str, Callable[[jax.Array], jax.Array]]


def at_least_float32(dtype) -> jnp.dtype:
    """The dtype of sums, softmax and routers (docs/spec.md section 5): float32, or float64 when computing in it."""
    return jnp.promote_types(dtype, jnp.float32)


@dataclasses.dataclass(frozen=True, init=False)
class Linear:
    """A Linear that a layer or an operator declares: x of [..., *inputs] to [..., *outputs].

    Attributes:
      inputs: sizes of the axes that are summed over; given as a number for one axis.
      outputs: sizes of the axes that come of it; given as a number for one axis.
      in_axes: logical names of the inputs' axes, which `parallel.mesh.RULES` maps to the mesh.
      out_axes: those of the outputs' axes.
      bias: whether there is one; it starts at zero.
      init: (key, shape, dtype) to the fresh kernel of shape [*inputs, *outputs].
      is_matrix: whether it is a matrix product as layers have them: computed in the compute dtype and counted in FLOPs.
        Otherwise it gives a few numbers per vector, is computed in at least float32 and not counted.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    in_axes: tuple[str | None, ...]
    out_axes: tuple[str | None, ...]
    bias: bool
    init: Callable[..., jax.Array]
    is_matrix: bool

    def __init__(
        self,
        inputs: int | tuple[int, ...],
        outputs: int | tuple[int, ...],
        in_axes: tuple[str | None, ...] = ("embed",),
        out_axes: tuple[str | None, ...] = ("features",),
        bias: bool = True,
        init: Callable[..., jax.Array] = jax.nn.initializers.zeros,
        is_matrix: bool = False,
    ):
        in_sizes, out_sizes = ((sizes,) if isinstance(sizes, int) else sizes for sizes in (inputs, outputs))
        for field, names, sizes in (("in_axes", in_axes, in_sizes), ("out_axes", out_axes, out_sizes)):
            require(len(names) == len(sizes), f"Linear.{field}", names, f"a name for each axis of {sizes}")
        values = (in_sizes, out_sizes, in_axes, out_axes, bias, init, is_matrix)
        for declared, value in zip(dataclasses.fields(self), values, strict=True):
            object.__setattr__(self, declared.name, value)

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        return (*self.inputs, *self.outputs)

    def axes(self, d_model: int) -> tuple[str | None, ...]:
        """Logical names of the kernel's axes: `embed` only where the size is a multiple of d, so that it divides."""
        names = zip(self.kernel_shape, self.in_axes + self.out_axes, strict=True)
        return tuple(None if name == "embed" and size % d_model else name for size, name in names)

    @property
    def weights(self) -> int:
        """Numbers in the kernel; a product with one vector takes twice as many FLOPs."""
        return math.prod(self.kernel_shape)

    @property
    def parameters(self) -> int:
        """Numbers in kernel and bias."""
        return self.weights + math.prod(self.outputs) * self.bias

    def __call__(self, arrays: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
        """x of [..., *inputs] times `arrays["kernel"]`, plus `arrays["bias"]`; at least float32 unless `is_matrix`."""
        wide = at_least_float32(x.dtype)
        dtype = x.dtype if self.is_matrix else wide
        precision = None if self.is_matrix else HIGHEST
        contracted = tuple(range(-len(self.inputs), 0)), tuple(range(len(self.inputs)))
        kernel = arrays["kernel"].astype(dtype)
        y = jnp.tensordot(x.astype(dtype), kernel, contracted, precision=precision, preferred_element_type=wide)
        if self.bias:
            y += arrays["bias"].astype(wide)
        return y.astype(dtype)


@dataclasses.dataclass(frozen=True)
class Operator:
    """A way of doing one part of an iteration. Stateless: the configuration is all it holds.

    Attributes:
      config: the configuration of the model that it is part of.
    """

    config: "ModelConfig"

    def linears(self, level: Level) -> dict[str, Linear]:
        """The Linears that every iteration at this level has of its own, by name; none by default."""
        del level
        return {}

    def shows(self, weights: str, *results: str) -> bool:
        """Whether a method that gives weights for probes is of the class, or a class below, that gives the results.

        A subclass that changes how results are made, and not what is said of the weights, shows none.
        """

        def depth(method: str) -> int:
            return next(i for i, base in enumerate(type(self).__mro__) if method in vars(base))

        return all(depth(weights) <= depth(result) for result in results)


def bind(declared: Mapping[str, Linear], arrays: Arrays) -> Bound:
    """Declared Linears as functions of their inputs; `arrays` may have those of others as well."""

    def function(name: str, linear: Linear):
        return lambda x: linear(arrays[name], x)

    return {name: function(name, linear) for name, linear in declared.items()}
