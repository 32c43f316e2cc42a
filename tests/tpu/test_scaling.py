"""The table on paper: slices that exist, layouts that divide and fit, and that the page is what the program prints."""

from pathlib import Path

import pytest

from experiments.pile import get_config
from spiral_jax.hardware import GENERATIONS
from spiral_jax.run.config import RunConfig
from tpu import scaling

PAGE = Path(scaling.__file__).with_name("scaling.md")
V5P, V6E = (next(one for one in GENERATIONS if one.name == name) for name in ("v5p", "v6e"))


def config(size):
    return RunConfig.from_dict(get_config(f"{size},spiral_b").to_dict())


@pytest.mark.parametrize("generation, chips, found", [(V5P, 64, "1 v5p:4x4x4"), (V6E, 512, "2 v6e:16x16")])
def test_slices(generation, chips, found):
    one, count = scaling.slices(generation, chips)
    assert f"{count} {one}" == found


@pytest.mark.parametrize("size, generation, chips", [("1.4b", V5P, 64), ("160m", V5P, 1024), ("1b", V6E, 512)])
def test_the_page_is_what_is_printed(size, generation, chips):
    assert scaling.row(size, config(size), generation, chips) in PAGE.read_text().splitlines()


def test_tensor_is_2_only_where_1_does_not_do():
    found = {one.mesh.tensor for one, _ in scaling.layouts(config("160m"), *scaling.slices(V5P, 64))}
    assert found == {1}
    found = {one.mesh.tensor for one, _ in scaling.layouts(config("160m"), *scaling.slices(V5P, 512))}
    assert found == {2}
