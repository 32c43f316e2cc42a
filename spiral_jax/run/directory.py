"""A run's directory: what training leaves there, and how the other commands read it back.

WORKDIR/
  config.json        the configuration, every field, for people: commands read the one in the checkpoint
  parameters.txt     one line per array
  own_code.json      files of the user's own that the configuration names, with their hashes
  environment.json   command, git commit, versions and devices of every start
  metrics.jsonl      a row per step
  checkpoints/       parameters, optimizer state, configuration, data state
  tokenizer/         what turned text into ids
  data.json          where the token stores are
  cache/             token stores made from data.paths
  damaged/           checkpoints, files and lines that were set aside
  .lock              which process trains
  sample.txt         a continuation by the trained model, if asked for
  loss_curve.png     likewise
  profile/           traces of --profile
  lm_eval/           results of evaluate --tasks
  tensorboard/       events, if asked for; wandb_id and wandb/ likewise

Each is reached by the path that `run_directory` or `workdir_of` gives, an `etils.epath.Path`; its methods are the
only way that files of a run are opened.

WORKDIR may be gs://BUCKET/FOLDER (extra `remote`). There, metrics/ has parts <first step>.jsonl, one every 30 seconds
and one before every checkpoint; a checkpoint is whole if commit_success.txt is in it, and a damaged one stays where it
is, with an object damaged/STEP beside it; .lock is renewed every 30 seconds. cache/, profile/ and tensorboard/ get
there when they are whole, and W&B's files stay on the machine.
"""

import dataclasses
import os
import uuid
from collections.abc import Sequence
from typing import Any

import jax
from etils.epath import Path

from spiral_jax.convert.folder import is_huggingface, read_config, read_params
from spiral_jax.data import atomic
from spiral_jax.data.bucket import is_bucket, is_folder, refusals, remove
from spiral_jax.data.config import DataConfig
from spiral_jax.data.json_files import read_json_object, write_json
from spiral_jax.data.prepared import PreparedData
from spiral_jax.data.storage import LOCAL, Storage, is_url, reachable_path
from spiral_jax.data.store import TokenStore
from spiral_jax.data.tokenizers import Tokenizer, load_tokenizer
from spiral_jax.errors import SpiralError, Unreachable, require
from spiral_jax.model.config import Dtype, ModelConfig
from spiral_jax.model.spiralformer import SpiralFormer, abstract_params
from spiral_jax.parallel.processes import ALONE, Processes
from spiral_jax.run.checkpoint import on_host
from spiral_jax.run.reading import SavedRun, reading

# What is read without being trained on.
RUN_OR_EXPORT = "the directory of a run, or a folder of a GPT-NeoX or an exported model"


def load(path: str | os.PathLike, *, step: int | None = None, dtype: Dtype | None = None) -> tuple[SpiralFormer, Any]:
    """The model and parameters of a run, or of an exported or Hugging Face folder, on the default device.

    `model.apply({"params": params}, tokens_BxL)` gives float32 logits [B, L, V].

    Args:
      path: a run's --workdir, a folder that `python -m spiral_jax.export` wrote, or one of any GPT-NeoX.
      step: which checkpoint of a run; None for the newest.
      dtype: what to compute in: `float32`, `bfloat16` or `float64` (which needs jax_enable_x64); None for what the run
        computes in, and float32 for the other folders.

    Returns:
      (model, params).

    Raises:
      SpiralError: nothing of the kind there, no such checkpoint, or weights that do not fit their architecture.
    """
    config, params = read_model(path, step=step, dtype=dtype)
    check_dtype(config.dtype, "model.dtype")
    return SpiralFormer(config), jax.device_put(params, jax.local_devices()[0])


def read_model(
    path: str | os.PathLike,
    *,
    step: int | None = None,
    dtype: Dtype | None = None,
    processes: Processes = ALONE,
    field: str = "path",
) -> tuple[ModelConfig, dict[str, Any]]:
    """As `load`, but the architecture, and the parameters as NumPy arrays: nothing is put on a device."""
    folder = run_directory(path, field, RUN_OR_EXPORT)
    if is_huggingface(folder):
        require(step is None, "step", step, f"none, as {folder} is no run")
        config, _ = read_config(folder, dtype or "float32")
        return config, read_params(folder, config)
    with reading(folder, step) as saved:
        return read_model_of(saved, dtype=dtype, processes=processes)


def read_model_of(
    saved: SavedRun, *, dtype: Dtype | None = None, processes: Processes = ALONE
) -> tuple[ModelConfig, dict[str, Any]]:
    """The same of a checkpoint that is open already."""
    config = saved.config(processes).model
    if dtype is not None:
        config = dataclasses.replace(config, dtype=dtype)
    return config, saved.restore(on_host(abstract_params(config)))


def check_dtype(dtype: Dtype, field: str) -> None:
    """Raises SpiralError naming `field` if jax does not compute in this dtype here."""
    ok = dtype != "float64" or jax.config.read("jax_enable_x64")
    require(ok, field, dtype, "another one, or JAX_ENABLE_X64=1 in the environment")


def run_directory(
    path: str | os.PathLike | None, field: str = "--workdir", allowed: str = "the directory of a run"
) -> Path:
    """The absolute path of a run's directory; `field` and `allowed` are for errors.

    Raises:
      SpiralError: not given, or not a directory.
    """
    if not path:
        raise SpiralError(f"{field} is missing; allowed: {allowed}")
    folder = reachable_path(field, path)
    if not is_folder(folder):
        raise SpiralError(f"{field} is {str(path)!r}, which does not exist; allowed: {allowed}")
    return folder


def workdir_of(flag: str | None) -> Path:
    """The absolute path of the directory to keep a run in; raises SpiralError if it is not given."""
    if not flag:
        raise SpiralError("--workdir is missing; allowed: the directory to keep the run in")
    return reachable_path("--workdir", flag)


def make_workdir(workdir: Path) -> None:
    """Creates a run's directory if need be.

    Raises:
      SpiralError: it cannot be written.
    """

    def line(why: str) -> str:
        return f"--workdir is {str(workdir)!r}, which cannot be written ({why}); allowed: a directory that can"

    with refusals(workdir, line):
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".probe-{uuid.uuid4().hex}"  # hosts of containers may have one process id
        probe.write_bytes(b"")
        remove(probe)


def save_data(workdir: Path, data: PreparedData) -> None:
    """Leaves the tokenizer and the stores' places in the run's directory."""
    folder = workdir / "tokenizer"
    with atomic.written(folder):
        folder.mkdir(exist_ok=True)
    data.tokenizer.save(folder)
    places = {
        "train": [_relative(source.name, workdir) for source in data.train],
        "validation": _relative(data.validation.name, workdir) if data.validation else None,
    }
    write_json(workdir / "data.json", places)


def open_data(workdir: Path, fingerprints: Sequence[str], storage: Storage = LOCAL) -> PreparedData | None:
    """The stores made of a run's `data.paths`, if they are where it left them; None if they are not those any more.

    If they are missing or damaged, a line says so. What the paths of the configuration hold today does not matter to
    a run that has its tokens.
    """
    try:
        places = _places(workdir)
        train = tuple(TokenStore.open(place, storage) for place in places["train"])
        validation = TokenStore.open(places["validation"], storage) if places["validation"] else None
        data = PreparedData(train, validation, tokenizer_of(workdir))
    except Unreachable:
        raise
    except SpiralError as error:
        print(f"data: {error}", flush=True)
        return None
    return data if list(data.fingerprints) == list(fingerprints) else None


def check_same_data(config: DataConfig, data: PreparedData, fingerprints: Sequence[str], workdir: Path) -> None:
    """Whether a run goes on with the tokens it began with, wherever they are now.

    Raises:
      SpiralError: naming the store that is another one.
    """
    sources = list(data.sources)
    if config.weights:
        sources = sources[: len(fingerprints)]  # a store that was added can only come into later stages
    for source, fingerprint in zip(sources, fingerprints, strict=False):
        if source.fingerprint != fingerprint:
            raise SpiralError(f"{source.name}: its tokens are not those the run in {workdir} began with")
    if len(sources) != len(fingerprints):
        raise SpiralError(
            f"data.stores has {len(sources)} stores; allowed: the {len(fingerprints)} that the run in {workdir} began "
            "with, or more with data.weights"
        )


def tokenizer_of(workdir: Path) -> Tokenizer:
    """The tokenizer a run was trained with."""
    return load_tokenizer(workdir / "tokenizer")


def validation_store_of(workdir: Path, storage: Storage = LOCAL, flag: str = "--input") -> TokenStore:
    """The validation store of a run.

    Args:
      workdir: of the run.
      storage: how to open files.
      flag: what another text is given with, for errors.

    Raises:
      SpiralError: the run had none, or it is gone.
    """
    place = _places(workdir, flag)["validation"]
    if place is None:
        raise SpiralError(f"{workdir}: the run has no validation text; allowed: a text with {flag}")
    return TokenStore.open(place, storage)


def _places(workdir: Path, flag: str = "--input") -> dict[str, Any]:
    """Where `data.json` says the `train` stores (a list) and the `validation` store (or None) are."""

    def absolute(place: str) -> str:
        return place if is_url(place) else str(workdir / place)

    try:
        places = read_json_object(workdir / "data.json")
        validation = absolute(places["validation"]) if places["validation"] else None
        return {"train": [absolute(place) for place in places["train"]], "validation": validation}
    except Unreachable:
        raise
    except (SpiralError, KeyError, TypeError, AttributeError):
        raise SpiralError(f"{workdir / 'data.json'} is missing or broken; allowed: a text with {flag}") from None


def _relative(place: str, workdir: Path) -> str:
    """Relative where the folder moves along with the run."""
    if is_url(place):
        return place.removeprefix(f"{workdir}/") if is_bucket(workdir) else place
    folder = Path(place).resolve()
    return str(folder.relative_to(workdir) if folder.is_relative_to(workdir) else folder)
