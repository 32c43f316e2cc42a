"""How long a compiled step takes on a slice: a roofline over its operations, few constants fitted to measured runs."""

import collections
import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from spiral_jax.hardware import Slice
from spiral_jax.kernels import splash
from spiral_jax.roofline.matmul import FLOAT32_PASSES
from spiral_jax.roofline.work import Collective, Kernel, Matmul, Operation

# Products of two [block, head_width] or [block, block] operands that each splash kernel computes per block of scores:
# fwd q k and p v; dq q k once more, do v, ds k; dkv q k a third time, p do, do v, ds q.
KERNEL_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}
# The two chiplets of a chip talk over a link as fast as this many between chips (Google's page on TPU7x).
LINKS_INSIDE_A_CHIP = 6


@dataclasses.dataclass(frozen=True)
class Constants:
    """What of the published peaks a program gets.

    Attributes:
      mxu_efficiency: share of the peak FLOP/s of matrix products, their dimensions padded to the matrix unit's.
      score_operations: vector operations that a splash kernel takes for each score (mask, softmax, conversions).
      hbm_efficiency: share of the peak bandwidth.
      ici_efficiency: share of the links' bandwidth.
      hidden_share: of the time that cores compute, how much communication can at most be hidden.
    """

    mxu_efficiency: float
    score_operations: float
    hbm_efficiency: float = 0.7
    ici_efficiency: float = 0.8
    hidden_share: float = 0.5


# By generation, November 2026: what six runs measured by others on v5p, v5e and v6e say, with programs of libtpu 0.0.52
# (`tpu.calibration`). v4 and tpu7x, of which nothing is known, are given the numbers of their neighbours. The shares of
# memory and links and what is hidden are assumed. Nothing was fitted to a step of this package.
FITTED = {
    "v4": Constants(mxu_efficiency=0.8, score_operations=13.7),
    "v5e": Constants(mxu_efficiency=0.9, score_operations=13.7),
    "v5p": Constants(mxu_efficiency=0.8, score_operations=13.7),
    "v6e": Constants(mxu_efficiency=0.7, score_operations=6.85),
    "tpu7x": Constants(mxu_efficiency=0.7, score_operations=6.85),
}


def constants_of(chips: Slice) -> Constants:
    """Those of a slice's generation."""
    return FITTED[chips.generation.name]


class Place(NamedTuple):
    """Where a device is.

    Attributes:
      slice_index: its slice.
      coords: its chip's place along the axes of the slice.
    """

    slice_index: int
    coords: tuple[int, ...]


class Cost(NamedTuple):
    """Seconds that one execution would take each part of the hardware at its peak.

    Attributes:
      times: executions per step.
      matmul: matrix units, in products outside kernels.
      attention: matrix units, in kernels.
      hbm: memory.
      ici: links within a slice.
      dcn: network between slices.
      vector: vector units, one operation for each score of kernels.
    """

    times: int
    matmul: float = 0.0
    attention: float = 0.0
    hbm: float = 0.0
    ici: float = 0.0
    dcn: float = 0.0
    vector: float = 0.0


class Prediction(NamedTuple):
    """Seconds of a step.

    Attributes:
      step_seconds: all of it.
      alone: what each part of the hardware would take by itself: compute (matrix products outside kernels), attention,
        hbm, ici and dcn.
      limits: step_seconds by what limits them: compute, attention, hbm, and of communication only what is not hidden.
    """

    step_seconds: float
    alone: dict[str, float]
    limits: dict[str, float]

    @property
    def bound(self) -> str:
        """What limits most of the step."""
        return max(self.limits, key=lambda what: self.limits[what])


def places_of(devices: Iterable[jax.Device]) -> list[Place]:
    """Where devices are, described ones too."""
    # A device of a single slice may lack the attribute.
    return [Place(getattr(device, "slice_index", 0), tuple(device.coords)) for device in devices]


def total(costs: Iterable[Cost], constants: Constants) -> Prediction:
    """The costs of a step's operations to its time.

    An operation takes as long as its arithmetic or its memory traffic, whichever is longer, and an attention kernel as
    its products or its softmax. Operations run one after the other. Communication runs beside them, but at most
    `hidden_share` of their time.
    """
    alone = dict.fromkeys(("compute", "attention", "hbm", "ici", "dcn"), 0.0)
    limits = dict(alone)
    for one in costs:
        seconds = {
            "compute": one.matmul / constants.mxu_efficiency,
            "attention": max(one.attention / constants.mxu_efficiency, one.vector * constants.score_operations),
            "hbm": one.hbm / constants.hbm_efficiency,
            "ici": one.ici / constants.ici_efficiency,
            "dcn": one.dcn,
        }
        is_memory_bound = seconds["hbm"] > seconds["compute"] + seconds["attention"]
        for what in alone:
            alone[what] += one.times * seconds[what]
        for what in ("hbm",) if is_memory_bound else ("compute", "attention"):
            limits[what] += one.times * seconds[what]
    return beside(alone, limits, constants)


def beside(alone: dict[str, float], limits: dict[str, float], constants: Constants) -> Prediction:
    """The step whose cores take `limits` without communication, which is hidden beside them as far as it can be."""
    busy = sum(limits.values())
    communication = alone["ici"] + alone["dcn"]
    exposed = max(0.0, communication - constants.hidden_share * busy)
    if exposed:
        limits = limits | {what: exposed * alone[what] / communication for what in ("ici", "dcn")}
    return Prediction(busy + exposed, alone, limits)


def compact(costs: Iterable[Cost]) -> tuple[Cost, ...]:
    """Fewer costs of the same total for any constants: equal ones are one, as is what only communicates or moves."""
    kept: collections.Counter[Cost] = collections.Counter()
    added = Cost(1)
    for one in costs:
        moved = {"ici": one.times * one.ici, "dcn": one.times * one.dcn}
        if one.matmul or one.attention:
            kept[one._replace(times=1, ici=0.0, dcn=0.0)] += one.times
        else:
            moved["hbm"] = one.times * one.hbm
        added = added._replace(**{what: getattr(added, what) + seconds for what, seconds in moved.items()})
    return (added, *(one._replace(times=times) for one, times in kept.items()))


def written(costs: Iterable[Cost]) -> list[str]:
    """Costs as a line of numbers each, in the order of `Cost`."""
    return [" ".join(f"{x:.6g}" for x in one) for one in costs]


def read(lines: Iterable[str]) -> tuple[Cost, ...]:
    """Costs of such lines."""
    return tuple(Cost(int(times), *map(float, seconds)) for times, *seconds in map(str.split, lines))


def cost(operation: Operation, chips: Slice, places: Sequence[Place], block: int | None = None) -> Cost:
    """What an operation costs the devices of a slice at their peak.

    Args:
      operation: of the compiled program.
      chips: the slice.
      places: of the devices.
      block: queries and keys that an attention kernel holds at a time; None for those that this package chooses.
    """
    tile = chips.generation.mxu
    scores = kernel_scores(operation.kernel, chips, block) if operation.kernel else 0.0
    ici, dcn = _communication(operation.collective, chips, places) if operation.collective else (0.0, 0.0)
    return Cost(
        operation.times,
        matmul=sum(padded_flops(product, tile) for product in operation.matmuls) / chips.peak_flops,
        attention=kernel_flops(operation.kernel, scores, chips) / chips.peak_flops if operation.kernel else 0.0,
        hbm=operation.hbm_bytes / chips.hbm_bandwidth,
        ici=ici,
        dcn=dcn,
        vector=scores / chips.vector_rate,
    )


def padded_flops(product: Matmul, tile: int) -> float:
    """Floating-point operations of a product whose dimensions are padded to multiples of `tile`, times its passes."""
    return 2 * product.batch * math.prod(padded(x, tile) for x in (product.m, product.n, product.k)) * product.passes


def kernel_scores(kernel: Kernel, chips: Slice, block: int | None = None) -> float:
    """Scores that a splash kernel computes: whole blocks, of which those above the diagonal are skipped."""
    dtype = jnp.dtype(jnp.float32 if kernel.dtype == "f32" else jnp.bfloat16)
    chosen = splash.block_size(kernel.length, kernel.head_width, dtype, chips.generation.device_kind)
    return kernel.rows * scores_in_blocks(kernel.length, block or chosen)


def scores_in_blocks(length: int, block: int) -> float:
    """Of a head: of causal attention, in blocks of `block` by `block`."""
    blocks = length / block
    return length**2 * (blocks + 1) / (2 * blocks)


def kernel_flops(kernel: Kernel, scores: float, chips: Slice) -> float:
    """Floating-point operations of a splash kernel's products, the head width padded to `mxu`."""
    passes = FLOAT32_PASSES if kernel.dtype == "f32" else 1
    return 2 * scores * padded(kernel.head_width, chips.generation.mxu) * KERNEL_PRODUCTS[kernel.kind] * passes


def padded(size: int, tile: int) -> int:
    """The next multiple of a tile."""
    return -(-size // tile) * tile


def _communication(collective: Collective, chips: Slice, places: Sequence[Place]) -> tuple[float, float]:
    """Seconds on links and on the network between slices, at their peak.

    Over several axes of the torus a collective uses them all at once; over several slices, each slice works first and
    then every device exchanges its part with those of the other slices.
    """
    if collective.kind == "dcn":
        return 0.0, collective.bytes / chips.dcn_bandwidth
    if collective.kind == "collective-permute":
        hops = [_hop(chips, *(places[place] for place in pair)) for pair in collective.groups]
        ici, dcn = (max(column, default=0.0) * collective.bytes for column in zip(*hops, strict=True))
        return ici, dcn
    group = [places[place] for place in collective.groups[0]]
    here = [place for place in group if place.slice_index == group[0].slice_index]
    num_slices = len(group) // len(here)
    if collective.kind == "all-to-all":
        # What goes half round a ring passes n / 2 links, on average n / 4.
        moved, between = collective.bytes * len(here) / 4 * (len(here) > 1), collective.bytes
    else:
        rounds = 2 if collective.kind == "all-reduce" else 1
        moved = rounds * collective.bytes * (len(here) - 1) / len(here)
        between = rounds * collective.bytes / len(here)
    ici = moved / _bandwidth(chips, here) if moved else 0.0
    return ici, between * (num_slices - 1) / num_slices / chips.dcn_bandwidth


def _bandwidth(chips: Slice, group: Sequence[Place]) -> float:
    """Bytes/s at which a device of a group sends over all axes along which the group extends."""
    total, link = 0.0, chips.generation.ici_bandwidth
    for axis, ring in enumerate(chips.ring_bandwidths()):
        extent = len({place.coords[axis] for place in group})
        if extent > 1:
            total += ring if extent == chips.shape[axis] else link
    # Devices of one chip share its links.
    return total / chips.generation.devices if total else LINKS_INSIDE_A_CHIP * link


def _hop(chips: Slice, source: Place, target: Place) -> tuple[float, float]:
    """Seconds per byte from one device to another, on links and between slices."""
    if source.slice_index != target.slice_index:
        return 0.0, 1 / chips.dcn_bandwidth
    link, hops = chips.generation.ici_bandwidth, 0
    for a, b, size, ring in zip(source.coords, target.coords, chips.shape, chips.ring_bandwidths(), strict=False):
        hops += min(abs(a - b), size - abs(a - b)) if ring > link else abs(a - b)
    return (hops / link if hops else 1 / (LINKS_INSIDE_A_CHIP * link)), 0.0
