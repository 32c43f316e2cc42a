"""The components of Spiral-B, one changed at a time: arXiv 2602.11698, table 2.

`full` is the table's eight rows at 410M. `small` has the same changes in a model of 0.2M parameters, trained for a
minute in all: it shows that the path works, and can resolve nothing.
"""

import csv
import re
from pathlib import Path
from typing import Any

from experiments import pile, quickstart
from experiments.design import Arm, Contrast, Edition, Study

TABLE = Path(__file__).parents[1] / "paper" / "ablation.csv"


def get_study(edition: Edition) -> Study:
    """The study."""
    base = pile.get_config("410m,spiral_b") if edition == "full" else small()
    arms = []
    with TABLE.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            values = base.copy_and_resolve_references()
            values.model.update(changes(row["model_fields"]))
            arms.append(Arm(re.sub(r"[^a-z0-9]+", "-", row["change"].lower()), values, {"change": row["change"]}))
    names = [arm.name for arm in arms[1:]]
    tolerance = 0.001 if edition == "full" else 0.03  # routers and scorers are 2 % of parameters at width 64
    return Study(
        name="ablation",
        edition=edition,
        question="Does a loop gain from going from coarse to fine, rather than from fine to coarse?",
        arms=tuple(arms),
        primary=Contrast("main", "fine-to-coarse", tolerance=tolerance),
        others=tuple(Contrast("main", name, tolerance=tolerance) for name in names if name != "fine-to-coarse"),
        seeds=(0,) if edition == "full" else (1,),
        slices=("v5p:4x4x4",) if edition == "full" else ("v5e:1x1",),
        shots=(0, 5) if edition == "full" else (),
    )


def changes(text: str) -> dict[str, Any]:
    """Fields of the model that a row changes."""
    pairs = (change.split("=") for change in text.split("; ") if change)
    return {name: tuple(map(int, value.split())) if " " in value else value for name, value in pairs}


def small():
    """A short run of a narrow model on quickstart's text."""
    values = quickstart.get_config()
    values.model.d_model = 64
    values.train.steps = 60
    return values
