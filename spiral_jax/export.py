"""Writes a run's parameters as a folder that `transformers`, `spiral_jax.load` and `spiral_jax.import_hf` read.

python -m spiral_jax.export --workdir=runs/quickstart --output=exported
python -m spiral_jax.export --workdir=DIR --output=DIR --step=10000 --dtype=bfloat16

The folder has config.json, the weights as safetensors, the tokenizer, the code that `transformers` needs for what is
no plain GPT-NeoX, and a model card. Exporting the same checkpoint again writes the same bytes.
"""

import shutil
from pathlib import Path

import jax
from absl import flags
from etils import epath
from jax._src import xla_bridge

from spiral_jax import command
from spiral_jax.convert.architecture import config_to_huggingface, is_vanilla
from spiral_jax.convert.card import model_card
from spiral_jax.convert.folder import CONFIG, output_folder
from spiral_jax.convert.tensors import tensors_from_params
from spiral_jax.convert.tokenizer_files import write_tokenizer
from spiral_jax.convert.weights import MAX_SHARD_BYTES, write_weights
from spiral_jax.data.atomic import write_text
from spiral_jax.data.json_files import read_json_object, write_json
from spiral_jax.data.staging import whole_folder
from spiral_jax.data.storage import writable_path
from spiral_jax.errors import SpiralError, Unreachable, require
from spiral_jax.run import own_code
from spiral_jax.run.config import RunConfig
from spiral_jax.run.directory import read_model_of, run_directory, tokenizer_of
from spiral_jax.run.metrics import read_rows, rows_of
from spiral_jax.run.provenance import last_start
from spiral_jax.run.reading import SavedRun, reading

DTYPES = ("float32", "bfloat16", "float16")
# What `transformers` runs a SpiralFormer with; copied as they are.
CODE = ("configuration_spiralformer.py", "modeling_spiralformer.py")
AUTO_MAP = {
    "AutoConfig": "configuration_spiralformer.SpiralFormerConfig",
    "AutoModel": "modeling_spiralformer.SpiralFormerModel",
    **{
        f"AutoModelFor{head}": f"modeling_spiralformer.SpiralFormerFor{head}"
        for head in ("CausalLM", "SequenceClassification", "TokenClassification", "QuestionAnswering")
    },
}
# Says that a folder is an export, which another one may replace, and which run it is of.
MANIFEST = "export.json"


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "directory of the run", flag_values=values)
    flags.DEFINE_string("output", None, "folder to make: new, empty or an export to replace", flag_values=values)
    flags.DEFINE_integer("step", None, "checkpoint to export; default: the newest", flag_values=values)
    flags.DEFINE_string("dtype", DTYPES[0], f"of the tensors: {', '.join(DTYPES)}", flag_values=values)


def main(values: flags.FlagValues) -> None:
    if not xla_bridge.backends_are_initialized():
        jax.config.update("jax_platforms", "cpu")  # a run may have the accelerators, or need other hosts for them
    workdir = run_directory(values.workdir)
    output = output_folder("output", values.output, _files_of_export(values.output))
    step = export(workdir, output, step=values.step, dtype=values.dtype)
    size = sum(path.stat().length for path in output.iterdir())
    print(f"exported     the checkpoint of step {step}: {size / 1e6:,.1f} MB of {values.dtype}")
    print(f"folder       {output}\nload it      spiral_jax.load({str(output)!r}); README.md has the rest", flush=True)


def export(
    workdir: epath.Path,
    output: epath.Path,
    *,
    step: int | None = None,
    dtype: str = "float32",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> int:
    """Writes a run's checkpoint as a Hugging Face folder (docs/spec.md section 7), whole or not at all.

    Args:
      workdir: of the run.
      output: the folder; what is there is replaced.
      step: which checkpoint; None for the newest.
      dtype: of the tensors.
      max_shard_bytes: of tensors in one file.

    Returns:
      The checkpoint's step.

    Raises:
      SpiralError: no such run or checkpoint, a damaged one, or a folder that cannot be written.
    """
    require(dtype in DTYPES, "--dtype", dtype, ", ".join(DTYPES))
    with reading(workdir, step) as saved:
        _export(saved, output, dtype, max_shard_bytes)
        return saved.step


def _export(saved: SavedRun, output: epath.Path, dtype: str, max_shard_bytes: int) -> None:
    workdir, step, meta = saved.workdir, saved.step, saved.meta
    own_code.check_registered(workdir, meta["config"])
    config, tokenizer = RunConfig.from_dict(meta["config"]), tokenizer_of(workdir)
    check_has_pytorch_code(config)
    length, separator = config.train.sequence_length, tokenizer.separator_id
    special = {"bos_token_id": separator, "eos_token_id": separator}
    model_config = config_to_huggingface(config.model, length)
    if not is_vanilla(config.model):
        model_config["auto_map"] = AUTO_MAP
    with whole_folder(output) as folder:
        _, params = read_model_of(saved)
        tensors = tensors_from_params(config.model, params, jax.numpy.dtype(dtype))
        write_weights(folder, tensors, max_shard_bytes)
        write_json(folder / CONFIG, model_config | special | {"torch_dtype": dtype})
        # Nothing is suppressed: tokens that a fine-tune adds take the rows of the head that stand for none yet.
        write_json(folder / "generation_config.json", special | {"pad_token_id": separator})
        write_tokenizer(folder, tokenizer, length)
        if not is_vanilla(config.model):
            for name in CODE:
                shutil.copyfile(Path(__file__).parent / "convert" / name, folder / name)
        card = model_card(
            config,
            step,
            rows=read_rows(rows_of(workdir)),
            start=last_start(workdir / "environment.json"),
            fingerprints=meta["data"]["fingerprints"],
            tokenizer=tokenizer,
            dtype=dtype,
        )
        write_text(folder / "README.md", card)
        files = sorted([path.name for path in folder.iterdir()] + [MANIFEST])
        manifest = {"format": "spiral_jax.export", "step": step, "files": files, "config": meta["config"]}
        write_json(folder / MANIFEST, manifest)


def check_has_pytorch_code(config: RunConfig) -> None:
    """Raises SpiralError for a topology, pooling or allocation of the user's own."""
    for field, code in own_code.own_code(config.to_dict()).items():
        if field.startswith("model."):
            raise SpiralError(
                f"{field} is {code['name']!r} from {code['file']}; allowed: one of the package's own, as PyTorch has "
                "no code for it"
            )


def _files_of_export(output: str | None) -> frozenset[str]:
    """The files of an export that is there already."""
    try:
        manifest = read_json_object(writable_path("--output", output or "") / MANIFEST)
        return frozenset(manifest["files"] if manifest["format"] == "spiral_jax.export" else ())
    except Unreachable:
        raise
    except (SpiralError, KeyError, TypeError):
        return frozenset()


if __name__ == "__main__":
    command.run("export", __doc__, define, main)
