"""The device mesh and what lies where on it: logical axis names of arrays to mesh axes."""

import collections
import dataclasses
import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from spiral_jax.errors import SpiralError, require
from spiral_jax.model.config import ModelConfig
from spiral_jax.model.operators import Linear

AXES = ("data", "fsdp", "tensor")
# Every logical axis has a rule; an axis without one is an error (`partition_spec`).
RULES: dict[str, str | tuple[str, ...] | None] = {
    # Activations.
    "batch": ("data", "fsdp"),
    "length": None,
    "activation_embed": None,
    # Parameters. `embed` is the axis every matrix has, so sharding it over fsdp shards them all.
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "mlp": "tensor",
    "qkv": None,
    "head_width": None,
    "layers": None,
    "slots": None,
    "features": None,
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis; one axis may be -1 and takes the devices the others leave.

    Attributes:
      data: replicas of the parameters, each with its part of the batch.
      fsdp: parts of the batch among which parameters and optimizer state are sharded as well.
      tensor: parts into which heads, MLP and vocabulary are cut.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        for field in ("data", "fsdp", "tensor"):
            size = getattr(self, field)
            if size < 1 and size != -1:
                raise SpiralError(f"mesh.{field} is {size}; allowed: 1 or more, or -1 for the devices left over")
        if (self.data, self.fsdp, self.tensor).count(-1) > 1:
            raise SpiralError(f"mesh is {self}; allowed: -1 for one axis, which takes the devices left over")

    def shape(self, num_devices: int) -> tuple[int, int, int]:
        """Devices along (data, fsdp, tensor).

        Raises:
          SpiralError: the axes do not multiply to `num_devices`.
        """
        sizes = [self.data, self.fsdp, self.tensor]
        known = math.prod(size for size in sizes if size != -1)
        if -1 in sizes and num_devices % known == 0:
            sizes[sizes.index(-1)] = num_devices // known
        if math.prod(sizes) != num_devices:
            raise SpiralError(
                f"mesh.data {self.data} x mesh.fsdp {self.fsdp} x mesh.tensor {self.tensor} does not fit "
                f"{num_devices} devices; allowed: a product of {num_devices}"
            )
        data, fsdp, tensor = sizes
        return data, fsdp, tensor


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of axes data, fsdp, tensor over all devices of all processes, or over `devices`.

    Over several TPU slices, `data` is what crosses from one to another: the network between them is slow, and only sums
    of gradients use it.

    Raises:
      SpiralError: sizes that do not fit the devices or the slices.
    """
    devices = jax.devices() if devices is None else devices
    shape = config.shape(len(devices))
    slices = collections.defaultdict(list)
    for device in devices:
        # GPUs have the attribute as well, and mean other things by it.
        slices[getattr(device, "slice_index", 0) if device.platform == "tpu" else 0].append(device)
    if shape[0] % len(slices):
        raise SpiralError(f"mesh.data is {shape[0]}; allowed: a multiple of the {len(slices)} slices")
    of_slice = (shape[0] // len(slices), *shape[1:])
    # Auto: the compiler propagates shardings between the constraints given here, as linen's logical axes expect.
    types = (AxisType.Auto,) * len(AXES)
    try:
        # `jax.make_mesh` cuts an axis of the torus in two for v5e only, and most meshes of v5p and v6e need that.
        parts = [
            mesh_utils.create_device_mesh(of_slice, slices[index], allow_split_physical_axes=True)
            for index in sorted(slices)
        ]
    except NotImplementedError as error:
        reason = " ".join(str(error).split())
        raise SpiralError(
            f"mesh is {of_slice} on a slice of {slices[min(slices)][0].device_kind}; allowed: axes that its torus can "
            f"be cut into ({reason})"
        ) from error
    return Mesh(np.concatenate(parts), AXES, axis_types=types)


def abstract_mesh(config: MeshConfig, num_devices: int) -> AbstractMesh:
    """The mesh of `num_devices` devices that need not be there: enough to ask what would lie where."""
    return AbstractMesh(config.shape(num_devices), AXES)


def check_divisible(mesh_shape: tuple[int, int, int], model: ModelConfig, batch_size: int, accumulation: int) -> None:
    """Whether batch and parameters can be cut evenly.

    Args:
      mesh_shape: devices along (data, fsdp, tensor).
      model: the architecture.
      batch_size: sequences per optimizer step over all devices.
      accumulation: micro-batches per optimizer step.

    Raises:
      SpiralError: naming the field that is not divisible.
    """
    data, fsdp, tensor = mesh_shape
    if batch_size % (data * fsdp * accumulation):
        raise SpiralError(
            f"train.batch_size is {batch_size}; allowed: a multiple of mesh.data {data} x mesh.fsdp {fsdp} x "
            f"train.accumulation {accumulation} = {data * fsdp * accumulation}"
        )
    if model.d_model % fsdp:
        raise SpiralError(f"model.d_model is {model.d_model}; allowed: a multiple of mesh.fsdp {fsdp}")
    for field in ("num_heads", "vocab_size"):
        if getattr(model, field) % tensor:
            raise SpiralError(f"model.{field} is {getattr(model, field)}; allowed: a multiple of mesh.tensor {tensor}")
    sizes = dict(zip(AXES, mesh_shape, strict=True))
    for found in model.operators.declared():
        where = f"model.{found.field} {getattr(model, found.field)!r}: Linear {found.name!r}"
        _check_linear(where, found.linear, model.d_model, sizes)


def _check_linear(where: str, linear: Linear, d_model: int, mesh_sizes: dict[str, int]) -> None:
    """Whether the axes of a declared Linear have rules, and divide over the mesh."""
    for size, name in zip(linear.kernel_shape, linear.axes(d_model), strict=True):
        require(name is None or name in RULES, f"{where}: axis", name, f"None, {', '.join(RULES)}")
        axis = None if name is None else RULES[name]
        parts = mesh_sizes[axis] if isinstance(axis, str) else 1
        require(size % parts == 0, f"{where}: size of axis {name!r}", size, f"a multiple of mesh.{axis} {parts}")


def rounded_to_mesh(batch_size: int, mesh: Mesh | AbstractMesh) -> int:
    """The smallest batch of at least `batch_size` rows that divides over the devices."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    return -(-batch_size // parts) * parts


def partition_spec(names: Sequence[str | None], over: Sequence[str] = AXES) -> PartitionSpec:
    """Mesh axes of an array whose axes have these logical names (None: not sharded).

    Args:
      names: of the array's axes.
      over: mesh axes to name; inside a `shard_map` over the others, these are what is left.

    Raises:
      KeyError: a name without a rule.
    """
    return PartitionSpec(*(None if name is None else _within(RULES[name], over) for name in names))


def _within(axes: str | tuple[str, ...] | None, over: Sequence[str]) -> str | tuple[str, ...] | None:
    if isinstance(axes, tuple):
        return tuple(axis for axis in axes if axis in over) or None
    return axes if axes in over else None


def constrain(mesh: Mesh, x: jax.Array, *axes: str) -> jax.Array:
    """Pins an activation to the mesh by the logical names of its axes; `model.neox.Backend` takes it with its mesh."""
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, partition_spec(axes)))


def shardings_of(boxed_tree, mesh: Mesh | AbstractMesh):
    """NamedSharding of every array in a tree whose parameters carry linen's logical axis names; others replicated."""

    def sharding(x):
        if isinstance(x, nn.LogicallyPartitioned):
            return NamedSharding(mesh, partition_spec(x.names))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree.map(sharding, boxed_tree, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of tokens [B, L], and of any array whose first axis is the batch."""
    return NamedSharding(mesh, partition_spec(("batch",)))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())
