"""Reads a model from a folder as the Hugging Face hub has them: an export of ours, or any GPT-NeoX."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from spiral_jax.convert.fields import Fields
from spiral_jax.convert.huggingface import config_from_huggingface, params_from_tensors
from spiral_jax.convert.weights import Weights
from spiral_jax.errors import SpiralError
from spiral_jax.model.config import ModelConfig
from spiral_jax.model.neox import param_dtype

CONFIG = "config.json"


def is_huggingface(folder: Path) -> bool:
    """Whether a folder's `config.json` is one of Hugging Face's; a run directory has one of ours."""
    try:
        return "model_type" in json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError, TypeError):
        return False


def read_config(folder: Path, dtype: str = "float32") -> tuple[ModelConfig, int]:
    """The architecture of a folder's model, and the longest input it was made for.

    Args:
      folder: with config.json.
      dtype: what the model is to compute in.

    Raises:
      SpiralError: the file is missing or damaged, or describes another architecture.
    """
    values, name = _read_json(folder / CONFIG), str(folder / CONFIG)
    config = config_from_huggingface(values, dtype, name)
    return config, Fields(values, name).read("max_position_embeddings", int, 2048)


def read_params(folder: Path, config: ModelConfig) -> dict:
    """The parameters of a folder's model, as NumPy arrays in the dtype that parameters have.

    Raises:
      SpiralError: files that are missing or damaged, or tensors that are not those of the architecture.
    """
    return params_from_tensors(config, Weights(folder), np.dtype(param_dtype(config)), str(folder))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise SpiralError(f"{path}: no such file; allowed: a Hugging Face folder has one") from None
    except (OSError, ValueError) as error:
        raise SpiralError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(values, dict):
        raise SpiralError(f"{path}: found {type(values).__name__}; allowed: a JSON object")
    return values
