"""Train steps of the papers' models that fit one chip: seconds and memory, to be compared with what was predicted."""

import dataclasses
import statistics
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import pile
from spiral_jax.hardware import peak_bytes
from spiral_jax.model.config import ModelConfig, Remat
from spiral_jax.parallel.mesh import MeshConfig, make_mesh
from spiral_jax.run.config import RunConfig
from spiral_jax.training import costs
from spiral_jax.training.config import StepConfig, TrainConfig
from spiral_jax.training.step import make_program
from tpu.first_hour.findings import Findings

WARM, TIMED = 3, 10
LAYERS = ("prelude_layers", "core_layers", "coda_layers")


class Point(NamedTuple):
    """A step.

    Attributes:
      model: `SIZE,FAMILY` of experiments/pile.py.
      sequences: of 4096 tokens, in one micro-batch.
      remat: what is kept for the backward pass.
    """

    model: str
    sequences: int
    remat: Remat


# All fit the 15.75 GiB of a v5e chip.
POINTS = {
    "160m-vanilla": Point("160m,vanilla", 8, "keep_inputs"),
    "160m-spiral_b": Point("160m,spiral_b", 8, "keep_inputs"),
    "410m-spiral_b": Point("410m,spiral_b", 4, "keep_attention"),
}


def run(findings: Findings, size: str, workdir: str, argument: str) -> None:
    """Times one point."""
    device, config = jax.devices()[0], step_config(argument, size)
    program = make_program(config, make_mesh(config.mesh, [device]))
    state = program.init(jax.random.key(0))
    findings.say("compiling")
    began = time.perf_counter()
    step = program.lowered().compile()
    compiled = time.perf_counter()
    shape = program.abstract_batch.shape
    rows = np.random.default_rng(0).integers(0, config.model.vocab_size, shape, np.int32)
    windows, seconds = program.put_rows_of_process(rows), []
    for number in range(WARM + TIMED):
        started = time.perf_counter()
        state, metrics = step(state, windows)
        loss = float(metrics["loss"])
        seconds.append(time.perf_counter() - started)
        if number < WARM:
            findings.say(f"step {number + 1}: {seconds[-1]:.3f} s, loss {loss:.4f}")
    step_seconds = statistics.median(seconds[WARM:])
    flops, stats = costs.flops(config), device.memory_stats()
    findings.at_most("loss of the last step (it saw one batch only) minus ln(vocabulary)",
                     loss - float(np.log(config.model.vocab_size)), 0)  # fmt: skip
    findings.measured |= {
        "is_rehearsal": size != "full",
        "compile_seconds": compiled - began,
        "step_seconds": step_seconds,
        "seconds": seconds,
        "tokens_per_second": config.train.tokens_per_step / step_seconds,
        "model_flops_per_second": (flops.dense + flops.attention_causal) / step_seconds,
        "peak_bytes": peak_bytes(stats),
        "memory_stats": stats,
        "compiled_peak_bytes": getattr(step.memory_analysis(), "peak_memory_in_bytes", None),
        "loss": loss,
    }


def step_config(name: str, size: str) -> StepConfig:
    """The configuration of a point; `tiny`: of the same kind, small enough for a CPU."""
    point = POINTS[name]
    full = RunConfig.from_dict(pile.get_config(point.model).to_dict())
    model = dataclasses.replace(full.model, remat=point.remat)
    train = dataclasses.replace(full.train, batch_size=point.sequences, accumulation=1)
    if size != "full":
        model = small(model)
        train = TrainConfig(batch_size=2, sequence_length=64, loss_block=64)
    # A learning rate from the first step on: that of the papers' warm-up is too small to show that anything is learned.
    optimizer = dataclasses.replace(full.optimizer, warmup_steps=0)
    return StepConfig(model, train, optimizer, MeshConfig(1, 1, 1))


def small(model: ModelConfig) -> ModelConfig:
    """The same parts, as small as possible."""
    parts = tiny_parts({name: getattr(model, name) for name in ("chunks", *LAYERS)})
    return dataclasses.replace(model, vocab_size=256, d_model=64, num_heads=1, **parts)


def tiny_parts(parts: dict[str, Any]) -> dict[str, Any]:
    """Fields of a ModelConfig with one layer each and two levels: most of a rehearsal is compiling."""
    return parts | {name: min(1, parts[name]) for name in LAYERS} | {"chunks": parts["chunks"][-2:]}
