"""Which matrix product a `dot` or `convolution` instruction is, and so how many multiply-adds."""

import math
import re
from typing import NamedTuple

import numpy as np

from spiral_jax.roofline.hlo import Array, Instruction, UnreadableProgram

# Times the matrix unit multiplies bfloat16 for a product of float32 with precision `highest`.
FLOAT32_PASSES = 6


class Matmul(NamedTuple):
    """`batch` products of [m, k] and [k, n]: batch * m * n * k multiply-adds, without padding.

    Attributes:
      m: extents of the left operand only.
      n: extents of the right operand only.
      k: contracted extents.
      batch: extents of both operands and the result.
      passes: times the matrix unit multiplies: 1, or for float32 operands 3 with precision `high`, 6 with `highest`.
    """

    m: int
    n: int
    k: int
    batch: int
    passes: int

    @property
    def multiply_adds(self) -> int:
        return self.batch * self.m * self.n * self.k


def matmul(instruction: Instruction) -> Matmul:
    """Reads a `dot` or `convolution`.

    Raises:
      UnreadableProgram: a convolution whose dimension labels are of unknown form.
    """
    left, right = (operand.array for operand in instruction.operands)
    if instruction.opcode == "convolution":
        return _convolution(instruction, left, right)
    batch = instruction.numbers("lhs_batch_dims")
    contracted = instruction.numbers("lhs_contracting_dims")
    not_n = (*instruction.numbers("rhs_batch_dims"), *instruction.numbers("rhs_contracting_dims"))
    return Matmul(
        m=math.prod(extent for dim, extent in enumerate(left.dims) if dim not in (*batch, *contracted)),
        n=math.prod(extent for dim, extent in enumerate(right.dims) if dim not in not_n),
        k=math.prod(left.dims[dim] for dim in contracted),
        batch=math.prod(left.dims[dim] for dim in batch),
        passes=_passes(instruction, left, right),
    )


def _convolution(instruction: Instruction, left: Array, right: Array) -> Matmul:
    """Products as the TPU compiler writes them: heads and the like become padded, reversed or dilated windows."""
    labels = re.fullmatch(r"(\w+)_(\w+)->(\w+)", instruction.attributes.get("dim_labels", ""))
    if not labels:
        raise UnreadableProgram(f"convolution {instruction.name} has dimension labels of unknown form")
    lhs, rhs, out = (
        dict(zip(part, array.dims, strict=True))
        for part, array in zip(labels.groups(), (left, right, instruction.array), strict=True)
    )
    groups = int(instruction.attributes.get("feature_group_count", 1))
    groups *= int(instruction.attributes.get("batch_group_count", 1))
    m, n, k, batch = out["b"], out["f"] // groups, rhs["i"], groups
    for dim, window in enumerate(_windows(instruction, sum(label.isdigit() for label in lhs))):
        places = {"lhs": lhs[str(dim)], "rhs": rhs[str(dim)], "out": out[str(dim)]}
        pairs = _pairs(places, window)
        if places["rhs"] == 1:
            m *= pairs
        elif places["out"] == 1:
            k *= pairs
        elif places["lhs"] == 1:
            n *= pairs
        elif pairs == places["lhs"] == places["rhs"] == places["out"]:
            batch *= pairs
        elif pairs % places["out"] == 0:
            m, k = m * places["out"], k * (pairs // places["out"])
        else:
            # Windows cut off at the border: not a rectangular product, but as many multiply-adds.
            m *= pairs
    return Matmul(m, n, k, batch, _passes(instruction, left, right))


def _windows(instruction: Instruction, num_dims: int) -> list[dict[str, tuple[int, ...]]]:
    fields = dict(part.split("=") for part in instruction.attributes.get("window", "").strip("{}").split())
    defaults = {"size": "1", "pad": "0_0", "stride": "1", "lhs_dilate": "1", "rhs_dilate": "1"}
    parts = {key: fields[key].split("x") if key in fields else [value] * num_dims for key, value in defaults.items()}
    return [{key: tuple(map(int, parts[key][dim].split("_"))) for key in parts} for dim in range(num_dims)]


def _pairs(places: dict[str, int], window: dict[str, tuple[int, ...]]) -> int:
    """(output, window) places along one dimension that meet an element of the input: neither padding nor a hole."""
    (stride,), (hole,), (spread,) = window["stride"], window["lhs_dilate"], window["rhs_dilate"]
    begins = np.arange(places["out"]) * stride - window["pad"][0]
    total = 0
    for tap in range(places["rhs"]):
        at = begins + tap * spread
        total += int(np.sum((at >= 0) & (at <= (places["lhs"] - 1) * hole) & (at % hole == 0)))
    return total


def _passes(instruction: Instruction, left: Array, right: Array) -> int:
    if algorithm := instruction.attributes.get("algorithm", ""):
        found = re.search(r"_x(\d)$", algorithm)
        return int(found[1]) if found else (FLOAT32_PASSES if algorithm == "dot_f32_f32_f32" else 1)
    if "f32" not in (left.dtype, right.dtype):
        return 1
    precisions = re.findall(r"\w+", instruction.attributes.get("operand_precision", ""))
    return max([{"high": 3, "highest": FLOAT32_PASSES}.get(precision, 1) for precision in precisions], default=1)
