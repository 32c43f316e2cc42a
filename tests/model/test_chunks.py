"""Down-scale and up-scale alone, for every geometry of small chunks, against the reference's loops."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
import reference

from spiral_jax.model.chunks import Level
from spiral_jax.model.config import ModelConfig
from spiral_jax.model.iteration import down_scale, up_scale

D = 6
CONFIG = ModelConfig(d_model=D, num_heads=1, rotary_fraction=0, dtype="float64")
GEOMETRIES = [
    (Level(g, w, s), length)
    for g in (2, 3, 5)
    for w, s, length in itertools.product(range(g), (g - 1, 2 * g + 1), (1, g, 3 * g - 1))
    if Level(g, w, s).num_chunks(length) > 0
]
POOLED = [(level, length) for level, length in GEOMETRIES if level.shift == level.chunk - 1]


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    return {
        "h": rng.standard_normal((2, 19, D)),
        "scorer": {"kernel": rng.standard_normal((D, 1))},
        "allocator": {g: {"kernel": rng.standard_normal((D, g)), "bias": rng.standard_normal(g)} for g in (2, 3, 5)},
    }


@pytest.mark.parametrize("pooling", ["self_aggregation", "mean"])
def test_down_scale(arrays, pooling, x64):
    config = dataclasses.replace(CONFIG, pooling=pooling)

    def every_geometry(h_BxLxD, scorer):
        return [down_scale(config, level, {"scorer": scorer}, h_BxLxD[:, :length]) for level, length in POOLED]

    with x64(True):
        results = jax.jit(every_geometry)(arrays["h"], arrays["scorer"])
    step = reference.Weights({"scorer.weight": arrays["scorer"]["kernel"].T})
    for (level, length), z_BxNxD in zip(POOLED, results, strict=True):
        for h_LxD, z_NxD in zip(arrays["h"][:, :length], z_BxNxD, strict=True):
            expected_NxD = reference.down_scale({"pooling": pooling}, step, level._asdict(), h_LxD)
            np.testing.assert_allclose(z_NxD, expected_NxD, rtol=0, atol=1e-12, err_msg=f"{level} {length}")


@pytest.mark.parametrize("allocation, update_scale", [("learned", "sqrt"), ("uniform", "linear")])
def test_up_scale(arrays, allocation, update_scale, x64):
    model = dataclasses.replace(CONFIG, allocation=allocation, update_scale=update_scale)

    def every_geometry(h_BxLxD, allocators):
        return [
            up_scale(
                model, level, {"allocator": allocators[level.chunk]}, h_BxLxD[:, : level.num_chunks(length)], length
            )
            for level, length in GEOMETRIES
        ]

    with x64(True):
        results = jax.jit(every_geometry)(arrays["h"], arrays["allocator"])
    config = {"allocation": allocation, "update_scale": update_scale}
    for (level, length), e_BxLxD in zip(GEOMETRIES, results, strict=True):
        allocator = arrays["allocator"][level.chunk]
        tensors = {"allocator.weight": allocator["kernel"].T, "allocator.bias": allocator["bias"]}
        for zhat_NxD, e_LxD in zip(arrays["h"][:, : level.num_chunks(length)], e_BxLxD, strict=True):
            u_LxD = reference.up_scale(config, reference.Weights(tensors), level._asdict(), zhat_NxD, length)
            expected_LxD = reference.right_shift(level._asdict(), u_LxD)
            np.testing.assert_allclose(e_LxD, expected_LxD, rtol=0, atol=1e-12, err_msg=f"{level} {length}")
