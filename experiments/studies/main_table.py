"""The papers' main table: are looped models of several resolutions better than vanilla ones of as many parameters?

`full` is the 22 rows of arXiv 2602.11698, table 1, as `experiments/pile.py` has them. `small` is four models of 0.8M
parameters on the Python sources of the machine: 28 runs of four to five minutes on two cores.
"""

import csv
import math
from pathlib import Path

from experiments import pile, quickstart
from experiments.design import Arm, Contrast, Edition, Gate, Study

TABLE = Path(__file__).parents[1] / "paper" / "main_table.csv"
# Four layers of parameters in each; prelude, core, coda.
SMALL = {
    "vanilla": ((4, 0, 0), ()),
    "mesh": ((1, 2, 1), (1, 1)),
    "spiral_b": ((1, 2, 1), (8, 4, 2, 1)),
    "spiral_l": ((1, 2, 1), (16, 8, 4, 2)),
}


def get_study(edition: Edition) -> Study:
    """The study."""
    return full() if edition == "full" else small()


def small() -> Study:
    """Quickstart's text and recipe."""
    values = quickstart.get_config()
    values.train.steps = 1200
    arms = []
    for family, (layers, chunks) in SMALL.items():
        own = values.copy_and_resolve_references()
        own.model.prelude_layers, own.model.core_layers, own.model.coda_layers = layers
        own.model.chunks, own.model.topology = chunks, "mesh" if chunks else "base"
        arms.append(Arm(family, own, {"family": family}))
    return Study(
        name="main_table",
        edition="small",
        question="Is Spiral-L better than a vanilla model of as many parameters, each at its best learning rate?",
        arms=tuple(arms),
        # Routers and scorers are 1.7 % of parameters at this width.
        primary=Contrast("spiral_l", "vanilla", tolerance=0.02),
        others=tuple(
            Contrast(arm, against, tolerance=0.02)
            for arm, against in (
                ("mesh", "vanilla"),
                ("spiral_b", "vanilla"),
                ("spiral_b", "mesh"),
                ("spiral_l", "mesh"),
            )
        ),
        # The last was added when the first three were done: vanilla's best was 8e-3, at the edge.
        learning_rates=(2e-3, 4e-3, 8e-3, 16e-3),
        seeds=(1, 2, 3),
        gates=(Gate("vanilla-lr0.004", 4.6, "a trial of 800 steps ended at 4.43 nats, and 8.32 is knowing nothing"),),
        slices=("v5e:1x1",),
        kept=("mesh-seed1", "spiral_b-seed1", "spiral_l-seed1"),
    )


def full() -> Study:
    """The paper's rows with its learning rates, one seed each."""
    arms = []
    with TABLE.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            size, family = row["size"], row["family"]
            values = pile.get_config(f"{size},{family.removesuffix('_anchor')}")
            if family.endswith("_anchor"):
                values.model.topology = "anchor"
            arms.append(Arm(f"{size}-{family}", values, {"size": size, "family": family}))
    matched = [Contrast(f"{size}-spiral_l", f"{size}-vanilla", tolerance=0.002) for size in pile.SIZES]
    shared = [Contrast(f"{size}-spiral_b", f"{size}-mesh", tolerance=0.002) for size in pile.SIZES]
    return Study(
        name="main_table",
        edition="full",
        question="At 1.4B parameters, is Spiral-L better than a vanilla model of as many parameters?",
        arms=tuple(arms),
        primary=matched[-1],
        others=(*matched[:-1], *shared),
        seeds=(0,),
        gates=(Gate("160m-vanilla-seed0", math.log(11.31) + 0.03, "perplexity 11.31 in the paper, and a little more"),),
        slices=("v5p:4x4x4",),
        shots=(0, 5),
    )
