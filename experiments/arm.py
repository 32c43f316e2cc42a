"""The configuration of one arm of a study, for the commands that take one.

    python -m spiral_jax.train --config=experiments/arm.py:main_table,small,spiral_l --workdir=DIR --config.seed=1
    python -m spiral_jax.describe --config=experiments/arm.py:main_table,full,1.4b-spiral_b

The argument is STUDY,EDITION,ARM (docs/studies.md).
"""

from experiments.design import load
from spiral_jax.errors import require


def get_config(argument: str = ""):
    """The configuration of `STUDY,EDITION,ARM`."""
    parts = argument.split(",")
    require(len(parts) == 3, "experiments/arm.py: the argument", argument, "STUDY,EDITION,ARM")
    study, edition, arm = parts
    return load(study, edition).arm(arm).values
