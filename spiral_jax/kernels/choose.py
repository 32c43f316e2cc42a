"""Which attention runs on a mesh: splash on TPU, cuDNN on GPU where it takes the dtype, blocks on CPU, or plain XLA."""

import functools
from collections.abc import Callable, Sequence

import jax
from jax.sharding import Mesh

from spiral_jax.errors import require
from spiral_jax.kernels import blocks, cpu, cudnn, splash
from spiral_jax.model.backend import Backend
from spiral_jax.model.config import ModelConfig
from spiral_jax.parallel.mesh import partition_spec


def backend_for(mesh: Mesh, model: ModelConfig, choice: str = "auto", manual: Sequence[str] = ()) -> Backend:
    """What a model computes with on a mesh.

    Args:
      mesh: devices, which need not be there: ahead-of-time compilation describes them.
      model: the architecture; its dtype and head width decide what a kernel takes.
      choice: `train.attention`: `auto` for the fastest there is, or the name of one.
      manual: axes of the mesh that the caller's `shard_map` has cut already.

    Returns:
      It, with attention of B and H divisible over the mesh, and without `constrain` and `gather`.

    Raises:
      SpiralError: one that the devices, the dtype or the head width do not have.
    """
    # Not jax.default_backend(): compiling for a TPU that is not there, that is the CPU.
    device = mesh.devices.flat[0]
    kernels = kernels_of(device, model)
    require(
        choice in ("auto", *kernels),
        "train.attention",
        choice,
        f"{', '.join(('auto', *kernels))} on {device.device_kind} with model.dtype {model.dtype} and heads of "
        f"{model.head_width}",
    )
    name = kernels[0] if choice == "auto" else choice
    others = Backend()
    if device.platform == "cpu":
        others = Backend(dot_general=cpu.dot_general, gelu=cpu.gelu, layer_norm=cpu.layer_norm)
    if name == "xla":
        return others
    attentions: dict[str, Callable[..., jax.Array]] = {
        "splash": functools.partial(splash.causal_attention, device_kind=device.device_kind),
        "cudnn": cudnn.causal_attention,
        "blocks": blocks.causal_attention,
    }
    return others._replace(attention=per_device(mesh, attentions[name], manual))


def kernels_of(device: jax.Device, model: ModelConfig) -> tuple[str, ...]:
    """Names of what computes a model's attention on a device, the fastest first."""
    if device.platform == "tpu" and splash.takes(model.dtype, model.head_width):
        return ("splash", "xla")
    if device.platform in ("gpu", "cuda") and cudnn.takes(device, model.dtype, model.head_width):
        return ("cudnn", "xla")
    if device.platform == "cpu":
        return ("blocks", "xla")
    return ("xla",)


def per_device(mesh: Mesh, attention: Callable[..., jax.Array], manual: Sequence[str] = ()) -> Callable[..., jax.Array]:
    """Runs an attention on each device's rows and heads: the compiler cannot cut a kernel, and would gather for it."""
    rest = [axis for axis in mesh.axis_names if axis not in manual]
    spec = partition_spec(("batch", "length", "heads", "head_width"), rest)
    # Inside another `shard_map` the mesh is that one's, some of its axes cut.
    where = {} if manual else {"mesh": mesh}
    # Kernels do not say over which mesh axes their outputs vary, so that is not checked; they vary over all of them.
    return jax.shard_map(
        attention, in_specs=(spec, spec, spec), out_specs=spec, axis_names=set(rest), check_vma=False, **where
    )
