"""Makes a run of an exported or Hugging Face folder: a SpiralFormer we exported, or any GPT-NeoX such as Pythia.

python -m spiral_jax.import_hf --input=pythia-160m --workdir=runs/pythia
python -m spiral_jax.evaluate --workdir=runs/pythia --input=TEXT
python -m spiral_jax.import_hf --input=pythia-160m --workdir=runs/tuned --config=experiments/mine.py
python -m spiral_jax.train --config=experiments/mine.py --workdir=runs/tuned

The run stands at step 0 with these parameters; training starts from them with an optimizer that has seen nothing. All
of its configuration may still change but the architecture. Only safetensors are read.
"""

import dataclasses
import shlex

from absl import flags
from etils import epath

from spiral_jax import command
from spiral_jax.convert.folder import CONFIG, output_folder, read_config, read_params
from spiral_jax.data.bucket import is_folder
from spiral_jax.data.json_files import read_json_object
from spiral_jax.data.staging import whole_folder
from spiral_jax.data.storage import expanded, writable_path
from spiral_jax.data.tokenizers import HuggingFaceTokenizer, Tokenizer, has_tokenizer, load_tokenizer
from spiral_jax.errors import SpiralError, Unreachable, require
from spiral_jax.model.config import PROGRAM
from spiral_jax.run.checkpoint import Checkpoints
from spiral_jax.run.config import RunConfig
from spiral_jax.training.config import TrainConfig

# Windows that are scored at a time where no configuration says.
BATCH_SIZE = 8


def define(values: flags.FlagValues) -> None:
    command.define_config(values)
    flags.DEFINE_string("input", None, "folder with config.json and safetensors", flag_values=values)
    flags.DEFINE_string("workdir", None, "directory of the run to make", flag_values=values)
    flags.DEFINE_string("tokenizer", "", "tokenizer.json; default: the one in the folder", flag_values=values)


def main(values: flags.FlagValues) -> None:
    given = command.config_of(values) if values.config is not None else None
    allowed = "a folder with config.json and model.safetensors"
    if not values.input:
        raise SpiralError(f"--input is missing; allowed: {allowed}")
    source = writable_path("--input", values.input)
    if not is_folder(source):
        raise SpiralError(f"--input {source} is no folder; allowed: {allowed}")
    workdir = output_folder("workdir", values.workdir)
    config = import_folder(source, workdir, given, values.tokenizer)
    print(f"imported     {config.model.notation}, {config.model.total_parameters:,} parameters")
    there = shlex.quote(f"--workdir={workdir}")
    print(f"evaluate it  python -m spiral_jax.evaluate {there} --input=FILE")
    print(f"train it     python -m spiral_jax.train {there} --config=FILE with the same model", flush=True)


def import_folder(
    source: epath.Path, workdir: epath.Path, given: RunConfig | None = None, tokenizer_file: str = ""
) -> RunConfig:
    """Makes a run at step 0, whole or not at all.

    Args:
      source: folder with config.json, safetensors, and a tokenizer.json unless `tokenizer_file` is given.
      workdir: of the run; it does not exist, or is empty.
      given: everything but the architecture; None for the defaults, with windows of the folder's longest input.
      tokenizer_file: a tokenizer.json, or "".

    Returns:
      The run's configuration.

    Raises:
      SpiralError: what `read_config` and `read_params` refuse, a tokenizer that is missing or has more ids than the
        model, an up-cycled configuration, or a directory that cannot be written.
    """
    if given is not None:
        require(not given.upcycle.source, "upcycle.source", given.upcycle.source, "nothing with --input")
    model, length = read_config(source, given.model.dtype if given else "float32")
    if given is None:
        config = RunConfig(model=model, train=TrainConfig(batch_size=BATCH_SIZE, sequence_length=length))
    else:
        model = dataclasses.replace(model, **{field: getattr(given.model, field) for field in PROGRAM})
        config = dataclasses.replace(given, model=model)
    tokenizer = _tokenizer(source, tokenizer_file, config.data.separator)
    if tokenizer.vocab_size > model.vocab_size:
        raise SpiralError(
            f"{source / CONFIG}: vocab_size is {model.vocab_size}; allowed: {tokenizer.vocab_size} or more, "
            f"the ids of {tokenizer_file or 'its tokenizer'}"
        )
    params = read_params(source, model)
    with whole_folder(workdir) as folder:
        config.save(folder / "config.json")
        (folder / "tokenizer").mkdir()
        tokenizer.save(folder / "tokenizer")
        checkpoints = Checkpoints(folder)
        checkpoints.save_start(params, {"config": config.to_dict(), "data": {"step": 0, "fingerprints": []}})
        checkpoints.close()
    return config


def _tokenizer(source: epath.Path, file: str, separator: str) -> Tokenizer:
    """The tokenizer of `--tokenizer`, or of the folder; its separator is what the folder calls the end of a text."""
    if file:
        return HuggingFaceTokenizer.from_file(expanded("--tokenizer", file), separator=separator)
    if not has_tokenizer(source):
        raise SpiralError(f"{source} has no tokenizer.json; allowed: one in the folder, or --tokenizer=FILE")
    return load_tokenizer(source, separator=separator or _end_of_text(source))


def _end_of_text(source: epath.Path) -> str:
    """The `eos_token` of tokenizer_config.json, or ""."""
    try:
        token = read_json_object(source / "tokenizer_config.json").get("eos_token")
    except Unreachable:
        raise
    except SpiralError:
        return ""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else ""


if __name__ == "__main__":
    command.run("import_hf", __doc__, define, main)
