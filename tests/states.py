"""What tests of checkpoints share: a small configuration, and states of it."""

from types import SimpleNamespace

import jax
import numpy as np

from spiral_jax.model.config import ModelConfig
from spiral_jax.parallel.processes import ALONE
from spiral_jax.run.config import RunConfig
from spiral_jax.run.saves import Clock, Saves
from spiral_jax.training.config import TrainConfig
from spiral_jax.training.divergence import Skips

CONFIG = RunConfig(
    model=ModelConfig(vocab_size=64, d_model=32, num_heads=4, prelude_layers=1, core_layers=1, coda_layers=0,
                      chunks=(2, 1), dtype="float32"),
    train=TrainConfig(steps=10, batch_size=8, sequence_length=16),
)  # fmt: skip
META = {"config": CONFIG.to_dict(), "data": {"step": 4, "fingerprint": "abc"}}


def random_state(layout, step=4, seed=0):
    """A state with every number of it random but its step, laid out as `layout` says."""
    rng = np.random.default_rng(seed)

    def draw(x):
        if np.issubdtype(x.dtype, np.integer):
            return rng.integers(1000, size=x.shape).astype(x.dtype)
        return rng.normal(size=x.shape).astype(x.dtype)

    drawn = jax.tree.map(draw, layout).replace(step=np.int32(step))
    return jax.device_put(drawn, jax.tree.map(lambda x: x.sharding, layout))


def assert_bitwise_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def saves_of(checkpoints, config, **given) -> Saves:
    """A run's `Saves` with nothing around it that could forbid one, or ask for one, but what is `given`."""
    guards = SimpleNamespace(check_claim=lambda: None, watchdog=SimpleNamespace(expect=lambda what, field: None))
    clock, skips = Clock(config.checkpoint), Skips(config.divergence, ())
    around = dict(skips=skips, guards=guards, clock=clock, asked=lambda: False)
    return Saves(checkpoints, config, ["abc"], ALONE, **around | given)
