"""Does it help on tasks that are hierarchies to go from coarse to fine? ListOps by depth, and cfg3b against its floor.

Both tasks are made on the fly and have ground truth (docs/own_targets.md). ListOps asks for the value of every
sub-expression, 1 to 5 deep in training and 1 to 8 when evaluated. What cfg3b costs at least is known: `floor_nats` is
that of the true distribution on the 512 windows that every run is evaluated on. Contrasts are within a task. All of it
is exploratory: nobody has published numbers to reproduce.

`small` is 36 runs of about two minutes on two cores; `full` has the papers' 160M models.
"""

from experiments import pile
from experiments.design import Arm, Contrast, Edition, Study
from spiral_jax.run.config import default_config

# Windows of each edition, and nats per token of the true distribution on the held-out ones; vocabulary of each task.
LENGTHS = {"small": 256, "full": 1024}
FLOORS = {"small": 0.428133, "full": 0.425114}
TASKS = {"listops": 16, "cfg3b": 4}
FAMILIES = ("vanilla", "mesh", "spiral_l")
# Layers (prelude, core, coda) and chunks: four layers of parameters in each.
SMALL = {
    "vanilla": ((4, 0, 0), ()),
    "mesh": ((1, 2, 1), (1, 1)),
    "spiral_l": ((1, 2, 1), (16, 8, 4, 2)),
}


def get_study(edition: Edition) -> Study:
    """The study."""
    is_full = edition == "full"
    arms = []
    for task, vocab_size in TASKS.items():
        for family in FAMILIES:
            values = pile.get_config(f"160m,{family}") if is_full else small(family)
            values.data.examples, values.model.vocab_size = task, vocab_size
            values.train.sequence_length = LENGTHS[edition]
            values.train.steps, values.train.batch_size = (20_000, 256) if is_full else (600, 8)
            values.evaluation.batches = 8
            floor = {"floor_nats": FLOORS[edition]} if task == "cfg3b" else {}
            arms.append(Arm(f"{task}-{family}", values, {"task": task, "family": family} | floor))
    contrasts = [
        Contrast(f"{task}-{ours}", f"{task}-{theirs}", tolerance=0.025)
        for task in TASKS
        for ours, theirs in (("spiral_l", "vanilla"), ("spiral_l", "mesh"), ("mesh", "vanilla"))
        if not is_full or "mesh" not in (ours, theirs)
    ]
    return Study(
        name="hierarchy",
        edition=edition,
        question="Is Spiral-L better at ListOps than a vanilla model of as many parameters?",
        arms=tuple(arms),
        primary=contrasts[0],
        others=tuple(contrasts[1:]),
        learning_rates=(3e-4, 6e-4, 1.2e-3) if is_full else (2e-3, 4e-3, 8e-3),
        seeds=(1, 2, 3),
        slices=("v5p:4x4x4",) if is_full else ("v5e:1x1",),
        exploratory=True,
    )


def small(family: str):
    """A narrow model, and quickstart's recipe."""
    config = default_config()
    config.model.d_model, config.model.num_heads = 96, 2
    layers, config.model.chunks = SMALL[family]
    config.model.prelude_layers, config.model.core_layers, config.model.coda_layers = layers
    config.model.topology = "mesh" if config.model.chunks else "base"
    config.model.dtype = "float32"
    config.model.unroll = True
    config.train.loss_block = 128
    config.optimizer.warmup_fraction = 0.05
    config.checkpoint.every_steps = 300
    return config
