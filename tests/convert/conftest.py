import json

import pytest
from safetensors.numpy import load_file


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
