"""What the bad inputs are variations of: a configuration, texts, a token store, a Hugging Face folder, a run."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import reference
from folders import run_of, write_folder

from spiral_jax.convert.architecture import config_to_huggingface
from spiral_jax.corpus.prepare import prepare_folder
from spiral_jax.data.config import DataConfig
from spiral_jax.model.config import ModelConfig

CONFIG = """
from spiral_jax.run.config import default_config

def get_config(argument=""):
    config = default_config()
    config.model.update(dict(vocab_size=288, d_model=32, num_heads=2, prelude_layers=1, core_layers=1, coda_layers=0,
                             chunks=(2, 1), dtype="float32"))
    config.train.update(dict(steps=4, batch_size=8, sequence_length=16))
    config.data.paths = ("{folder}/text.txt",)
    config.data.validation_fraction = 0.2
    config.data.workers = 1
    config.checkpoint.every_steps = 2
    return config
"""
MODEL = ModelConfig(vocab_size=19, d_model=16, num_heads=2, prelude_layers=1, core_layers=1, coda_layers=1,
                    chunks=(4, 2, 1), rotary_fraction=0.5, dtype="float32")  # fmt: skip


@pytest.fixture(scope="session")
def good(tmp_path_factory) -> Path:
    """Nothing in it is changed by a test."""
    folder = tmp_path_factory.mktemp("good")
    lines = [f"line {i} of a text, naïvely counted\n" for i in range(300)]
    (folder / "text.txt").write_text("".join(lines), encoding="utf-8")
    (folder / "records.jsonl").write_text("".join(f'{{"text": "record {i}"}}\n' for i in range(50)), encoding="utf-8")
    (folder / "tiny.py").write_text(CONFIG.replace("{folder}", str(folder)), encoding="utf-8")
    (folder / "empty.txt").write_text("", encoding="utf-8")
    data = DataConfig(paths=(str(folder / "text.txt"),), validation_fraction=0.2, workers=1)
    prepare_folder(data, folder / "store", report=lambda line: None)
    hf_config = config_to_huggingface(MODEL, max_position_embeddings=16)
    tensors = reference.random_tensors(hf_config, np.random.default_rng(0))
    write_folder(folder / "hf", hf_config, {name: tensor.astype(np.float32) for name, tensor in tensors.items()})
    run_of(folder / "hf", folder / "run")
    vanilla = config_to_huggingface(
        dataclasses.replace(MODEL, chunks=(), topology="anchor"), max_position_embeddings=16
    )
    write_folder(folder / "vanilla", vanilla, reference.random_tensors(vanilla, np.random.default_rng(0)))
    (folder / "run/.lock").touch()  # as the first start of a run leaves it
    (folder / "output.txt").write_text("a file", encoding="utf-8")
    return folder
