"""Published numbers of accelerators: peaks, memory, links, and the TPU slices that can be rented."""

import dataclasses

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
