"""Model folders and runs on disk, for tests that load, export and import them."""

import json
from pathlib import Path

import numpy as np
import tokenizers
from safetensors.numpy import save_file

from spiral_jax.import_hf import import_folder


def write_folder(folder: Path, hf_config: dict, tensors: dict[str, np.ndarray], tokenizer: bool = True) -> Path:
    """A Hugging Face folder with a tokenizer of three words."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config))
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, folder / "model.safetensors")
    if tokenizer:
        write_words(folder / "tokenizer.json")
    return folder


def write_words(path: Path) -> Path:
    """A tokenizer.json of three ids."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<|endoftext|>": 0, "a": 1, "b": 2}, unk_token="a"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.add_special_tokens(["<|endoftext|>"])
    words.save(str(path))
    return path


def run_of(folder: Path, workdir: Path) -> Path:
    """A run at step 0 with a folder's model."""
    import_folder(folder, workdir, tokenizer_file=str(write_words(workdir.with_suffix(".tokenizer.json"))))
    return workdir


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
