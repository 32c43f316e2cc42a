"""TPU slices that can be rented: published numbers, shapes, and their devices, described without being there."""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re

import jax

from spiral_jax.errors import SpiralError

GIB = 2**30
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Generation:
    """One TPU generation. Per chip where nothing else is said; a device is what JAX calls one.

    Attributes:
      name: as in `v5p:4x4x4`.
      aliases: how accelerator types spell it otherwise.
      device_kind: what `jax.Device.device_kind` says.
      peak_flops: of bfloat16 products, FLOP/s.
      devices: per chip; two TensorCores that share their memory are one device.
      counted_cores: TensorCores per chip as the number in an accelerator type counts them; 1 where it counts chips.
      hbm_bandwidth: bytes/s.
      hbm_bytes: that a program can use, per device.
      ici_bandwidth: bytes/s of one link in one direction.
      wraps_at: chips along an axis from which it is a ring; a shorter one is a line.
      host_chips: that one host (one process) drives.
      mxu: rows and columns of one matrix unit.
      dcn_bandwidth: bytes/s to other slices.
      shapes: of slices, in chips.
    """

    name: str
    aliases: tuple[str, ...]
    device_kind: str
    peak_flops: float
    devices: int
    counted_cores: int
    hbm_bandwidth: float
    hbm_bytes: int
    ici_bandwidth: float
    wraps_at: int
    host_chips: int
    mxu: int
    dcn_bandwidth: float
    shapes: tuple[Shape, ...]


def _shapes(text: str) -> tuple[Shape, ...]:
    return tuple(tuple(map(int, shape.split("x"))) for shape in text.split())


_PLANES = _shapes("1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16")
_CUBES = _shapes(
    "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x4x12 4x8x8 4x8x12 8x8x8 4x12x12 8x8x12 8x8x16 8x12x12 8x12x16 12x12x12 "
    "8x16x16 12x12x16 12x16x16 16x16x16 16x16x24"
)

# Peaks, HBM and DCN bandwidths and links (their "bidirectional ICI bandwidth per chip" is links x two directions):
# docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, read in November 2026; v4's links and DCN from the tables of
# jax-ml.github.io/scaling-book/tpus. Usable HBM: what libtpu 0.0.52 compiles for. Shapes: the same pages, and xpk's
# system_characteristics; there are more cubes, but the compiler also takes shapes that nobody can rent.
GENERATIONS = (
    Generation(
        "v4", (), "TPU v4", 275e12, devices=1, counted_cores=2, hbm_bandwidth=1228e9, hbm_bytes=int(30.75 * GIB),
        ici_bandwidth=4.5e10, wraps_at=4, host_chips=4, mxu=128, dcn_bandwidth=6.25e9,
        shapes=_shapes("2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x12 8x8x16 8x16x16"),
    ),
    Generation(
        "v5e", ("v5litepod",), "TPU v5 lite", 197e12, devices=1, counted_cores=1, hbm_bandwidth=819e9,
        hbm_bytes=int(15.75 * GIB), ici_bandwidth=5e10, wraps_at=16, host_chips=4, mxu=128, dcn_bandwidth=3.125e9,
        shapes=_PLANES,
    ),
    Generation(
        "v5p", (), "TPU v5", 459e12, devices=1, counted_cores=2, hbm_bandwidth=2765e9, hbm_bytes=int(95.74 * GIB),
        ici_bandwidth=1e11, wraps_at=4, host_chips=4, mxu=128, dcn_bandwidth=6.25e9, shapes=_CUBES,
    ),
    Generation(
        "v6e", (), "TPU v6 lite", 918e12, devices=1, counted_cores=1, hbm_bandwidth=1638e9,
        hbm_bytes=int(31.25 * GIB), ici_bandwidth=1e11, wraps_at=16, host_chips=4, mxu=256, dcn_bandwidth=12.5e9,
        shapes=_PLANES,
    ),
    Generation(
        "tpu7x", (), "TPU7x", 2307e12, devices=2, counted_cores=2, hbm_bandwidth=7380e9, hbm_bytes=int(94.75 * GIB),
        ici_bandwidth=1e11, wraps_at=4, host_chips=4, mxu=256, dcn_bandwidth=12.5e9,
        shapes=(*_shapes("1x1x1"), *_CUBES),
    ),
)  # fmt: skip


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
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)+)|(\w+)-(\d+)", text.strip().lower())
    if not found:
        raise SpiralError(f"--topology is {text!r}; allowed: a topology such as v5p:4x4x4, or a type such as v5p-128")
    name = found[1] or found[3]
    generation = next((g for g in GENERATIONS if name in (g.name, *g.aliases)), None)
    if generation is None:
        known = ", ".join(g.name for g in GENERATIONS)
        raise SpiralError(f"--topology is {text!r}; there is no generation {name!r}; allowed: {known}")
    if found[2]:
        shape = tuple(map(int, found[2].split("x")))
        if shape in generation.shapes:
            return Slice(generation, shape)
        nearest = _nearest(generation, math.prod(shape))
        raise SpiralError(
            f"--topology is {text!r}; no {generation.name} slice has the shape {_times(shape)}; nearest: {nearest}"
        )
    count = int(found[4])
    for shape in generation.shapes:
        if math.prod(shape) * generation.counted_cores == count:
            return Slice(generation, shape)
    unit = "chips" if generation.counted_cores == 1 else "TensorCores, two a chip"
    nearest = _nearest(generation, count / generation.counted_cores)
    raise SpiralError(f"--topology is {text!r}; no {generation.name} slice has {count} ({unit}); nearest: {nearest}")


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
        raise SpiralError("--topology needs libtpu, which is not installed: pip install 'spiral_jax[tpu]'")
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
    options = {}
    if chips.generation.name == "v4":
        options["chip_config_name"] = "megacore"
    if num_slices > 1:
        options["num_slices"] = num_slices
    return topologies.get_topology_desc(str(chips), "tpu", **options).devices


@contextlib.contextmanager
def no_compilation_cache():
    """Turns off the persistent cache: of programs for devices that are not there it takes what it cannot give back."""
    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)


def _nearest(generation: Generation, chips: float) -> str:
    """The slices nearest in size, both ways to name them."""
    by_distance = sorted(generation.shapes, key=lambda shape: abs(math.log(math.prod(shape) / max(chips, 0.5))))
    nearest = sorted(by_distance[:4], key=math.prod)
    return ", ".join(f"{Slice(generation, shape)} ({Slice(generation, shape).accelerator_type})" for shape in nearest)


def _times(shape: Shape) -> str:
    return "x".join(map(str, shape))
