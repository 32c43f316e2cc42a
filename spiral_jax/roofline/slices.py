"""TPU slices that can be rented, by their names, and their devices, described without being there."""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re

import jax
from jax.experimental.compilation_cache import compilation_cache

from spiral_jax.errors import SpiralError
from spiral_jax.hardware import GENERATIONS, Generation, Shape


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips that their own links connect.

    Attributes:
      generation: of its chips.
      shape: chips along each axis of the torus, as `2x4` or `4x4x8`.
    """

    generation: Generation
    shape: Shape

    def __str__(self) -> str:
        return f"{self.generation.name}:{_times(self.shape)}"

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        """What JAX sees."""
        return self.chips * self.generation.devices

    @property
    def hosts(self) -> int:
        return -(-self.chips // self.generation.host_chips)

    @property
    def accelerator_type(self) -> str:
        """The name to rent it by."""
        name = (self.generation.aliases or (self.generation.name,))[0]
        return f"{name}-{self.chips * self.generation.counted_cores}"

    @property
    def peak_flops(self) -> float:
        """Of one device, bfloat16."""
        return self.generation.peak_flops / self.generation.devices

    @property
    def hbm_bandwidth(self) -> float:
        """Of one device, bytes/s."""
        return self.generation.hbm_bandwidth / self.generation.devices

    @property
    def dcn_bandwidth(self) -> float:
        """Of one device, bytes/s."""
        return self.generation.dcn_bandwidth / self.generation.devices

    def ring_bandwidths(self) -> tuple[float, ...]:
        """Bytes/s that leave a chip along each axis: both directions of a ring, one link's at the end of a line."""
        g = self.generation
        # Rings of a 3D slice close in switches that only whole cubes reach, those of a 2D one at the edges of the pod.
        open_cube = len(self.shape) == 3 and min(self.shape) < g.wraps_at
        directions = [1 if open_cube or size < g.wraps_at else 2 for size in self.shape]
        return tuple(g.ici_bandwidth * count * (size > 1) for size, count in zip(self.shape, directions, strict=True))


def parse_slice(text: str) -> Slice:
    """A slice by its topology (`v5p:4x4x4`, chips) or accelerator type (`v5p-128`, which counts TensorCores).

    The number in an accelerator type counts chips of v5e (`v5litepod-16` or `v5e-16`) and v6e, cores of the others.

    Raises:
      SpiralError: no such generation, or a size that nobody rents out.
    """
    found = re.fullmatch(r"(\w+):(\d{1,9}(?:x\d{1,9}){1,5})|(\w+)-(\d{1,9})", text.strip().lower())
    if not found:
        raise SpiralError(f"--topology is {text!r}; allowed: a topology such as v5p:4x4x4, or a type such as v5p-128")
    name = found[1] or found[3]
    generation = next((g for g in GENERATIONS if name in (g.name, *g.aliases)), None)
    if generation is None:
        known = ", ".join(g.name for g in GENERATIONS)
        raise SpiralError(f"--topology is {text!r}, but there is no generation {name!r}; allowed: {known}")
    if found[2]:
        wanted = tuple(map(int, found[2].split("x")))
        fitting = [shape for shape in generation.shapes if shape == wanted]
        chips, size = float(math.prod(wanted)), f"the shape {found[2]}"
    else:
        chips = int(found[4]) / generation.counted_cores
        fitting = [shape for shape in generation.shapes if math.prod(shape) == chips]
        size = f"{found[4]} ({'chips' if generation.counted_cores == 1 else 'TensorCores, two a chip'})"
    if fitting:
        return Slice(generation, fitting[0])
    why = f"but no {generation.name} slice has {size}"
    raise SpiralError(f"--topology is {text!r}, {why}; allowed, the nearest: {_nearest(generation, chips)}")


def describe_devices(chips: Slice, num_slices: int = 1) -> list[jax.Device]:
    """Devices to compile for that need not be there.

    The TPU compiler is loaded into this process, which afterwards must not use TPUs of its own.

    Args:
      chips: the slice.
      num_slices: how many of it, connected by the data-center network; then every device has a `slice_index`.

    Raises:
      SpiralError: libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise SpiralError("--topology needs libtpu, which is not installed; allowed: pip install 'spiral_jax[tpu]'")
    from jax.experimental import topologies

    for name, value in {
        # Other processes may have loaded it, and nobody is to be asked which TPU this is.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        # What the answer would have been; else there are errors on stderr that mean nothing.
        "TPU_ACCELERATOR_TYPE": chips.accelerator_type,
        "TPU_WORKER_HOSTNAMES": "localhost",
    }.items():
        os.environ.setdefault(name, value)
    options: dict[str, str | int] = {}
    if chips.generation.name == "v4":
        options["chip_config_name"] = "megacore"
    if num_slices > 1:
        options["num_slices"] = num_slices
    return topologies.get_topology_desc(str(chips), "tpu", **options).devices


@contextlib.contextmanager
def no_compilation_cache():
    """Turns off the persistent cache: of programs for devices that are not there it takes what it cannot give back."""
    enabled = jax.config.jax_enable_compilation_cache

    def enable(value: bool):
        jax.config.update("jax_enable_compilation_cache", value)
        # jax looks at the setting once, when it first compiles, unless told to look again.
        compilation_cache.reset_cache()

    enable(False)
    try:
        yield
    finally:
        enable(enabled)


def _nearest(generation: Generation, chips: float) -> str:
    """The slices nearest in size, both ways to name them."""
    by_distance = sorted(generation.shapes, key=lambda shape: abs(math.log(math.prod(shape) / max(chips, 0.5))))
    nearest = sorted(by_distance[:4], key=math.prod)
    return ", ".join(f"{Slice(generation, shape)} ({Slice(generation, shape).accelerator_type})" for shape in nearest)


def _times(shape: Shape) -> str:
    return "x".join(map(str, shape))
