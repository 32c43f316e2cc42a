"""Exported tensors to parameters and back (docs/spec.md section 7), and what import refuses."""

import dataclasses

import numpy as np
import pytest
import reference

from spiral_jax.convert.architecture import config_from_huggingface, config_to_huggingface, is_vanilla
from spiral_jax.convert.tensors import params_from_tensors, tensors_from_params
from spiral_jax.errors import SpiralError
from spiral_jax.model.config import ModelConfig

TINY = ModelConfig(vocab_size=19, d_model=24, num_heads=3, prelude_layers=2, core_layers=2, coda_layers=1,
                   rotary_fraction=0.5, chunks=(4, 4, 1), topology="mesh", dtype="float32")  # fmt: skip
CONFIGS = {
    "mesh": TINY,
    "vanilla": dataclasses.replace(TINY, chunks=(), topology="base", core_layers=0),
    "unshared": dataclasses.replace(TINY, shared_core=False, topology="anchor", pooling="mean"),
    "gated": dataclasses.replace(TINY, topology="gated"),
    "injection": dataclasses.replace(TINY, topology="injection", pooling="mean"),
    "no_layers_outside": dataclasses.replace(TINY, prelude_layers=0, coda_layers=0, allocation="uniform"),
    "no_core": dataclasses.replace(TINY, core_layers=0, memory_slots=2, offsets=(1, 1, 0), shifts=(5, 5, 0)),
}


def test_golden_round_trip(golden):
    """Bit for bit but embed_in, which may move by an ulp; exported again, nothing moves."""
    config = config_from_huggingface(golden.config)
    first = tensors_from_params(config, params_from_tensors(config, golden.tensors))
    assert first.keys() == golden.tensors.keys()
    for name, tensor in golden.tensors.items():
        assert (first[name].dtype, first[name].shape) == (tensor.dtype, tensor.shape), name
        if name.endswith("embed_in.weight"):
            np.testing.assert_array_max_ulp(first[name], tensor, maxulp=1)
        else:
            np.testing.assert_array_equal(first[name], tensor, err_msg=name)
    second = tensors_from_params(config, params_from_tensors(config, first))
    for name, tensor in first.items():
        assert second[name].tobytes() == tensor.tobytes(), name


def test_golden_config_round_trip(golden):
    config = config_from_huggingface(golden.config)
    exported = config_to_huggingface(config, golden.config["max_position_embeddings"])
    ours_alone = {"architectures", "auto_map", "attention_bias", "torch_dtype"}
    assert {k: v for k, v in exported.items() if k not in ours_alone} == {
        k: v for k, v in golden.config.items() if k not in ours_alone
    }
    assert is_vanilla(config) == (golden.config["model_type"] == "gpt_neox")


@pytest.mark.parametrize("name", CONFIGS)
def test_exported_names_and_shapes(name, random_model):
    """Those of the reference's list, for models of every kind."""
    hf_config, tensors, params = random_model(CONFIGS[name])
    exported = tensors_from_params(CONFIGS[name], params)
    assert {name: tensor.shape for name, tensor in exported.items()} == reference.tensor_shapes(hf_config)
    for key, tensor in exported.items():
        assert tensor.flags.c_contiguous
        np.testing.assert_array_max_ulp(tensor, tensors[key].astype(np.float32), maxulp=1)
    read = config_from_huggingface(hf_config)
    assert read.schedule == CONFIGS[name].schedule
    assert read.total_parameters == CONFIGS[name].total_parameters
    assert config_to_huggingface(read, 64) == hf_config


def test_layout(random_model):
    """QKV rows run per head [q | k | v]; Linear weights are [out, in]; layers and iterations are numbered in order."""
    config = TINY
    _, tensors, params = random_model(config)
    D, H, K = config.d_model, config.num_heads, config.head_width
    for i in range(2):
        weight = tensors[f"spiralformer.core.{i}.attention.query_key_value.weight"].astype(np.float32)
        bias = tensors[f"spiralformer.core.{i}.attention.query_key_value.bias"].astype(np.float32)
        dense = tensors[f"spiralformer.core.{i}.attention.dense.weight"].astype(np.float32)
        layers = params["core"]["layers"]
        for head in range(H):
            for part in range(3):
                rows = slice((3 * head + part) * K, (3 * head + part + 1) * K)
                np.testing.assert_array_equal(layers["qkv"]["kernel"][i, :, head, part], weight[rows].T)
                np.testing.assert_array_equal(layers["qkv"]["bias"][i, head, part], bias[rows])
            columns = slice(head * K, (head + 1) * K)
            np.testing.assert_array_equal(layers["out"]["kernel"][i, head], dense[:, columns].T)
    for t in range(2):
        weight = tensors[f"spiralformer.steps.{t}.allocator.weight"].astype(np.float32)
        np.testing.assert_array_equal(params[f"steps_{t}"]["allocator"]["kernel"], weight.T)
    for k in range(4):
        weight = tensors[f"spiralformer.memory.{k}.read.weight"].astype(np.float32)
        group = params["entry" if k == 0 else f"steps_{k - 1}"]
        np.testing.assert_array_equal(group["read"]["kernel"], weight.T)
    embed_in_VxD = tensors["spiralformer.embed_in.weight"]
    np.testing.assert_allclose(params["embed"]["embedding"], embed_in_VxD / np.sqrt(D), rtol=1e-6)


@pytest.mark.parametrize("name", ["mesh", "vanilla"])
def test_every_wrong_tensor_is_named_in_one_error(name, random_model):
    config = CONFIGS[name]
    _, tensors, _ = random_model(config)
    dense = next(key for key in tensors if key.endswith("attention.dense.weight"))
    del tensors["embed_out.weight"], tensors[dense]
    bias = next(key for key in tensors if key.endswith("query_key_value.bias"))
    tensors[bias] = tensors[bias][:-1]
    norm = next(key for key in tensors if key.endswith("final_layer_norm.weight"))
    tensors[norm] = tensors[norm][None]
    tensors["spiralformer.steps.2.scorer.weight"] = np.zeros((1, 24))  # chunk size 1 has no scorer
    tensors["lm_head.weight"] = np.zeros((19, 24))
    with pytest.raises(SpiralError) as error:
        params_from_tensors(config, tensors)
    message = str(error.value)
    assert "\n" not in message
    for key in ("embed_out.weight", dense, bias, norm, "spiralformer.steps.2.scorer.weight", "lm_head.weight"):
        assert message.count(key) == 1, key
    assert "[71]" in message and "[72]" in message and "[1, 24]" in message
    assert "mlp" not in message and "memory" not in message


NEOX = config_to_huggingface(CONFIGS["vanilla"], 64)
SPIRAL = config_to_huggingface(TINY, 64)


@pytest.mark.parametrize(
    "config, named",
    [
        (NEOX | {"tie_word_embeddings": True}, "tie_word_embeddings"),
        (SPIRAL | {"tie_word_embeddings": True}, "tie_word_embeddings"),
        (NEOX | {"hidden_act": "gelu_new"}, "hidden_act.*gelu_new"),
        (SPIRAL | {"hidden_act": "relu"}, "hidden_act.*relu"),
        (NEOX | {"use_parallel_residual": False}, "use_parallel_residual"),
        (NEOX | {"model_type": "llama"}, "model_type.*llama"),
        (NEOX | {"intermediate_size": 72}, "intermediate_size.*72.*96"),
        (SPIRAL | {"topology": "ring"}, "topology.*ring"),
        (SPIRAL | {"schedule": [{"chunk": 4, "offset": 2, "shift": 2}]}, r"shifts\[0\].*leak"),
    ],
)
def test_refused_configs(config, named):
    with pytest.raises(SpiralError, match=named) as error:
        config_from_huggingface(config)
    assert "\n" not in str(error.value)
