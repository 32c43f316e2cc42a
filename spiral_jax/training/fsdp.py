"""Fully sharded data parallelism, written out: which parameters are gathered when, and where gradients are summed.

Every device of the axes `data` and `fsdp` works on its own rows in one `shard_map`, so that nothing is left to the
compiler's guess; the axis `tensor` stays with the compiler. A matrix of a layer is gathered over `fsdp` in the compute
dtype when the layer runs, forward and backward, and its gradient is summed over `fsdp` in float32 at once, each device
keeping its part. For embedding, head and vectors both happen once per step, and on demand (`train.gather_core`) for the
shared core. (Iterations that are one scan, `model.scan_iterations_from`, share their forward gathers: jax moves them
out of it.)
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from spiral_jax.kernels.choose import backend_for
from spiral_jax.model.config import ModelConfig
from spiral_jax.model.operators import at_least_float32
from spiral_jax.model.spiralformer import SpiralFormer
from spiral_jax.parallel.mesh import partition_spec
from spiral_jax.training.config import TrainConfig

# The axes that `on_each_device` makes a program's own business.
ROWS = ("data", "fsdp")


class Whole(NamedTuple):
    """A gathered matrix that many iterations use.

    Attributes:
      value: in the compute dtype.
      gradient: zeros, at least float32: the place where the gradients of all uses are summed.
    """

    value: jax.Array
    gradient: jax.Array


def on_each_device(mesh: Mesh, function: Callable, in_specs, out_specs) -> Callable:
    """`function` of the shards that one device of the axes `data` and `fsdp` holds; in specs only these count."""
    in_specs, out_specs = (
        jax.tree.map(lambda spec: _without(spec, "tensor"), specs) for specs in (in_specs, out_specs)
    )
    # What is replicated is known here, not to the checker: collectives of AD's own making are not used.
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=set(ROWS), check_vma=False
    )


def specs_of(shardings) -> Any:
    """PartitionSpecs of parameters, without axes of one device: nothing is cut there."""

    def spec(sharding):
        return _without(sharding.spec, *(axis for axis, size in sharding.mesh.shape.items() if size == 1))

    return jax.tree.map(spec, shardings)


def model_of_a_device(config: ModelConfig, train: TrainConfig, mesh: Mesh, specs) -> SpiralFormer:
    """The model for use inside `on_each_device`.

    Args:
      config: the architecture.
      train: `attention`.
      mesh: the devices.
      specs: `specs_of` the parameters.
    """

    def constrain(x, *axes):
        # Rows are the device's own here: what is left to say is what lies on `tensor`. (Where that is one device jax
        # 0.8 refuses to be told.)
        return jax.lax.with_sharding_constraint(x, partition_spec(axes, ["tensor"])) if mesh.shape["tensor"] > 1 else x

    gather = None
    if mesh.shape["fsdp"] > 1 and config.stored_layers:
        gather = functools.partial(_gather_layer, _layer_specs(specs), config.dtype)
    backend = backend_for(mesh, config, train.attention, manual=ROWS)
    return SpiralFormer(config, backend._replace(constrain=constrain, gather=gather))


def holds_core(config: ModelConfig, train: TrainConfig, mesh: Mesh | AbstractMesh) -> bool:
    """Whether `train.gather_core` makes a difference: there is a shared core, and it is cut."""
    is_shared = config.shared_core and config.num_iterations > 0 and config.core_layers > 0
    return train.gather_core == "step" and is_shared and mesh.shape["fsdp"] > 1


def gather_core(params: dict, specs: dict, dtype) -> dict:
    """The matrices of the shared core whole, as `Whole`s; everything else as it is stored.

    Inside `on_each_device`.
    """

    def gather(path, x, spec):
        if not is_of_layers(path):
            return x
        x = _all_gather(x.astype(dtype), spec)
        return Whole(x, jnp.zeros(x.shape, at_least_float32(dtype)))

    return params | {"core": jax.tree_util.tree_map_with_path(gather, params["core"], specs["core"])}


def gather_rest(params: dict, specs: dict) -> dict:
    """Everything but the layers' matrices whole, in float32: gradients of embedding and head are sums over tokens.

    Inside `on_each_device`.
    """

    def gather(path, x, spec):
        return x if is_of_layers(path) else _all_gather(x, spec)

    return jax.tree_util.tree_map_with_path(gather, params, specs)


def without_values(grads: dict) -> dict:
    """Gradients as arrays: of `Whole`s what their uses have summed."""
    return jax.tree.map(lambda x: x.gradient if _is_whole(x) else x, grads, is_leaf=_is_whole)


def sum_over_rows(grads: dict, specs: dict, core_is_whole: bool) -> dict:
    """Gradients of one device's rows to the shards of their sums over all.

    Inside `on_each_device`.

    Args:
      grads: `without_values`; those of matrices that layers gather one by one are shards already.
      specs: `specs_of` the parameters.
      core_is_whole: whether `gather_core` has gathered.
    """

    def total(path, x, spec):
        if not is_of_layers(path) or (core_is_whole and path[0].key == "core"):
            x = _reduce_scatter(x, spec)
        return sum_over(x, ROWS if _axis(spec) is None else ("data",))

    return jax.tree_util.tree_map_with_path(total, grads, specs)


def sum_over(tree, axes: Sequence[str] = ROWS):
    """Sums over devices, inside `on_each_device`."""
    # A sum over one device is none, and the partitioner refuses it where `tensor` is left to the compiler.
    axes = tuple(axis for axis in axes if jax.lax.axis_size(axis) > 1)
    return jax.lax.psum(tree, axes) if axes else tree


def _gather_layer(specs: dict, dtype, variables: dict) -> dict:
    """One layer's matrices as `on_each_device` has them to those it computes with."""

    def gather(spec, x):
        if _is_whole(x):
            return _used(*x)
        return x if _axis(spec) is None else _gathered(x, spec, dtype)

    return jax.tree.map(gather, specs, variables)


def _layer_specs(specs: dict) -> dict:
    """How one layer's matrices are cut; what `gather_rest` gathers is not any more. All stacks have the same layers."""
    stack = next(stack for stack in specs.values() if "layers" in stack)

    def of_layer(path, spec):
        return PartitionSpec(*spec[1:]) if is_of_layers(path) else PartitionSpec()

    return {"params": jax.tree_util.tree_map_with_path(of_layer, stack)["layers"]}


def is_of_layers(path) -> bool:
    """Whether a path is that of stacked matrices of layers."""
    return path[-1].key == "kernel" and "layers" in (key.key for key in path)


def _is_whole(x) -> bool:
    return isinstance(x, Whole)


def _axis(spec: PartitionSpec) -> int | None:
    return spec.index("fsdp") if "fsdp" in spec else None


def _without(spec: PartitionSpec, *axes: str) -> PartitionSpec:
    return PartitionSpec(*(None if axis in axes else axis for axis in spec))


def _all_gather(x, spec):
    return _on_each_part(lambda x, axis: jax.lax.all_gather(x, "fsdp", axis=axis, tiled=True), x, spec)


def _reduce_scatter(x, spec):
    return _on_each_part(lambda x, axis: jax.lax.psum_scatter(x, "fsdp", scatter_dimension=axis, tiled=True), x, spec)


def _on_each_part(collective: Callable, x, spec: PartitionSpec):
    """A collective along the axis that `fsdp` cuts, if it does, of what each device of `tensor` holds.

    Left to it, the compiler would first gather what `tensor` cuts.
    """
    axis = _axis(spec)
    if axis is None:
        return x
    run = functools.partial(collective, axis=axis)
    if "tensor" in spec:
        part = _without(spec, *ROWS)
        run = jax.shard_map(run, in_specs=part, out_specs=part, axis_names={"tensor"}, check_vma=False)
    return run(x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered(x, spec: PartitionSpec, dtype):
    """A shard to the whole in `dtype`; its gradient is summed at least in float32, and scattered."""
    return _all_gather(x.astype(dtype), spec)


def _gathered_forward(x, spec, dtype):
    return _gathered(x, spec, dtype), None


def _gathered_backward(spec, dtype, _, gradient):
    return (_reduce_scatter(gradient.astype(at_least_float32(dtype)), spec),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


@jax.custom_vjp
def _used(value, gradient):
    """A `Whole`'s value for one use; the use's gradient goes where all are summed, at least in float32."""
    del gradient
    return value


def _used_forward(value, gradient):
    del gradient
    return value, None


def _used_backward(_, gradient):
    return jnp.zeros_like(gradient), gradient.astype(at_least_float32(gradient.dtype))


_used.defvjp(_used_forward, _used_backward)
