"""Prints the table of tpu/scaling.md: step time and MFU of the papers' sizes on 16 to 4,096 chips, by closed forms.

python -m tpu.scaling > tpu/scaling.md        a minute; nothing is compiled
"""

import argparse
import dataclasses
import functools
import math

from experiments.pile import SIZES, get_config
from spiral_jax.hardware import GENERATIONS, Generation, Slice
from spiral_jax.roofline import search
from spiral_jax.roofline.on_paper import estimate
from spiral_jax.roofline.predict import Prediction
from spiral_jax.run.config import RunConfig
from spiral_jax.training import costs
from spiral_jax.training.config import StepConfig

COUNTS = tuple(2**i for i in range(4, 13))
BATCHES = (512, 4096)

HEAD = """# From 16 to 4,096 chips, on paper

Spiral-B on the Pile, sequences of 4,096 tokens, bfloat16. By closed forms (`spiral_jax/roofline/on_paper.py`), which
are within 5 % of the compiled points of [predictions](predictions/README.md); nothing here was compiled, and
nothing has run on a TPU. `fsdp` lies over a slice, `data` over slices, `tensor` is 2 only where 1 does not divide or
fit; of micro-batches, `model.remat` and `train.gather_core` the fastest that fits is shown. MFU counts causal
attention; "limit" is what takes most of the step. v6e slices have 256 chips at most: more are several, joined by the
data-center network. Made by `python -m tpu.scaling > tpu/scaling.md`.
"""
TAIL = """## Where scaling breaks

- A device needs a sequence of its own: with 512 sequences, 512 devices are the end, 1,024 with `tensor` 2. A batch of
  4,096 sequences moves that by eight, and is another recipe.
- `fsdp` has to divide the width: 160m (768) ends at 256 devices on that axis, and goes on with `tensor` or more slices.
- What is gathered and summed per step hardly shrinks with the number of chips, and hides behind at most half of the
  computing (`predict.Constants.hidden_share`, an assumption): where the MFU falls from one row to the next, it shows.
- Heads of 64 fill half of a matrix unit of 128 (v5p), a quarter of one of 256 (v6e): 160m and 410m are limited by
  attention however many chips there are.
"""


def slices(generation: Generation, chips: int) -> tuple[Slice, int] | None:
    """The fewest equal slices with so many chips together."""
    for shape in sorted(generation.shapes, key=math.prod, reverse=True):
        size = math.prod(shape)
        if size <= chips and chips % size == 0:
            return Slice(generation, shape), chips // size
    return None


def layouts(config: StepConfig, chips: Slice, num_slices: int) -> list[tuple[StepConfig, Prediction]]:
    """What fits: with `tensor` 1, or where nothing does, 2."""
    devices = chips.devices * num_slices
    state_on = functools.cache(lambda mesh: costs.state_on(dataclasses.replace(config, mesh=mesh), devices))
    every = [one for one in search.layouts(config, devices) if one.mesh.data == num_slices]
    for tensor in (1, 2):
        fitting = [
            (one, estimate(one, chips, num_slices, state_on(one.mesh)))
            for one in every
            if one.mesh.tensor == tensor and search.should_fit(one, chips, num_slices, state_on(one.mesh))
        ]
        if fitting:
            return fitting
    return []


def row(size: str, config: StepConfig, generation: Generation, count: int) -> str:
    """One line of a table."""
    found = slices(generation, count)
    assert found is not None
    chips, num_slices = found
    best = min(layouts(config, chips, num_slices), key=lambda pair: pair[1].step_seconds, default=None)
    where = f"{num_slices} x {chips}" if num_slices > 1 else str(chips)
    if best is None:
        return f"| {size} | {count:,} | {where} | no mesh divides or fits | | | |"
    (one, guess), seconds = best, best[1].step_seconds
    mfu = costs.flops(one).causal / seconds / (chips.devices * num_slices * chips.peak_flops)
    mesh = f"{one.mesh.data}, {one.mesh.fsdp}, {one.mesh.tensor}"
    how = f"{one.train.accumulation}, {one.model.remat}, {one.train.gather_core}"
    return f"| {size} | {count:,} | {where} | {mesh}; {how} | {seconds:.3f} | {mfu:.1%} | {guess.bound} |"


def main() -> None:
    argparse.ArgumentParser("python -m tpu.scaling", description=__doc__).parse_args()
    print(HEAD)
    for batch in BATCHES:
        for name in ("v5p", "v6e"):
            generation = next(one for one in GENERATIONS if one.name == name)
            print(f"## {name}, {batch:,} sequences a step\n")
            print("| size | chips | slices | data, fsdp, tensor; micro-batches, remat, core | seconds | MFU | limit |")
            print("|---|---|---|---|---|---|---|")
            for size in SIZES:
                config = RunConfig.from_dict(get_config(f"{size},spiral_b").to_dict())
                config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=batch))
                for count in COUNTS:
                    print(row(size, config, generation, count), flush=True)
            print()
    print(TAIL)


if __name__ == "__main__":
    main()
