"""Measured TPU runs, what their program does, and the constants of `predict` fitted to them.

Four runs of one generation do not determine much. A benchmark of their loss by its authors gives two numbers: what a
logit costs (`LOSS_SECONDS`) and the efficiency of matrix products, 0.80. The efficiency of attention is fitted to the
four runs, one constant to four points; they computed blocks of 512 by 512 scores, a tenth fewer than are counted here.
That of memory they leave open: with any from 0.3 to 0.8, and attention's fitted again (0.65 down to 0.41), all four
come out within 8 %; it is assumed to be 0.7.
"""

import dataclasses
import importlib.metadata
import itertools
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from spiral_jax.data import atomic
from spiral_jax.hardware import parse_slice
from spiral_jax.roofline import hlo, work
from spiral_jax.roofline.compiling import compile_described
from spiral_jax.roofline.predict import FITTED, Constants, Cost, cost, places_of, total
from spiral_jax.roofline.slices import describe_devices
from tpu.llama import LOSS_BLOCK, Llama, lower_train_step

FREE = ("attention_efficiency",)
BOUNDS = (0.3, 1.0)
# What Levanter's loss (its XLA form, the default on TPUs when the runs were made) takes on a v5p chip for every logit,
# forward and backward, besides its four matrix products. From .agents/projects/linear_ce_loss.md of
# marin-community/marin, vocabulary 128,256: 0.24 million tokens/s a chip with d_model 512 (0.96 on four), 39 thousand
# with 8192. Two equations, whose other unknown is the efficiency of the products: 0.80. The loss of `llama` is another
# program, with less to do by its count of bytes, and so is this package's.
LOSS_SECONDS = 21e-12


class Run(NamedTuple):
    """A run that others measured.

    Attributes:
      name: of the run.
      model: its sizes.
      topology: the slice; the files tell the number of chips only.
      sequences: per step.
      seconds: per step, training time by steps.
    """

    name: str
    model: Llama
    topology: str
    sequences: int
    seconds: float


class Count(NamedTuple):
    """The work of one step on one device.

    Attributes:
      costs: `compact`ed, without the memory traffic of the loss.
      logits: that the loss needs.
      dense_flops: of matrix products outside kernels, without padding.
      hbm_bytes: read and written in HBM.
      collective_bytes: of collectives, as `work.Collective` has them.
      kernels: executions of attention kernels.
    """

    costs: tuple[Cost, ...]
    logits: int
    dense_flops: int
    hbm_bytes: float
    collective_bytes: float
    kernels: int


def measured_runs() -> tuple[Run, ...]:
    """Levanter on TPU v5p: bfloat16, full rematerialization, scanned layers, 4096 tokens, a vocabulary of 128,256.

    From the files experiments/speedrun/adamh_qwen3_scaling/*/speedrun_results.json of marin-community/marin.
    """
    return (
        Run("130m", Llama(6, 512, 1792, 8, 8), "v5p:2x2x1", 128, 0.957),
        Run("300m", Llama(12, 768, 2688, 12, 12), "v5p:2x2x1", 128, 1.719),
        Run("520m", Llama(24, 1024, 3584, 16, 8), "v5p:2x2x2", 256, 3.783),
        Run("1_2b", Llama(16, 2048, 7168, 16, 8), "v5p:2x2x4", 256, 2.736),
    )


def compile_run(run: Run) -> str:
    """Text of the run's step, compiled for its slice, which need not be there. Takes about a minute.

    Raises:
      SpiralError: libtpu is not installed.
    """
    lowered = lower_train_step(run.model, run.sequences, describe_devices(parse_slice(run.topology)))
    return compile_described(lowered)[1]


def count(run: Run, text: str) -> Count:
    """The work in a run's compiled step."""
    chips = parse_slice(run.topology)
    places = places_of(describe_devices(chips))
    found = work.operations(hlo.parse(text))
    tokens = run.sequences * run.model.length // chips.chips
    costs = []
    for operation in found:
        one = cost(operation, chips, places)
        # The loop over the blocks of the loss; that over the layers has another number of iterations.
        in_loss = operation.times == tokens // LOSS_BLOCK
        costs.append(one._replace(hbm=0.0) if in_loss else one)
    return Count(
        compact(costs),
        tokens * run.model.vocab,
        work.dense_flops(found),
        work.hbm_bytes(found),
        sum(traffic.bytes for traffic in work.collectives(found).values()),
        sum(operation.times for operation in found if operation.kernel),
    )


def predict_run(counted: Count, constants: Constants = FITTED) -> float:
    """Seconds of a step of a measured run."""
    return total(counted.costs, constants).step_seconds + counted.logits * LOSS_SECONDS


def compact(costs: Iterable[Cost]) -> tuple[Cost, ...]:
    """Fewer costs of the same total for any constants: communication, and traffic without arithmetic, are added up."""
    kept, added = [], Cost(1)
    for one in costs:
        step = Cost(1, *(one.times * seconds for seconds in one[1:]))
        if step.matmul or step.attention:
            kept.append(step._replace(ici=0.0, dcn=0.0))
            step = Cost(1, ici=step.ici, dcn=step.dcn)
        added = Cost(1, *(a + b for a, b in zip(added[1:], step[1:], strict=True)))
    return (added, *kept)


def fit(
    counts: Sequence[Count], seconds: Sequence[float], free: Sequence[str] = FREE, start: Constants = FITTED
) -> Constants:
    """The efficiencies, within BOUNDS, that minimize the squares of the logarithms of predicted by measured time.

    Args:
      counts: work of each run.
      seconds: measured, of each run.
      free: names of the constants to fit.
      start: where the others come from.
    """

    def squares(values: Sequence[float]) -> float:
        constants = dataclasses.replace(start, **dict(zip(free, values, strict=True)))
        return sum(
            math.log(predict_run(counted, constants) / measured) ** 2
            for counted, measured in zip(counts, seconds, strict=True)
        )

    # A grid, then finer ones around the best of it: few constants, and kinks where an operation's bound changes.
    low, high = BOUNDS
    step = 0.1
    best = min(itertools.product([low + i * step for i in range(8)], repeat=len(free)), key=squares)
    while step > 1e-4:
        step /= 2
        around = [sorted({min(high, max(low, x + d * step)) for d in (-2, -1, 0, 1, 2)}) for x in best]
        best = min(itertools.product(*around), key=squares)
    return dataclasses.replace(start, **dict(zip(free, (round(x, 3) for x in best), strict=True)))


def leave_one_out(counts: Sequence[Count], seconds: Sequence[float]) -> list[float]:
    """Predicted by measured time of each run, with constants fitted to the others."""
    ratios = []
    for i in range(len(counts)):
        rest = [j for j in range(len(counts)) if j != i]
        constants = fit([counts[j] for j in rest], [seconds[j] for j in rest])
        ratios.append(predict_run(counts[i], constants) / seconds[i])
    return ratios


def save(counts: dict[str, Count], path: str | os.PathLike) -> None:
    """Writes what was counted, with the versions that compiled it."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")}
    runs = {
        name: counted._asdict() | {"costs": [[float(f"{x:.6g}") for x in one] for one in counted.costs]}
        for name, counted in counts.items()
    }
    atomic.write_text(Path(path), json.dumps({"versions": versions, "runs": runs}, indent=1) + "\n")


def load(path: str | os.PathLike) -> dict[str, Count]:
    """Reads what `save` wrote."""
    runs = json.loads(Path(path).read_text(encoding="utf-8"))["runs"]
    return {name: Count(**run | {"costs": tuple(Cost(*one) for one in run["costs"])}) for name, run in runs.items()}
