"""The closed form of a step's time against the compiled points, and what it says of more chips and slices."""

import dataclasses
import json
from pathlib import Path

import pytest

from experiments.pile import get_config
from spiral_jax.hardware import parse_slice
from spiral_jax.parallel.mesh import MeshConfig
from spiral_jax.roofline.on_paper import estimate
from spiral_jax.run.config import RunConfig

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
    assert found.alone["compute"] == pytest.approx(alone["matrix_products"], rel=0.07)
    assert found.alone["attention"] == pytest.approx(alone["attention"], rel=0.02)
    assert found.alone["hbm"] == pytest.approx(alone["hbm"], rel=0.12)
    assert found.alone["ici"] == pytest.approx(alone["ici"], rel=0.3)


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
