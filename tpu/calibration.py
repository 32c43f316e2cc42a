"""Measured TPU runs, what their programs do, and the constants of `predict` that follow from them.

Six runs that others measured: four of Levanter on v5p, and one of tpuchat on a single chip of v5e and of v6e each. With
two benchmarks they decide:

- products: on v5p 0.80 of the peak, from a benchmark of Levanter's loss by its authors, which also gives what a logit
  costs (`LOSS_SECONDS`); on v6e 0.70, as tpuchat measured a product of 8192 cubed at 0.695; on v5e 0.90, which its run
  asks for: the only constant that one run alone decides;
- attention: a kernel takes as long as its products or as its softmax, whichever is longer, and the softmax takes so
  many vector operations for each score. That is one number, fitted to all six; v6e, whose vector unit also computes in
  bfloat16, is given half of it.

The share of memory is assumed to be 0.7; with anything from 0.7 to 0.9 all six come within 10 %, v6e's asks for more
than 0.65.
"""

import dataclasses
import importlib.metadata
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from spiral_jax.data import atomic
from spiral_jax.hardware import parse_slice
from spiral_jax.roofline import hlo, work
from spiral_jax.roofline.compiling import compile_described
from spiral_jax.roofline.predict import FITTED, Constants, Cost, compact, cost, places_of, read, total, written
from spiral_jax.roofline.slices import describe_devices
from tpu import llama, single_chip

BOUNDS = (4.0, 30.0)  # of vector operations per score
HALF = ("v6e", "tpu7x")  # whose vector units take two numbers of bfloat16 for one
# What Levanter's loss (its XLA form, the default on TPUs when the runs were made) takes on a v5p chip for every logit,
# forward and backward, besides its four matrix products. From .agents/projects/linear_ce_loss.md of
# marin-community/marin, vocabulary 128,256: 0.24 million tokens/s a chip with d_model 512 (0.96 on four), 39 thousand
# with 8192. Two equations, whose other unknown is the efficiency of the products: 0.80. The loss of `llama` is another
# program, with less to do by its count of bytes, and so is this package's.
LOSS_SECONDS = 21e-12


def constants_for(generation: str, score_operations: float) -> Constants:
    """Of a generation, with so many operations for each score of one whose vector unit takes no bfloat16."""
    return dataclasses.replace(FITTED[generation], score_operations=score_operations / (2 if generation in HALF else 1))


class Run(NamedTuple):
    """A run that others measured.

    Attributes:
      name: of the run.
      model: its sizes.
      topology: the slice; Levanter's files tell the number of chips only.
      sequences: per step.
      seconds: per step, training time by steps.
      block: queries and keys that its attention kernels held at a time.
    """

    name: str
    model: llama.Llama | single_chip.SharedKeys
    topology: str
    sequences: int
    seconds: float
    block: int


class Count(NamedTuple):
    """The work of one step on one device.

    Attributes:
      costs: `compact`ed, without the memory traffic of Levanter's loss.
      logits: of Levanter's loss.
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
    """Levanter: bfloat16, full rematerialization, scanned layers, 4096 tokens, a vocabulary of 128,256. And tpuchat.

    From the files experiments/speedrun/adamh_qwen3_scaling/*/speedrun_results.json of marin-community/marin, and from
    vorushin/tpuchat, notebook 08 with its blog.
    """
    return (
        Run("130m", llama.Llama(6, 512, 1792, 8, 8), "v5p:2x2x1", 128, 0.957, 512),
        Run("300m", llama.Llama(12, 768, 2688, 12, 12), "v5p:2x2x1", 128, 1.719, 512),
        Run("520m", llama.Llama(24, 1024, 3584, 16, 8), "v5p:2x2x2", 256, 3.783, 512),
        Run("1_2b", llama.Llama(16, 2048, 7168, 16, 8), "v5p:2x2x4", 256, 2.736, 512),
        Run("tpuchat_v5e", single_chip.SharedKeys(), "v5e:1x1", 64, 0.881, single_chip.BLOCK),
        Run("tpuchat_v6e", single_chip.SharedKeys(), "v6e:1x1", 64, 0.302, single_chip.BLOCK),
    )


def compile_run(run: Run) -> str:
    """Text of the run's step, compiled for its slice, which need not be there. Takes a minute, tpuchat's many.

    Raises:
      SpiralError: libtpu is not installed.
    """
    devices = describe_devices(parse_slice(run.topology))
    if isinstance(run.model, llama.Llama):
        lowered = llama.lower_train_step(run.model, run.sequences, devices)
    else:
        rows = run.sequences // single_chip.MICRO_BATCHES
        lowered = single_chip.lower_train_step(run.model, rows, single_chip.MICRO_BATCHES, devices[0])
    return compile_described(lowered)[1]


def count(run: Run, text: str) -> Count:
    """The work in a run's compiled step."""
    chips = parse_slice(run.topology)
    places = places_of(describe_devices(chips))
    found = work.operations(hlo.parse(text))
    is_levanter = isinstance(run.model, llama.Llama)
    tokens = run.sequences * run.model.length // chips.chips
    costs = []
    for operation in found:
        one = cost(operation, chips, places, run.block)
        # The loop over the blocks of the loss; that over the layers has another number of iterations.
        in_loss = is_levanter and operation.times == tokens // llama.LOSS_BLOCK
        costs.append(one._replace(hbm=0.0) if in_loss else one)
    return Count(
        compact(costs),
        tokens * run.model.vocab if is_levanter else 0,
        work.dense_flops(found),
        work.hbm_bytes(found),
        sum(traffic.bytes for traffic in work.collectives(found).values()),
        sum(operation.times for operation in found if operation.kernel),
    )


def predict_run(run: Run, counted: Count, constants: Constants | None = None) -> float:
    """Seconds of a step of a measured run.

    Args:
      run: what was measured.
      counted: its work.
      constants: None for `FITTED`.
    """
    return total(counted.costs, constants or FITTED[generation_of(run)]).step_seconds + counted.logits * LOSS_SECONDS


def generation_of(run: Run) -> str:
    return parse_slice(run.topology).generation.name


def fit(runs: Sequence[Run], counts: Sequence[Count], **others: float) -> float:
    """The vector operations per score that minimize the squares of the logarithms of predicted by measured time.

    Args:
      runs: what was measured.
      counts: work of each run.
      others: constants that are to be others.
    """

    def squares(operations: float) -> float:
        found = 0.0
        for run, counted in zip(runs, counts, strict=True):
            constants = dataclasses.replace(constants_for(generation_of(run), operations), **others)
            found += math.log(predict_run(run, counted, constants) / run.seconds) ** 2
        return found

    low, high = BOUNDS
    return min((low + i / 10 for i in range(round(10 * (high - low)) + 1)), key=squares)


def leave_one_out(runs: Sequence[Run], counts: Sequence[Count]) -> list[float]:
    """Predicted by measured time of each run, with operations per score fitted to the others."""
    ratios = []
    for i, run in enumerate(runs):
        rest = [j for j in range(len(runs)) if j != i]
        operations = fit([runs[j] for j in rest], [counts[j] for j in rest])
        ratios.append(predict_run(run, counts[i], constants_for(generation_of(run), operations)) / run.seconds)
    return ratios


def save(counts: dict[str, Count], path: str | os.PathLike) -> None:
    """Writes what was counted, with the versions that compiled it."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")}
    runs = {name: counted._asdict() | {"costs": written(counted.costs)} for name, counted in counts.items()}
    atomic.write_text(Path(path), json.dumps({"versions": versions, "runs": runs}, indent=1) + "\n")


def load(path: str | os.PathLike) -> dict[str, Count]:
    """Reads what `save` wrote."""
    runs = json.loads(Path(path).read_text(encoding="utf-8"))["runs"]
    return {name: Count(**run | {"costs": read(run["costs"])}) for name, run in runs.items()}
