"""Published numbers of accelerators: peaks, memory, links, TPU slices that can be rented. And this machine's cores."""

import dataclasses
import glob
import math
import os
import re
from collections.abc import Mapping

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
      host_chips: that one host (one process) drives, in slices of several hosts.
      single_host: chips of the largest slice that has one host.
      mxu: rows and columns of one matrix unit.
      dcn_bandwidth: bytes/s to other slices.
      shapes: of slices, in chips.
      zones: of Google Cloud where it is known to be rented out.
      runtime: the image of its hosts (`--version`, `--runtime-version`); empty where only GKE rents it out.
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
    single_host: int
    mxu: int
    dcn_bandwidth: float
    shapes: tuple[Shape, ...]
    zones: tuple[str, ...]
    runtime: str


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
# system_characteristics; there are more cubes, but the compiler also takes shapes that nobody can rent. Zones: the page
# regions-zones there, without those for single tenants; v5p's in Europe is that of GKE's page.
GENERATIONS = (
    Generation(
        "v4", (), "TPU v4", 275e12, devices=1, counted_cores=2, hbm_bandwidth=1228e9, hbm_bytes=int(30.75 * GIB),
        ici_bandwidth=4.5e10, wraps_at=4, host_chips=4, single_host=4, mxu=128, dcn_bandwidth=6.25e9,
        shapes=_shapes("2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x12 8x8x16 8x16x16"),
        zones=("us-central2-b",), runtime="tpu-ubuntu2204-base",
    ),
    Generation(
        "v5e", ("v5litepod",), "TPU v5 lite", 197e12, devices=1, counted_cores=1, hbm_bandwidth=819e9,
        hbm_bytes=int(15.75 * GIB), ici_bandwidth=5e10, wraps_at=16, host_chips=4, single_host=8, mxu=128,
        dcn_bandwidth=3.125e9, shapes=_PLANES,
        zones=("us-central1-a", "us-south1-a", "us-west1-c", "us-west4-a", "europe-west4-b"),
        runtime="v2-alpha-tpuv5-lite",
    ),
    Generation(
        "v5p", (), "TPU v5", 459e12, devices=1, counted_cores=2, hbm_bandwidth=2765e9, hbm_bytes=int(95.74 * GIB),
        ici_bandwidth=1e11, wraps_at=4, host_chips=4, single_host=4, mxu=128, dcn_bandwidth=6.25e9, shapes=_CUBES,
        zones=("us-central1-a", "us-east5-a", "europe-west4-b"), runtime="v2-alpha-tpuv5",
    ),
    Generation(
        "v6e", (), "TPU v6 lite", 918e12, devices=1, counted_cores=1, hbm_bandwidth=1638e9,
        hbm_bytes=int(31.25 * GIB), ici_bandwidth=1e11, wraps_at=16, host_chips=4, single_host=8, mxu=256,
        dcn_bandwidth=12.5e9, shapes=_PLANES,
        zones=(
            "us-central1-b", "us-east1-d", "us-east5-a", "us-east5-b", "us-south1-ai1b", "europe-west4-a",
            "asia-northeast1-b",
        ),
        runtime="v2-alpha-tpuv6e",
    ),
    Generation(
        "tpu7x", (), "TPU7x", 2307e12, devices=2, counted_cores=2, hbm_bandwidth=7380e9, hbm_bytes=int(94.75 * GIB),
        ici_bandwidth=1e11, wraps_at=4, host_chips=4, single_host=4, mxu=256, dcn_bandwidth=12.5e9,
        shapes=(*_shapes("1x1x1"), *_CUBES), zones=("us-central1-c", "us-central1-ai1a"), runtime="",
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
        g = self.generation
        return 1 if self.chips <= g.single_host else self.chips // g.host_chips

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
    def vector_rate(self) -> float:
        """Of one device, numbers a second, each one operation: 1,024 a cycle and TensorCore.

        From the peak, as if a TensorCore had four matrix units: 1.05 (v4), 1.5 (v5e), 1.75 (v5p, v6e) GHz.
        """
        return 1024 * self.peak_flops / (4 * 2 * self.generation.mxu**2)

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


def parse_slice(text: str, field: str = "--topology") -> Slice:
    """A slice by its topology (`v5p:4x4x4`, chips) or accelerator type (`v5p-128`, which counts TensorCores).

    The number in an accelerator type counts chips of v5e (`v5litepod-16` or `v5e-16`) and v6e, cores of the others.

    Args:
      text: either of them.
      field: what the message calls it.

    Raises:
      SpiralError: no such generation, or a size that nobody rents out.
    """
    found = re.fullmatch(r"(\w+):(\d{1,9}(?:x\d{1,9}){1,5})|(\w+)-(\d{1,9})", text.strip().lower())
    if not found:
        raise SpiralError(f"{field} is {text!r}; allowed: a topology such as v5p:4x4x4, or a type such as v5p-128")
    name = found[1] or found[3]
    generation = next((g for g in GENERATIONS if name in (g.name, *g.aliases)), None)
    if generation is None:
        known = ", ".join(g.name for g in GENERATIONS)
        raise SpiralError(f"{field} is {text!r}, but there is no generation {name!r}; allowed: {known}")
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
    raise SpiralError(f"{field} is {text!r}, {why}; allowed, the nearest: {_nearest(generation, chips)}")


def _nearest(generation: Generation, chips: float) -> str:
    """The slices nearest in size, both ways to name them."""
    by_distance = sorted(generation.shapes, key=lambda shape: abs(math.log(math.prod(shape) / max(chips, 0.5))))
    nearest = sorted(by_distance[:4], key=math.prod)
    return ", ".join(f"{Slice(generation, shape)} ({Slice(generation, shape).accelerator_type})" for shape in nearest)


def _times(shape: Shape) -> str:
    return "x".join(map(str, shape))


def region_of(zone: str) -> str:
    """The region that a zone is in: `us-central1` of `us-central1-a`."""
    return zone.rpartition("-")[0]


# Dense bf16 peaks of one device, FLOP/s, by a part of jax's device_kind; some runtimes say `TPU v5p`. Of GPUs: NVIDIA's
# data sheets.
_PEAKS = {
    **{kind: g.peak_flops / g.devices for g in GENERATIONS for kind in (g.device_kind, f"TPU {g.name}")},
    **{"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12},
}


def peak_flops(device_kind: str) -> float | None:
    """FLOP/s of bfloat16 products of one device, by `jax.Device.device_kind`; None where it is not known (CPU)."""
    # The longest name: `TPU v5` is a part of `TPU v5 lite`.
    return _PEAKS.get(max((name for name in _PEAKS if name in device_kind), key=len, default=""))


def peak_bytes(stats: Mapping[str, int] | None) -> int | None:
    """The most that a device has held, by `jax.Device.memory_stats`; None where it does not say.

    A TPU counts what programs need beside their arguments apart, as reserved. Its two peaks may be of two moments, so
    the sum is an upper bound.
    """
    if not stats or "peak_bytes_in_use" not in stats:
        return None
    return stats["peak_bytes_in_use"] + stats.get("peak_bytes_reserved", stats.get("bytes_reserved", 0))


# What the drivers of TPUs, NVIDIA's GPUs (WSL's, too) and AMD's leave there.
ACCELERATOR_FILES = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*", "/dev/dxg", "/dev/kfd")


def has_accelerators() -> bool:
    """Whether this machine has a TPU or a GPU, by its files: no driver is started."""
    return any(glob.glob(pattern) for pattern in ACCELERATOR_FILES)


def usable_cores() -> int:
    """How many of this machine's CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
