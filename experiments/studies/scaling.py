"""Loss against training FLOPs: families at several sizes, each with several budgets.

Runs of one budget are iso-FLOP, vanilla and Spiral-L of one size are iso-parameter. Each budget is a run of its own,
as the learning rate falls to the end of it. `full` has the papers' sizes, `small` widths of 64 and 96 on quickstart's
text, a quarter of an hour on two cores.
"""

from ml_collections import ConfigDict

from experiments import pile, quickstart
from experiments.design import Arm, Contrast, Edition, Study
from experiments.matching import steps_for_flops
from spiral_jax.run.config import RunConfig

FULL = dict(sizes=("160m", "410m"), families=("vanilla", "mesh", "spiral_l"), budgets=(1e19, 2e19, 4e19, 8e19))
SMALL = dict(sizes=("d64", "d96"), families=("vanilla", "spiral_l"), budgets=(1e12, 2e12, 4e12))


def get_study(edition: Edition) -> Study:
    """The study."""
    extent = FULL if edition == "full" else SMALL
    text = quickstart.get_config() if edition == "small" else ConfigDict()
    arms = []
    for budget in extent["budgets"]:
        for size in extent["sizes"]:
            for family in extent["families"]:
                values = pile.get_config(f"{size},{family}") if edition == "full" else small(text, size, family)
                values.train.steps = steps_for_flops(RunConfig.from_dict(values.to_dict()), budget)
                name = name_of(size, family, budget)
                arms.append(Arm(name, values, {"size": size, "family": family, "budget": budget}))
    pairs = [
        Contrast(name_of(size, "spiral_l", budget), name_of(size, "vanilla", budget), matched="flops")
        for budget in extent["budgets"]
        for size in extent["sizes"]
    ]
    return Study(
        name="scaling",
        edition=edition,
        question="With as many parameters and training FLOPs, is Spiral-L better than a vanilla model?",
        arms=tuple(arms),
        primary=pairs[-1],
        others=tuple(pairs[:-1]),
        seeds=(0,) if edition == "full" else (1,),
        slices=("v5p:4x4x4",) if edition == "full" else ("v5e:1x1",),
    )


def name_of(size: str, family: str, budget: float) -> str:
    """Of an arm."""
    return f"{size}-{family}-{budget:g}".replace("+", "")


def small(text: ConfigDict, size: str, family: str) -> ConfigDict:
    """A narrow model with quickstart's text and recipe."""
    values = text.copy_and_resolve_references()
    values.model.d_model = int(size.removeprefix("d"))
    if family == "vanilla":
        values.model.prelude_layers, values.model.core_layers, values.model.coda_layers = 4, 0, 0
        values.model.chunks, values.model.topology = (), "base"
    else:
        values.model.chunks = (16, 8, 4, 2)
    return values
