"""A few train steps of a vanilla model and a Spiral-B against the same steps on the CPU of this host."""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from spiral_jax.kernels.choose import kernels_of
from spiral_jax.model.config import ModelConfig
from spiral_jax.parallel.mesh import MeshConfig, make_mesh
from spiral_jax.training.config import OptimizerConfig, StepConfig, TrainConfig
from spiral_jax.training.step import make_program
from tpu.first_hour import points
from tpu.first_hour.findings import Findings, relative_error

STEPS = 3
FAMILIES = {
    "vanilla": dict(prelude_layers=4, core_layers=0, coda_layers=0, chunks=(), topology="base"),
    "spiral_b": dict(prelude_layers=1, core_layers=2, coda_layers=1, chunks=(8, 4, 2, 1), topology="mesh"),
}


# Which of them, in which dtypes; a rehearsal compiles for minutes otherwise.
CASES = {
    "tiny": (("vanilla", "float32"), ("spiral_b", "bfloat16")),
    "full": tuple((family, dtype) for family in FAMILIES for dtype in ("float32", "bfloat16")),
}


class Allowed(NamedTuple):
    """What may lie between two devices.

    Attributes:
      loss: of each step, relative.
      norm: of the gradient, of each step, relative.
      gradient: of the first step, relative error over all parameters.
      movement: where the parameters are after all steps, relative to how far they went. AdamW goes as far for a small
        gradient as for a large one, so those that round to another sign count.
    """

    loss: float
    norm: float
    gradient: float
    movement: float


# Products of float32 are computed in float32 on both (`jax_default_matmul_precision`), but exp and log of v4 and v5e
# are good to 4000 units in the last place only (jax's docs/accuracy.md). For bfloat16, five times and more what lies
# between it and float32 on a CPU: 4e-5, 4e-4, 0.6 % and 5 % (the tiny Spiral-B; tests/tpu/first_hour/test_sections.py).
ALLOWED = {"float32": Allowed(1e-4, 1e-3, 1e-3, 0.05), "bfloat16": Allowed(0.001, 0.01, 0.03, 0.25)}


START = 1e-4  # normal numbers take a logarithm; those of another seed are 1.4 off


class Run(NamedTuple):
    """What a few steps did, on the host.

    Attributes:
      start: parameters before the first.
      gradient: of the first step, times a factor that is the same on all devices.
      losses: of the steps.
      norms: of the gradients.
      end: parameters after the last.
    """

    start: Any
    gradient: Any
    losses: list[float]
    norms: list[float]
    end: Any


def run(findings: Findings, size: str, workdir: str, argument: str) -> None:
    """Compares the device with the CPU, model by model and dtype by dtype."""
    device, cpu = jax.devices()[0], jax.devices("cpu")[0]
    for family, dtype in CASES[size]:
        config = step_config(family, dtype, size)
        attention = kernels_of(device, config.model)[0]
        findings.measured[f"{family} {dtype}"] = {"attention": attention}
        with findings.case(f"{family} {dtype}, attention by {attention}"):
            with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
                ours, reference = steps(config, device), steps(on_cpu(config), cpu)
            compare(findings, family, dtype, ours, reference)


def compare(findings: Findings, family: str, dtype: str, ours: Run, reference: Run) -> None:
    """Checks of one model."""
    name, allowed = f"{family} {dtype}", ALLOWED[dtype]
    findings.measured[name] |= {"losses": ours.losses, "losses_on_cpu": reference.losses}
    findings.at_most(f"{name}: initial parameters, same seed", relative_error(ours.start, reference.start), START)
    for step, (a, b) in enumerate(zip(ours.losses, reference.losses, strict=True), 1):
        findings.at_most(f"{name}: loss of step {step}", abs(a - b) / abs(b), allowed.loss)
    for step, (a, b) in enumerate(zip(ours.norms, reference.norms, strict=True), 1):
        findings.at_most(f"{name}: gradient norm of step {step}", abs(a - b) / abs(b), allowed.norm)
    findings.at_most(f"{name}: gradient", relative_error(ours.gradient, reference.gradient), allowed.gradient)
    moved, expected = (jax.tree.map(np.subtract, one.end, one.start) for one in (ours, reference))
    findings.at_most(f"{name}: movement of the parameters", relative_error(moved, expected), allowed.movement)


def step_config(family: str, dtype: str, size: str) -> StepConfig:
    """A small model whose coarse levels are long enough for the kernel (`full`), or as small as possible."""
    width, length = (256, 1024) if size == "full" else (64, 128)
    parts: dict[str, Any] = {**FAMILIES[family], "dtype": dtype}
    if size != "full":
        parts = points.tiny_parts(parts)
    model = ModelConfig(vocab_size=512, d_model=width, num_heads=width // 64, **parts)
    train = TrainConfig(steps=STEPS, batch_size=4, sequence_length=length, loss_block=128)
    return StepConfig(model, train, OptimizerConfig(warmup_steps=0, schedule="constant"), MeshConfig(1, 1, 1))


def on_cpu(config: StepConfig) -> StepConfig:
    """The same step without a kernel."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, attention="xla"))


def steps(config: StepConfig, device: jax.Device) -> Run:
    """Trains on one device, with batches that depend on the step only."""
    program = make_program(config, make_mesh(config.mesh, [device]))
    with jax.default_device(device):
        state = program.init(jax.random.key(0))
    start, gradient, losses, norms = jax.device_get(state.params), None, [], []
    for step in range(STEPS):
        # Skewed, so that there is something to learn, and gradients do not vanish.
        shape = program.abstract_batch.shape
        rows = np.random.default_rng(step).geometric(0.02, size=shape) % config.model.vocab_size
        state, metrics = program.train_step(state, program.put_rows_of_process(rows.astype(np.int32)))
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["gradient_norm"]))
        if step == 0:
            # AdamW's first moment is then a multiple of the gradient.
            gradient = jax.device_get(optax.tree.get(state.opt_state, "mu"))
    return Run(start, gradient, losses, norms, jax.device_get(state.params))
