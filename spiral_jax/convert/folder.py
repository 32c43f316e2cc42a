"""A model in a folder as the Hugging Face hub has them: an export of ours, or any GPT-NeoX."""

from pathlib import Path

import numpy as np
from etils import epath

from spiral_jax.convert.architecture import Fields, config_from_huggingface
from spiral_jax.convert.tensors import params_from_tensors
from spiral_jax.convert.weights import Weights
from spiral_jax.data.json_files import MAX_CONFIG_BYTES, read_json_object
from spiral_jax.data.staging import fetched, unfinished
from spiral_jax.data.storage import reachable_path
from spiral_jax.errors import SpiralError, Unreachable
from spiral_jax.model.config import ModelConfig
from spiral_jax.model.neox import param_dtype

CONFIG = "config.json"


def is_huggingface(folder: Path | epath.Path) -> bool:
    """Whether a folder's `config.json` is one of Hugging Face's; a run directory has one of ours."""
    try:
        return "model_type" in read_json_object(folder / CONFIG, MAX_CONFIG_BYTES)
    except Unreachable:
        raise
    except SpiralError:
        return False


def read_config(folder: Path | epath.Path, dtype: str = "float32") -> tuple[ModelConfig, int]:
    """The architecture of a folder's model, and the longest input it was made for.

    Args:
      folder: with config.json.
      dtype: what the model is to compute in.

    Raises:
      SpiralError: the file is missing or damaged, or describes another architecture.
    """
    values, name = read_json_object(folder / CONFIG, MAX_CONFIG_BYTES), str(folder / CONFIG)
    config = config_from_huggingface(values, dtype, name)
    return config, Fields(values, name).read("max_position_embeddings", int, 2048)


def read_params(folder: Path | epath.Path, config: ModelConfig) -> dict:
    """The parameters of a folder's model, as NumPy arrays in the dtype that parameters have.

    Raises:
      SpiralError: files that are missing or damaged, or tensors that are not those of the architecture.
    """
    with fetched(folder, ("*.safetensors", "*.json")) as here:
        return params_from_tensors(config, Weights(here), np.dtype(param_dtype(config)), str(folder))


def output_folder(flag: str, given: str | None, replaceable: frozenset[str] = frozenset()) -> epath.Path:
    """The absolute path of a folder to make, which may be on a bucket.

    Args:
      flag: how it is called in errors.
      given: the path; it must not be there, or be empty.
      replaceable: names of files that it may hold all the same, beside those of a copy to a bucket that broke off.

    Raises:
      SpiralError: not given, not a folder, or one that holds something else.
    """
    allowed = "a folder that is new or empty"
    if not given:
        raise SpiralError(f"--{flag} is missing; allowed: {allowed}")
    folder = reachable_path(f"--{flag}", given)
    if folder.exists() and not folder.is_dir():
        raise SpiralError(f"--{flag} {folder} is a file; allowed: {allowed}")
    foreign = sorted({path.name for path in folder.glob("*")} - replaceable - unfinished(folder))
    if foreign:
        raise SpiralError(f"--{flag} {folder} holds {foreign[0]}; allowed: {allowed}")
    return folder
