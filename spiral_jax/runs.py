"""A run's directory, read back."""

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from spiral_jax.checkpoint import on_default_device, restore_for_inference
from spiral_jax.config import RunConfig
from spiral_jax.errors import SpiralError
from spiral_jax.model.spiralformer import SpiralFormer


def load(path: str | Path, *, step: int | None = None) -> tuple[SpiralFormer, Any]:
    """The model and parameters of a run directory, on the default device.

    `model.apply({"params": params}, tokens_BxL)` gives float32 logits [B, L, V].

    Args:
      path: a run's --workdir.
      step: which checkpoint; None for the newest.

    Returns:
      (model, params).

    Raises:
      SpiralError: no run there, or no such checkpoint.
    """
    workdir = Path(path).resolve()
    if not workdir.is_dir():
        raise SpiralError(f"{path}: no such directory")
    model = SpiralFormer(RunConfig.load(workdir / "config.json").model)
    params, _ = restore_for_inference(workdir, on_default_device(abstract_params(model)), step)
    return model, params


def abstract_params(model: SpiralFormer):
    """Shapes and dtypes of a model's parameters."""
    tokens_1x1 = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return nn.unbox(jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)), tokens_1x1))["params"]
