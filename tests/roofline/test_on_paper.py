"""The closed form of a step's time against the compiled points, and what it says of more chips and slices."""

import dataclasses
import functools
import json
from pathlib import Path

import pytest
from cases import slow

from experiments.pile import get_config
from spiral_jax.errors import SpiralError
from spiral_jax.hardware import parse_slice
from spiral_jax.parallel.mesh import MeshConfig
from spiral_jax.roofline import search
from spiral_jax.roofline.on_paper import estimate, peak_bytes
from spiral_jax.run.config import RunConfig
from spiral_jax.training import costs

POINTS = sorted((Path(__file__).parents[2] / "tpu/predictions").glob("*.json"))


def config_of(name, step) -> RunConfig:
    size, *_, family = name.split("-", 3)
    config = RunConfig.from_dict(get_config(f"{size},{family}").to_dict())
    return dataclasses.replace(
        config,
        mesh=MeshConfig(**step["mesh"]),
        model=dataclasses.replace(config.model, remat=step["remat"]),
        train=dataclasses.replace(config.train, accumulation=step["accumulation"], gather_core=step["gather_core"]),
    )


@pytest.mark.parametrize("path", POINTS, ids=lambda path: path.stem)
def test_compiled_points(path):
    point = json.loads(path.read_text())
    found = estimate(config_of(path.stem, point["step"]), parse_slice(point["slice"]["topology"]))
    expected = point["prediction"]
    alone = expected["seconds_alone"]
    assert found.step_seconds == pytest.approx(expected["step_seconds"], rel=0.05)
    assert found.alone["compute"] == pytest.approx(alone["matrix_products"], rel=0.01)
    assert found.alone["attention"] == pytest.approx(alone["attention"], rel=0.001)
    assert found.alone["hbm"] == pytest.approx(alone["hbm"], rel=0.06)
    assert found.alone["ici"] == pytest.approx(alone["ici"], rel=0.3)


@pytest.mark.parametrize("path", POINTS, ids=lambda path: path.stem)
def test_memory_at_the_peak(path):
    """A little more than the compiled program holds rather than less: what should fit then does."""
    point = json.loads(path.read_text())
    found = peak_bytes(config_of(path.stem, point["step"]), point["slice"]["devices"])
    assert 0.97 < found / point["memory"]["peak_bytes"] < 1.35


@pytest.mark.parametrize("size, family", [("160m", "vanilla"), slow("1.4b", "spiral_b")])
def test_a_slice_starts_from_what_a_search_tries_first(size, family):
    """`pile.py:SIZE,FAMILY,SLICE`; among layouts that should fit, and of each `model.remat` one before the second."""
    config = RunConfig.from_dict(get_config(f"{size},{family},v5p-128").to_dict())
    chips = parse_slice("v5p:4x4x4")
    state_on = functools.cache(lambda mesh: costs.state_on(dataclasses.replace(config, mesh=mesh), 64))
    first, *others = search.in_order(list(search.layouts(config, 64)), chips, 1, state_on)[:4]
    assert (first.mesh, first.model.remat) == (MeshConfig(1, 64, 1), config.model.remat)
    assert first.train.accumulation == config.train.accumulation
    assert first.train.gather_core == config.train.gather_core
    assert len({one.model.remat for one in (first, *others)}) == 4
    assert all(peak_bytes(one, 64) < chips.generation.hbm_bytes for one in (first, *others))


def test_a_slice_without_a_layout_is_named():
    with pytest.raises(SpiralError, match="the slice of 1b,spiral_l is 'v6e:8x8'; allowed: v5p:4x4x4"):
        get_config("1b,spiral_l,v6e:8x8")


def test_several_slices_exchange_gradients():
    """Each device sends its part of the gradients to the other slices' devices and gets the sums, over its own wire."""
    config = RunConfig.from_dict(get_config("160m,spiral_b").to_dict())
    config = dataclasses.replace(config, mesh=MeshConfig(2, 256, 1))
    chips = parse_slice("v6e:16x16")
    found = estimate(config, chips, num_slices=2)
    part = 4 * config.model.total_parameters / 256
    assert found.alone["dcn"] == pytest.approx(2 * part / 2 / chips.generation.dcn_bandwidth)
    one = estimate(dataclasses.replace(config, mesh=MeshConfig(1, 256, 1)), chips)
    assert one.alone["dcn"] == 0 and one.alone["compute"] == pytest.approx(2 * found.alone["compute"])
