"""A program over the rows of a batch, for scoring."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from spiral_jax.parallel.placed_model import PlacedModel
from spiral_jax.training import fsdp
from spiral_jax.training.config import StepConfig


def jit_on_rows(config: StepConfig, placed: PlacedModel, of_rows: Callable) -> Any:
    """The jitted (params, *arrays [B, ..]) to what `of_rows` makes of each device's rows, whole on every device.

    Parameters are gathered as in training: what fits there fits here.

    Args:
      config: the run's.
      placed: its model on its mesh.
      of_rows: (model, params, *arrays) to a tree of [B, ..], the rows and the model those of one device.
    """
    specs = fsdp.specs_of(placed.param_shardings)
    local = fsdp.model_of_a_device(config.model, config.train, placed.mesh, specs)
    rows = PartitionSpec(fsdp.ROWS)

    def on_a_device(params, *arrays):
        return of_rows(local, fsdp.gather_rest(params, specs), *arrays)

    def eval_step(params, *arrays: jax.Array):
        in_specs = (specs, *(rows for _ in arrays))
        return fsdp.on_each_device(placed.mesh, on_a_device, in_specs, rows)(params, *arrays)

    return jax.jit(eval_step, out_shardings=placed.everywhere)
