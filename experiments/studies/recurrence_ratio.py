"""How much of a model should be in the loop? Spiral-L's schedule, layers in all fixed, prelude as long as coda.

`full` is the paper's: 410M, 24 layers, budgets of 8e19 and 16e19 training FLOPs (best at 30 to 40 % there). `small`
has 8 layers of width 96 on quickstart's text and about an hour on two cores.
"""

from experiments import pile, quickstart
from experiments.design import Arm, Contrast, Edition, Study
from experiments.matching import steps_for_flops
from spiral_jax.run.config import RunConfig

FULL = dict(layers=24, loops=(0, 4, 8, 12, 16, 20), budgets=(8e19, 16e19))
SMALL = dict(layers=8, loops=(0, 2, 4, 6), budgets=(6e12, 1.2e13))


def get_study(edition: Edition) -> Study:
    """The study."""
    extent = FULL if edition == "full" else SMALL
    base = pile.get_config("410m,spiral_l") if edition == "full" else small()
    arms = []
    for budget in extent["budgets"]:
        for loop in extent["loops"]:
            values = base.copy_and_resolve_references()
            outside = (extent["layers"] - loop) // 2
            values.model.prelude_layers, values.model.core_layers, values.model.coda_layers = outside, loop, outside
            values.train.steps = steps_for_flops(RunConfig.from_dict(values.to_dict()), budget)
            ratio = round(loop / extent["layers"], 4)
            arms.append(Arm(f"{budget:g}-loop{loop}".replace("+", ""), values, {"ratio": ratio, "budget": budget}))
    third = len(extent["loops"]) // 3  # the ratio that is nearest to the paper's best
    largest = [arm.name for arm in arms[-len(extent["loops"]) :]]
    return Study(
        name="recurrence_ratio",
        edition=edition,
        question="With as many training FLOPs, is it better to have about a third of the layers in the loop than none?",
        arms=tuple(arms),
        primary=Contrast(largest[third], largest[0], matched="flops"),
        others=tuple(Contrast(largest[third], name, matched="flops") for name in largest[1:] if name != largest[third]),
        seeds=(0,) if edition == "full" else (1, 2, 3),
        slices=("v5p:4x4x4",) if edition == "full" else ("v5e:1x1",),
    )  # fmt: skip


def small():
    """A narrow model with quickstart's recipe and learning rate."""
    values = quickstart.get_config()
    values.model.d_model = 96
    values.model.chunks = (16, 8, 4, 2)
    return values
