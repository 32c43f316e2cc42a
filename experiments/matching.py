"""What arms have the same of: parameters, training FLOPs, or the seconds that a named TPU slice should take."""

import functools

from experiments.design import Contrast, Study
from spiral_jax.errors import SpiralError, require
from spiral_jax.hardware import parse_slice
from spiral_jax.kernels.splash import LANES
from spiral_jax.roofline.on_paper import estimate
from spiral_jax.training.config import StepConfig

UNITS = {"parameters": "non-embedding parameters", "flops": "training FLOPs", "seconds": "predicted seconds"}


def tokens(config: StepConfig) -> int:
    """That a run trains on."""
    return config.train.steps * config.train.tokens_per_step


def train_flops(config: StepConfig) -> float:
    """Of all steps, attention counted in full: what budgets of studies are in (docs/spec.md section 3)."""
    return config.model.train_flops_per_token(config.train.sequence_length) * tokens(config)


def steps_for_flops(config: StepConfig, budget: float) -> int:
    """Steps that spend a budget of training FLOPs, to the nearest."""
    train = config.train
    return max(1, round(budget / (config.model.train_flops_per_token(train.sequence_length) * train.tokens_per_step)))


def steps_for_seconds(config: StepConfig, slice: str, seconds: float) -> int:
    """Steps that a slice should do in so many seconds, to the nearest.

    Raises:
      SpiralError: no such slice, or one that the run does not divide over.
    """
    return max(1, round(seconds / _needed_step_seconds(config, slice)))


def predicted_seconds(config: StepConfig, slice: str) -> float | None:
    """Of all steps of a run on a TPU slice; None where its batch, model or length does not divide over it.

    By closed forms, so that all arms stand on one footing; they are within 5 % of the compiled points of
    `tpu/predictions` (`tests/roofline/test_on_paper.py`).

    Raises:
      SpiralError: no such slice.
    """
    parse_slice(slice)
    step = StepConfig(config.model, config.train, config.optimizer, config.mesh, config.divergence)
    seconds = _step_seconds(step, slice)
    return None if seconds is None else seconds * config.train.steps


def predicted_chip_hours(config: StepConfig, slice: str) -> float | None:
    """Of all steps, likewise."""
    seconds = predicted_seconds(config, slice)
    return None if seconds is None else seconds * parse_slice(slice).chips / 3600


def check(study: Study) -> list[str]:
    """Whether both arms of every contrast have the same of what they are matched in.

    Returns:
      A line for each contrast.

    Raises:
      SpiralError: they differ by more than the tolerance.
    """
    lines = []
    for contrast in (study.primary, *study.others):
        ours, theirs = (_amount(study, contrast, name) for name in (contrast.arm, contrast.against))
        apart = ours / theirs - 1
        where = f" on {contrast.slice}" if contrast.slice else ""
        says = f"{contrast.arm} against {contrast.against}: {UNITS[contrast.matched]}{where} {ours:,.6g}, {theirs:,.6g}"
        if abs(apart) > contrast.tolerance:
            raise SpiralError(f"{says} differ by {apart:+.2%}; allowed: up to {contrast.tolerance:.2%}")
        lines.append(f"{'primary' if contrast == study.primary else 'exploratory'} contrast {says} ({apart:+.2%})")
    return lines


def _amount(study: Study, contrast: Contrast, name: str) -> float:
    config = study.arm(name).config
    match contrast.matched:
        case "parameters":
            return config.model.non_embedding_parameters
        case "flops":
            return train_flops(config)
    return config.train.steps * _needed_step_seconds(config, contrast.slice)


def _needed_step_seconds(config: StepConfig, slice: str) -> float:
    seconds = predicted_seconds(config, slice)
    require(seconds is not None, "the slice", slice, "one that the batch and the model divide over")
    assert seconds is not None
    return seconds / config.train.steps


@functools.cache
def _step_seconds(config: StepConfig, slice: str) -> float | None:
    chips = parse_slice(slice)
    if config.train.sequence_length % LANES:
        return None
    try:
        config.check_mesh(chips.devices)
    except SpiralError:
        return None
    return estimate(config, chips).step_seconds
