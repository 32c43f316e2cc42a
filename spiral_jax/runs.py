"""A run's directory: what training leaves there, and how the other commands read it back.

WORKDIR/
  config.json        the configuration, every field
  parameters.txt     one line per array
  environment.json   command, git commit, versions and devices of every start
  metrics.jsonl      a row per step
  checkpoints/       parameters, optimizer state, configuration, data state
  tokenizer/         what turned text into ids
  data.json          where the token stores are
  cache/             token stores made from data.paths
  sample.txt         a continuation by the trained model, if asked for
  loss_curve.png     likewise
  profile/           traces of --profile
  tensorboard/       events, if asked for; wandb_id and wandb/ likewise
"""

import contextlib
import fcntl
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from spiral_jax import atomic
from spiral_jax.checkpoint import on_default_device, restore_for_inference
from spiral_jax.config import RunConfig
from spiral_jax.data.prepare import PreparedData
from spiral_jax.data.store import TokenStore
from spiral_jax.data.tokenizers import Tokenizer, load_tokenizer
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
    workdir = run_directory(path)
    model = SpiralFormer(RunConfig.load(workdir / "config.json").model)
    params, _ = restore_for_inference(workdir, on_default_device(abstract_params(model)), step)
    return model, params


def abstract_params(model: SpiralFormer):
    """Shapes and dtypes of a model's parameters."""
    tokens_1x1 = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return nn.unbox(jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)), tokens_1x1))["params"]


def run_directory(path: str | Path | None) -> Path:
    """The absolute path of a run's directory.

    Raises:
      SpiralError: not given, or not a directory.
    """
    if not path:
        raise SpiralError("--workdir is missing: the directory of a run")
    workdir = Path(path).expanduser().resolve()
    if not workdir.is_dir():
        raise SpiralError(f"{workdir}: no such directory")
    return workdir


def save_data(workdir: Path, data: PreparedData) -> None:
    """Leaves the tokenizer and the stores' places in the run's directory."""
    folder = workdir / "tokenizer"
    folder.mkdir(exist_ok=True)
    data.tokenizer.save(folder)
    stores = {"train": data.train, "validation": data.validation}
    places = {name: str(_relative(store.folder, workdir)) if store else None for name, store in stores.items()}
    atomic.write_text(workdir / "data.json", json.dumps(places, indent=2) + "\n")


def open_data(workdir: Path, fingerprint: str) -> PreparedData | None:
    """The stores a run was trained on, if they are where it left them; None if they are not those any more.

    What the paths of the configuration hold today does not matter to a run that has its tokens.
    """
    try:
        stores = {name: TokenStore.open(place) if place else None for name, place in _places(workdir).items()}
        data = PreparedData(**stores, tokenizer=tokenizer_of(workdir))
    except (OSError, ValueError, KeyError, SpiralError):
        return None
    return data if data.fingerprint == fingerprint else None


@contextlib.contextmanager
def claim(workdir: Path) -> Iterator[None]:
    """Holds a run's directory, so that two processes do not write one run.

    Raises:
      SpiralError: another process holds it.
    """
    with (workdir / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SpiralError(f"--workdir {workdir}: another process is training there") from None
        yield


def tokenizer_of(workdir: Path) -> Tokenizer:
    """The tokenizer a run was trained with."""
    return load_tokenizer(workdir / "tokenizer")


def validation_store_of(workdir: Path) -> TokenStore:
    """The validation store of a run.

    Raises:
      SpiralError: the run had none, or it is gone.
    """
    place = _places(workdir)["validation"]
    if place is None:
        raise SpiralError(f"{workdir}: the run has no validation text; give --input")
    return TokenStore.open(place)


def _places(workdir: Path) -> dict[str, Path | None]:
    """Where `data.json` says the train and validation stores are."""
    try:
        places = json.loads((workdir / "data.json").read_text())
        return {name: workdir / places[name] if places[name] else None for name in ("train", "validation")}
    except (OSError, ValueError, KeyError, TypeError):
        raise SpiralError(f"{workdir / 'data.json'}: missing or broken; give --input") from None


def _relative(folder: Path, workdir: Path) -> Path:
    """Relative where the folder moves along with the run."""
    folder = Path(folder).resolve()
    return folder.relative_to(workdir) if folder.is_relative_to(workdir) else folder
