"""Products of single instructions, with sizes worked out by hand."""

import pytest

from spiral_jax.roofline.hlo import parse
from spiral_jax.roofline.matmul import Matmul, matmul


def product(left: str, right: str, result: str, attributes: str, opcode: str = "convolution") -> Matmul:
    entry = f"""HloModule m

ENTRY %main () -> f32[] {{
  %l = {left} parameter(0)
  %r = {right} parameter(1)
  ROOT %p = {result} {opcode}(%l, %r), {attributes}
}}
"""
    return matmul(parse(entry).entry.root)


@pytest.mark.parametrize(
    ("left", "right", "result", "attributes", "expected"),
    [
        ("f32[32,48]", "f32[48,64]", "f32[32,64]", "lhs_contracting_dims={1}, rhs_contracting_dims={0}",
         Matmul(32, 64, 48, 1, 1)),
        ("f32[5,32,48]", "f32[48,5,64]", "f32[5,32,64]",
         "lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={1}, rhs_contracting_dims={0}, "
         "operand_precision={highest,default}", Matmul(32, 64, 48, 5, 6)),
        ("f32[2,3,4,7]", "f32[4,7,3,9]", "f32[3,2,9]",
         "lhs_batch_dims={1}, lhs_contracting_dims={2,3}, rhs_batch_dims={2}, rhs_contracting_dims={0,1}, "
         "operand_precision={high,high}", Matmul(2, 9, 28, 3, 3)),
        ("bf16[32,48]", "bf16[48,64]", "f32[32,64]",
         "lhs_contracting_dims={1}, rhs_contracting_dims={0}, operand_precision={highest,highest}",
         Matmul(32, 64, 48, 1, 1)),
        ("f32[32,48]", "f32[48,64]", "f32[32,64]",
         "lhs_contracting_dims={1}, rhs_contracting_dims={0}, algorithm=dot_bf16_bf16_f32_x3",
         Matmul(32, 64, 48, 1, 3)),
    ],
)  # fmt: skip
def test_dots(left, right, result, attributes, expected):
    assert product(left, right, result, attributes, "dot") == expected


@pytest.mark.parametrize(
    ("left", "right", "result", "attributes", "expected"),
    [
        # No window at all.
        ("f32[32,48]", "f32[48,64]", "f32[32,64]", "dim_labels=bf_io->bf", Matmul(32, 64, 48, 1, 1)),
        # Queries, keys and values of 12 heads of 64: [8, 4096, 2*48] by [2*48, 12, 3, 64]. Heads and the 3 are
        # windows over padding alone; the 2 is contracted.
        ("bf16[8,4096,2,48,1,1]", "bf16[2,48,12,3,64,1]", "bf16[8,4096,12,3,64,1]",
         "window={size=1x12x3x2 pad=0_0x11_11x2_2x0_0 rhs_reversal=0x1x1x0}, dim_labels=0b3f12_3i12o0->0b12f3",
         Matmul(8 * 4096, 12 * 3 * 64, 2 * 48, 1, 1)),
        # The gradient of an output projection: the 12 heads are contracted.
        ("bf16[12,8,4096,64,1]", "bf16[12,64,1,48,1]", "bf16[1,8,4096,48,1]",
         "window={size=12x1x1}, dim_labels=0b1f2_0i2o1->0b1f2", Matmul(8 * 4096, 48, 12 * 64, 1, 1)),
        # 3 batches of [4, 5] by [5, 6], with the batch as a window that meets its own element only: inputs at 0, 3, 6
        # (dilated by 3), outputs from 0 by 2, window places 0, 1, 2: 0 = 0 + 0, 3 = 2 + 1, 6 = 4 + 2.
        ("f32[3,4,5]", "f32[3,5,6]", "f32[3,4,6]", "window={size=3 stride=2 lhs_dilate=3}, dim_labels=0bf_0io->0bf",
         Matmul(4, 6, 5, 3, 1)),
        # A true convolution of 3 without padding: 8 outputs see 3 inputs each.
        ("f32[2,10,5]", "f32[3,5,7]", "f32[2,8,7]", "window={size=3}, dim_labels=b0f_0io->b0f",
         Matmul(16, 7, 15, 1, 1)),
        # Padded by 1 on both sides, the first and last output see 2: 28 of 30 pairs.
        ("f32[2,10,5]", "f32[3,5,7]", "f32[2,10,7]", "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f",
         Matmul(2 * 28, 7, 5, 1, 1)),
        # Depthwise over 6 channels.
        ("f32[2,10,6]", "f32[3,1,6]", "f32[2,8,6]", "window={size=3}, dim_labels=b0f_0io->b0f, feature_group_count=6",
         Matmul(16, 1, 3, 6, 1)),
        # Its gradient: 6 groups of the batch, one to each output channel.
        ("f32[12,10,1]", "f32[8,1,6]", "f32[2,3,6]", "window={size=8}, dim_labels=b0f_0io->b0f, batch_group_count=6",
         Matmul(6, 1, 8, 6, 1)),
        # Window of 3 spread by 2 over 10 padded by 2: places -2..9, outputs 0..7 at -2+o, taps +0, +2, +4. Pairs inside
        # 0..9: o=0,1: 2 each; o=2..7: 3 each.
        ("f32[1,10,1]", "f32[3,1,1]", "f32[1,8,1]", "window={size=3 pad=2_0 rhs_dilate=2}, dim_labels=b0f_0io->b0f",
         Matmul(22, 1, 1, 1, 1)),
    ],
)  # fmt: skip
def test_convolutions(left, right, result, attributes, expected):
    assert product(left, right, result, attributes) == expected
