"""Which arrays of a program count as scores or logits, by their shapes alone."""

import pytest

from experiments.pile import get_config
from spiral_jax.roofline.hlo import parse
from spiral_jax.roofline.unwanted import unwanted
from spiral_jax.run.config import RunConfig


@pytest.mark.parametrize(
    "shape, counts",
    [
        ("8,16,4096,4096", True),  # scores of a layer
        ("128,4096,4096", True),
        ("24,8,16,4096,4096", True),  # of all layers
        ("8,4096,50304", True),  # logits
        ("50304,1024", False),  # the embedding
        ("24,8,4096,4096", False),  # the MLP's activations, whose width is the length, of all layers
        ("24,8,4096,1024", False),
        ("8,4096,4096", False),
    ],
)
def test_410m_with_8_rows_on_a_device(shape, counts):
    config = RunConfig.from_dict(get_config("410m,vanilla,v5p-128").to_dict())
    program = (
        "HloModule f, num_partitions=64\n\n"
        f"ENTRY %main (p: bf16[{shape}]) -> bf16[{shape}] {{\n"
        f"  ROOT %p = bf16[{shape}] parameter(0)\n}}\n"
    )
    assert unwanted(parse(program), config, 64) == ([f"bf16[{shape}] p"] if counts else [])
