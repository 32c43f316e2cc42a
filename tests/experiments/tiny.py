"""A study of almost nothing, for the tests of the runner; arms are what `fake_run.py` knows."""

import os

from experiments.design import Arm, Contrast, Study
from spiral_jax.run.config import default_config

ARMS = os.environ.get("TINY_ARMS", "plain,other").split(",")


def get_study(edition):
    arms = []
    for name in ARMS:
        values = default_config()
        values.model.vocab_size, values.model.d_model, values.model.num_heads = 256, 16, 2
        values.model.prelude_layers, values.model.core_layers, values.model.coda_layers = 1, 0, 0
        values.model.chunks, values.model.topology = (), "base"
        values.model.dtype = "float32"
        values.train.steps, values.train.batch_size, values.train.sequence_length = 10, 2, 128
        values.optimizer.peak_learning_rate = 0.003
        values.data.stores = ("nowhere",)
        arms.append(Arm(name, values))
    return Study(
        name="tiny",
        edition=edition,
        question="Is anything better than anything?",
        arms=tuple(arms),
        primary=Contrast(ARMS[0], ARMS[-1]),
        learning_rates=(0.002, 0.004),
        seeds=(1, 2),
        slices=("v5e:1x1",),
    )
