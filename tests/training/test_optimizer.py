"""AdamW, its clipping and decay, and the schedules, against plain NumPy in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spiral_jax.model.config import ModelConfig
from spiral_jax.model.spiralformer import abstract_params
from spiral_jax.training.config import OptimizerConfig
from spiral_jax.training.optimizers import make_optimizer
from spiral_jax.training.optimizers.adamw import decay_mask
from spiral_jax.training.schedules import learning_rate

MODEL = ModelConfig(vocab_size=64, d_model=32, num_heads=4, chunks=(4, 2, 2, 1))


def rates(config: OptimizerConfig, steps: int) -> np.ndarray:
    """The learning rate of every step."""
    schedule = learning_rate(config, steps)
    return np.array([float(schedule(jnp.int32(k))) for k in range(steps)])


@pytest.mark.parametrize("steps, W", [(200, 2), (250, 3), (1000, 10)])
def test_cosine_is_the_recipe(steps, W):
    """docs/spec.md section 5: peak (k + 1) / W for k < W = ceil(1 %), then cosine to 10 % of the peak at the end."""
    peak = 6e-4
    found = rates(OptimizerConfig(peak_learning_rate=peak), steps)
    expected = [
        peak * (k + 1) / W
        if k < W
        else peak * (0.1 + 0.9 * (1 + math.cos(math.pi * (k - (W - 1)) / (steps - 1 - (W - 1)))) / 2)
        for k in range(steps)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert found[0] == pytest.approx(peak / W, rel=1e-6)
    assert found[W - 1] == pytest.approx(peak, rel=1e-6)
    assert found[-1] == pytest.approx(peak / 10, rel=1e-6)
    assert np.all(np.diff(found[W - 1 :]) < 0)


def test_wsd_stays_at_the_peak_then_falls_linearly():
    peak, steps, W, decay = 1e-3, 100, 5, 20
    found = rates(OptimizerConfig(peak_learning_rate=peak, schedule="wsd", warmup_fraction=0.05), steps)
    expected = np.concatenate(
        [
            peak * np.arange(1, W + 1) / W,
            np.full(steps - W - decay, peak),
            peak * (1 - 0.9 * np.arange(1, decay + 1) / decay),
        ]
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert found[-1] == pytest.approx(peak / 10, rel=1e-6)


def test_constant_stays_at_the_peak():
    found = rates(OptimizerConfig(peak_learning_rate=1e-3, schedule="constant", warmup_fraction=0.1), 50)
    np.testing.assert_allclose(found[:5], 1e-3 * np.arange(1, 6) / 5, rtol=1e-6)
    np.testing.assert_allclose(found[4:], 1e-3, rtol=1e-6)


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_warmup_steps_override_the_fraction(schedule):
    config = OptimizerConfig(peak_learning_rate=1.0, schedule=schedule, warmup_steps=7, warmup_fraction=0.5)
    found = rates(config, 60)
    np.testing.assert_allclose(found[:7], np.arange(1, 8) / 7, rtol=1e-6)
    assert found[7] <= 1.0
    last = {"cosine": 0.1, "wsd": 0.1, "constant": 1.0}[schedule]
    assert found[-1] == pytest.approx(last, rel=1e-5)


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_no_warmup_starts_on_the_schedule(schedule):
    found = rates(OptimizerConfig(peak_learning_rate=1.0, schedule=schedule, warmup_steps=0), 40)
    assert 0.99 < found[0] <= 1.0
    assert np.all(np.diff(found) <= 1e-7)


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_shortest_runs_have_a_rate(schedule, steps):
    found = rates(OptimizerConfig(peak_learning_rate=1.0, schedule=schedule), steps)
    assert np.all(np.isfinite(found)) and np.all(found > 0) and np.all(found <= 1)


def test_rate_of_a_long_run_is_exact_at_both_ends():
    """120,818 steps: the float32 of the step count must not blur the ends."""
    config = OptimizerConfig()
    schedule, W = learning_rate(config, 120_818), 1209
    for k, expected in ((0, 6e-4 / W), (W - 1, 6e-4), (120_817, 6e-5)):
        assert float(schedule(jnp.int32(k))) == pytest.approx(expected, rel=1e-6)


def test_matrices_and_embeddings_are_decayed_and_nothing_else():
    params = abstract_params(MODEL)
    mask = decay_mask(params)
    found = {jax.tree_util.keystr(path): decayed for path, decayed in jax.tree_util.tree_leaves_with_path(mask)}
    assert found["['embed']['embedding']"] and found["['head']['kernel']"]
    assert any("scorer" in name for name in found) and any("allocator" in name for name in found)
    for name, decayed in found.items():
        assert decayed == (not name.endswith(("['bias']", "['scale']"))), name
        assert "norm" not in name or not decayed, name


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_adamw_against_numpy(clip_norm):
    """Seven steps, gradients above and below the clip, a weight decay large enough to be seen."""
    config = OptimizerConfig(
        peak_learning_rate=0.1, warmup_steps=3, weight_decay=0.3, clip_norm=clip_norm, epsilon=1e-3
    )
    steps, rng = 7, np.random.default_rng(0)
    shapes = {
        "embed": {"embedding": (5, 4)},
        "norm": {"scale": (4,), "bias": (4,)},
        "core": {"layers": {"out": {"kernel": (2, 4, 3), "bias": (2, 3)}}},
    }
    draw = lambda scale: jax.tree.map(  # noqa: E731
        lambda shape: scale * rng.normal(size=shape), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )
    params = draw(1.0)
    # Norms of about 6, 0.6, 6, ...: clipped every other step.
    grads = [draw((1.0, 0.1)[k % 2]) for k in range(steps)]

    optimizer = make_optimizer(config, steps, MODEL)
    found = jax.tree.map(jnp.float32, params)
    state = optimizer.init(found)
    update = jax.jit(optimizer.update)
    for grad in grads:
        updates, state = update(jax.tree.map(jnp.float32, grad), state, found)
        found = optax.apply_updates(found, updates)

    rate = [0.1 / 3, 0.2 / 3, 0.1] + [
        0.1 * (0.1 + 0.9 * (1 + math.cos(math.pi * i / (steps - 3))) / 2) for i in range(1, steps - 2)
    ]
    # (name, value) of every array.
    leaves = [(path[-1].key, value) for path, value in jax.tree_util.tree_leaves_with_path(params)]
    first = [np.zeros_like(value) for _, value in leaves]
    second = [np.zeros_like(value) for _, value in leaves]
    clipped = 0
    for k, grad in enumerate(grads):
        g = jax.tree.leaves(grad)
        norm = math.sqrt(sum(float((x**2).sum()) for x in g))
        if clip_norm and norm > clip_norm:
            g, clipped = [x * clip_norm / norm for x in g], clipped + 1
        for i, (name, value) in enumerate(leaves):
            first[i] = 0.9 * first[i] + 0.1 * g[i]
            second[i] = 0.95 * second[i] + 0.05 * g[i] ** 2
            unbiased = first[i] / (1 - 0.9 ** (k + 1)), second[i] / (1 - 0.95 ** (k + 1))
            decay = 0.3 * value if name in ("kernel", "embedding") else 0.0
            leaves[i] = name, value - rate[k] * (unbiased[0] / (np.sqrt(unbiased[1]) + 1e-3) + decay)
    assert clipped == (4 if clip_norm else 0)
    for (name, expected), actual in zip(leaves, jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-6, err_msg=name)
