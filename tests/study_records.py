"""Records of runs that never ran, with losses that a test chooses."""

import dataclasses
import math
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from experiments import design, record
from experiments.design import Run, Study
from experiments.record import Code, Evaluation, Flops, Parameters, Record, Seconds

DOCUMENTS = 60
Truth = Callable[[Run], float]
TOKENS = np.random.default_rng(0).integers(50, 600, DOCUMENTS)
HARD = np.random.default_rng(1).normal(0, 0.4, DOCUMENTS)


def record_of(study: Study, run: Run, nats: float, **changed) -> Record:
    """A finished run whose documents lose `nats` on average, to rounding, and differ as documents do."""
    config = design.run_config(run)
    rng = np.random.default_rng(zlib.crc32(run.name.encode()))
    documents = HARD + rng.normal(0, 0.02, DOCUMENTS)
    documents += nats - np.average(documents, weights=TOKENS)
    steps = np.unique(np.linspace(1, config.train.steps, min(config.train.steps, record.MOST_ROWS)).astype(int))
    per_token = config.model.train_flops_per_token(config.train.sequence_length)
    tokens = config.train.steps * config.train.tokens_per_step
    falling = nats + (8.3 - nats) * np.exp(-8 * steps / steps[-1]) + rng.normal(0, 0.03, steps.size)
    made = Record(
        study=study.name,
        edition=study.edition,
        run=run.name,
        arm=run.arm.name,
        factors=dict(run.arm.factors),
        seed=run.seed,
        stage=run.stage,
        learning_rate=config.optimizer.peak_learning_rate,
        status="finished",
        reason="",
        command=f"python -m experiments.study run {study.name} --edition={study.edition} --only={run.name}",
        code=Code("a" * 40, "", "c0de"),
        data={"train": "7ra1n", "validation": "va11d"},
        config_hash=design.comparable_hash(config),
        config=design.shaping(config),
        machine="2 synthetic cores",
        versions={"jax": "0.10.2"},
        parameters=Parameters(config.model.non_embedding_parameters, config.model.total_parameters),
        flops=Flops(per_token, per_token * tokens),
        tokens=tokens,
        seconds=Seconds(
            per_token * tokens / 5e10 * (1 + len(config.model.chunks) / 8), {study.slices[0]: per_token * tokens / 4e13}
        ),
        curve=tuple(
            (int(n), int(n) * config.train.tokens_per_step, float(x)) for n, x in zip(steps, falling, strict=True)
        ),
        evaluation={"validation": Evaluation(nats, tuple(np.float16(documents).tolist()), tuple(map(int, TOKENS)))},
    )
    return dataclasses.replace(made, **changed)


def write_records(study: Study, folder: Path, truth: Truth, change: Callable[[Run], dict] = lambda run: {}) -> None:
    """Records of every run of a study: trials, then the runs with the rates that those decide."""
    for stage in ("tune", "seed"):
        for run in study.runs(record.read_all(folder)[0]):
            if run.stage == stage and not math.isnan(truth(run)):
                record.write(record_of(study, run, truth(run), **change(run)), folder)


def noise(run: Run) -> float:
    """A number between -1 and 1 that is the run's own."""
    return zlib.crc32(run.name.encode()) / 2**31 - 1
