import dataclasses
import json

import numpy as np
import pytest
from folders import write_folder
from safetensors.numpy import load_file

from spiral_jax.data.tokenizers import ByteTokenizer
from spiral_jax.export import export
from spiral_jax.import_hf import import_folder
from spiral_jax.model.config import ModelConfig


@pytest.fixture(scope="session")
def trusted_code(tmp_path_factory):
    """`transformers` copies a checkpoint's code before it imports it: here into a folder of the tests.

    One folder for all tests of a process: the package it makes of the folder is imported once.
    """
    torch = pytest.importorskip("torch", reason="compares with PyTorch")
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("hf_modules"))
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", folder)
        patch.syspath_prepend(folder)
        torch.set_num_threads(1)
        yield


@pytest.fixture(scope="session")
def golden_model():
    """Name to a golden's model in float64."""
    from exported import GOLDEN, make

    models = {}

    def load(name):
        if name not in models:
            config = json.loads((GOLDEN / name / "config.json").read_text())
            models[name] = make(config, load_file(GOLDEN / name / "model.safetensors"))
        return models[name]

    return load


@pytest.fixture(scope="session")
def exports(tmp_path_factory, random_model):
    """A folder with an export of a `looped` model and of a `vanilla` one: bytes, and 15 rows that stand for nothing."""
    vanilla = ModelConfig(vocab_size=272, d_model=32, num_heads=2, prelude_layers=2, core_layers=0, coda_layers=0,
                          rotary_fraction=0.5, chunks=(), topology="base", dtype="float32")  # fmt: skip
    looped = dataclasses.replace(
        vanilla, prelude_layers=1, core_layers=1, coda_layers=1, chunks=(4, 2, 1), topology="mesh"
    )
    folder = tmp_path_factory.mktemp("exports")
    for name, config in (("vanilla", vanilla), ("looped", looped)):
        hf_config, tensors, _ = random_model(config)
        tensors = {key: tensor.astype(np.float32) for key, tensor in tensors.items()}
        source = write_folder(folder / "source" / name, hf_config, tensors, tokenizer=False)
        ByteTokenizer().save(source)
        import_folder(source, folder / "runs" / name)
        export(folder / "runs" / name, folder / name)
    return folder
