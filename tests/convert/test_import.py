"""Import: GPT-NeoX models of `transformers`, runs made of folders, and what is refused."""

import dataclasses
import json
import shutil
import struct

import jax
import numpy as np
import pytest
from folders import write_folder, write_words
from safetensors.numpy import load_file, save_file
from verbs import call

import spiral_jax
from spiral_jax import evaluate, export, import_hf, train
from spiral_jax.convert.architecture import config_to_huggingface
from spiral_jax.model.config import ModelConfig

TINY = ModelConfig(vocab_size=19, d_model=8, num_heads=2, prelude_layers=1, core_layers=0, coda_layers=0,
                   rotary_fraction=0.5, chunks=(), topology="base", dtype="float32")  # fmt: skip
CONFIG = """
from spiral_jax.run.config import default_config

def get_config(argument=""):
    config = default_config()
    config.model.update(dict(vocab_size=272, d_model=16, num_heads=2, prelude_layers=1, core_layers=0, coda_layers=0,
                             rotary_fraction=0.5, chunks=(), topology="base", dtype="float32"))
    config.train.update(dict(steps=3, batch_size=8, sequence_length=16))
    config.optimizer.update(dict(warmup_steps=0, schedule="constant", peak_learning_rate=1e-2))
    config.data.paths = ("{text}",)
    config.data.validation_fraction = 0.2
    config.evaluation.every_steps = 0
    return config
"""


@pytest.fixture(scope="module")
def neox():
    """Keyword arguments of GPTNeoXConfig to a random GPTNeoXForCausalLM with biases and norms far from 0 and 1."""
    torch = pytest.importorskip("torch", reason="compares with PyTorch")
    transformers = pytest.importorskip("transformers", reason="compares with transformers")

    def make(**fields):
        fields = dict(num_hidden_layers=2, max_position_embeddings=64) | fields
        fields["intermediate_size"] = 4 * fields["hidden_size"]
        torch.manual_seed(0)
        model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**fields)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.2 * torch.randn_like(parameter)
        return model

    return make


@pytest.fixture
def folder(tmp_path, random_model):
    """A vanilla folder of float32 tensors."""
    hf_config, tensors, _ = random_model(TINY)
    return write_folder(tmp_path / "folder", hf_config, {k: v.astype(np.float32) for k, v in tensors.items()})


def loaded(folder):
    return jax.tree.map(np.asarray, spiral_jax.load(folder)[1])


def change_config(folder, **fields):
    """Sets fields of config.json; None takes them out."""
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def change_tensors(folder, **changed):
    """Sets tensors; `__` in a name is a dot."""
    tensors = load_file(folder / "model.safetensors") | {k.replace("__", "."): v for k, v in changed.items()}
    save_file(tensors, folder / "model.safetensors")


SIZES = [
    dict(vocab_size=31, hidden_size=32, num_attention_heads=4, rotary_pct=0.25),
    dict(
        vocab_size=31, hidden_size=24, num_attention_heads=3, rotary_pct=1.0, rotary_emb_base=500, num_hidden_layers=1
    ),
    dict(
        vocab_size=50, hidden_size=16, num_attention_heads=1, rotary_pct=0.5, layer_norm_eps=1e-3, num_hidden_layers=3
    ),
]


@pytest.mark.parametrize("fields", SIZES, ids=["quarter", "full", "half"])
def test_models_of_transformers_both_ways(neox, forward, tmp_path, fields):
    """As `transformers` saves them (5 writes rope_parameters), in shards too; through import and export and back."""
    import torch
    from transformers import AutoModelForCausalLM

    theirs = neox(**fields)
    tokens_BxL = np.random.default_rng(0).integers(0, fields["vocab_size"], (2, 17))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens_BxL)).logits.numpy()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    model, params = spiral_jax.load(tmp_path / "theirs")
    assert model.config.rotary_base == fields.get("rotary_emb_base", 10000)
    np.testing.assert_allclose(forward(model.config, params, tokens_BxL.astype(np.int32)), expected, rtol=0, atol=1e-4)

    words = write_words(tmp_path / "words.json")
    assert call(import_hf, f"--input={tmp_path}/theirs", f"--workdir={tmp_path}/run", f"--tokenizer={words}") == (0, "")
    export.export(tmp_path / "run", tmp_path / "ours")
    with torch.no_grad():
        back = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")(torch.tensor(tokens_BxL)).logits.numpy()
    np.testing.assert_allclose(back, expected, rtol=0, atol=1e-4)


def test_old_and_new_spelling_of_the_rotary_fields(folder):
    expected = spiral_jax.load(folder)[0].config
    assert (expected.rotary_fraction, expected.rotary_base) == (0.5, 10000.0)
    rope = {"rope_type": "default", "rope_theta": 10000, "partial_rotary_factor": 0.5}
    change_config(folder, rope_parameters=rope)
    assert spiral_jax.load(folder)[0].config == expected
    change_config(folder, rotary_pct=None, rotary_emb_base=None)
    assert spiral_jax.load(folder)[0].config == expected
    change_config(folder, rope_parameters={"rope_theta": 10000}, rotary_pct=0.5)
    assert spiral_jax.load(folder)[0].config == expected


def test_buffers_of_old_checkpoints_are_passed_over(folder):
    expected = loaded(folder)
    change_tensors(
        folder,
        gpt_neox__layers__0__attention__bias=np.ones((1, 1, 64, 64), bool),
        gpt_neox__layers__0__attention__masked_bias=np.array(-1e9, np.float32),
        gpt_neox__layers__0__attention__rotary_emb__inv_freq=np.ones(1, np.float32),
    )
    jax.tree.map(np.testing.assert_array_equal, loaded(folder), expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_any_float_is_read(folder, dtype):
    """As parameters in float32, with sqrt(d) taken out of embed_in after the conversion, not before."""
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor.astype(jax.numpy.dtype(dtype)) for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    params = loaded(folder)
    assert {array.dtype for array in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    embedding = (tensors["gpt_neox.embed_in.weight"].astype(np.float64) / np.sqrt(8)).astype(np.float32)
    np.testing.assert_array_equal(params["embed"]["embedding"], embedding)
    np.testing.assert_array_equal(params["head"]["kernel"], tensors["embed_out.weight"].T.astype(np.float32))


# What is done to a good folder, and what the one line about it must name.
REFUSED = {
    "architecture": (lambda f: change_config(f, model_type="llama", hidden_act="silu"), "model_type is 'llama'"),
    "no model type": (lambda f: change_config(f, model_type=None), "model_type is missing"),
    "tied": (lambda f: change_config(f, tie_word_embeddings=True), "tie_word_embeddings"),
    "sequential": (lambda f: change_config(f, use_parallel_residual=False), "use_parallel_residual"),
    "no biases": (lambda f: change_config(f, attention_bias=False), "attention_bias"),
    "activation": (lambda f: change_config(f, hidden_act="gelu_accurate"), "hidden_act is 'gelu_accurate'"),
    "scaled": (lambda f: change_config(f, rope_scaling={"type": "linear", "factor": 2.0}), "rope_scaling"),
    "scaled in 5": (
        lambda f: change_config(f, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}),
        "rope_parameters: rope_type is 'yarn'",
    ),
    "two bases": (lambda f: change_config(f, rope_parameters={"rope_theta": 5e5}), "rotary_emb_base"),
    "no base": (lambda f: change_config(f, rotary_emb_base=None), "rotary_emb_base is missing"),
    "width of the MLP": (lambda f: change_config(f, intermediate_size=16), "intermediate_size is 16"),
    "no width": (lambda f: change_config(f, hidden_size=None), "hidden_size is missing"),
    "no such width": (lambda f: change_config(f, hidden_size="8"), "hidden_size is '8'"),
    "heads": (lambda f: change_config(f, num_attention_heads=3), "model.num_heads"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json"),
    "a list": (lambda f: (f / "config.json").write_text("[1]"), "config.json"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "other shapes": (lambda f: change_config(f, vocab_size=20), "[20, 8]"),
    "more layers": (lambda f: change_config(f, num_hidden_layers=2), "gpt_neox.layers.1.attention.dense.bias [8] is"),
    "extra tensor": (
        lambda f: change_tensors(f, lm_head__weight=np.zeros((3, 2), np.float32)),
        "lm_head.weight [3, 2]",
    ),
    "integers": (lambda f: change_tensors(f, embed_out__weight=np.zeros((19, 8), np.int8)), "embed_out.weight"),
    "small vocabulary": (
        lambda f: [
            change_config(f, vocab_size=2),
            change_tensors(
                f,
                gpt_neox__embed_in__weight=np.zeros((2, 8), np.float32),
                embed_out__weight=np.zeros((2, 8), np.float32),
            ),
        ],
        "vocab_size is 2",
    ),
    "truncated": (lambda f: truncate(f / "model.safetensors"), "model.safetensors"),
    "no safetensors": (lambda f: (f / "model.safetensors").write_text("junk of some length"), "model.safetensors"),
    "empty": (lambda f: (f / "model.safetensors").write_text(""), "model.safetensors"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no weights"),
    "pickle": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pytorch_model.bin"),
    "missing shard": (lambda f: shard(f)[1].unlink(), "model-2.safetensors"),
    "truncated shard": (lambda f: truncate(shard(f)[1]), "model-2.safetensors"),
    "index of another file": (lambda f: shard(f, embed_out__weight="model-3.safetensors"), "model-3.safetensors"),
    "index of another tensor": (lambda f: shard(f, lm_head__weight="model-1.safetensors"), "lm_head.weight"),
    "index of the wrong shard": (lambda f: shard(f, embed_out__weight="model-2.safetensors"), "embed_out.weight"),
    "index outside": (lambda f: shard(f, embed_out__weight="../model-1.safetensors"), "index.json"),
    "tensor twice": (lambda f: shard(f, twice=True), "embed_out.weight"),
    "broken index": (lambda f: [shard(f), (f / "model.safetensors.index.json").write_text("{}")], "index.json"),
    "tensor twice in a file": (lambda f: name_twice(f / "model.safetensors"), "model.safetensors"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json"),
    "broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json"),
}


def truncate(path):
    path.write_bytes(path.read_bytes()[:-3])


def shard(folder, twice=False, **files):
    """Two files and an index, with other files for some tensors."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = names[:5], names[5:] + (names[:1] if twice else [])
    paths = [folder / f"model-{i}.safetensors" for i in (1, 2)]
    for path, half in zip(paths, halves, strict=True):
        save_file({name: tensors[name] for name in half}, path)
    weight_map = {name: path.name for path, half in zip(paths, halves, strict=True) for name in half}
    weight_map |= {name.replace("__", "."): file for name, file in files.items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return paths


def name_twice(path):
    """Writes the header so that it has one name twice, which JSON allows."""
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = content[8 : 8 + size].replace(b"mlp.dense_4h_to_h.bias", b"mlp.dense_h_to_4h.bias")
    path.write_bytes(content[:8] + header + content[8 + size :])


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_one_line(folder, tmp_path, case):
    damage, named = REFUSED[case]
    damage(folder)
    status, errors = call(import_hf, f"--input={folder}", f"--workdir={tmp_path}/run")
    assert status == 2 and errors.count("\n") == 1 and named in errors, errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder"]


def test_bad_flags(folder, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text("{}")
    (tmp_path / "cycled.py").write_text(CONFIG.replace("return", "config.upcycle.source = 'x'\n    return"))
    for arguments, named in (
        ((f"--workdir={tmp_path}/new",), "--input"),
        ((f"--input={folder}",), "--workdir"),
        (("--input=/no/folder", f"--workdir={tmp_path}/new"), "/no/folder"),
        ((f"--input={folder}", f"--workdir={tmp_path}/run"), "holds config.json"),
        ((f"--input={folder}", f"--workdir={tmp_path}/new", "--tokenizer=/no/file.json"), "/no/file.json"),
        ((f"--input={folder}", f"--workdir={tmp_path}/new", f"--config={tmp_path}/cycled.py"), "upcycle.source"),
    ):
        status, errors = call(import_hf, *arguments)
        assert status == 2 and errors.count("\n") == 1 and named in errors, errors
    assert not (tmp_path / "new").exists()


def test_shards_are_read(folder):
    expected = loaded(folder)
    shard(folder)
    jax.tree.map(np.testing.assert_array_equal, loaded(folder), expected)


def test_every_field_of_a_spiral_comes_back(random_model, tmp_path):
    spiral = dataclasses.replace(TINY, core_layers=1, chunks=(4, 2, 1), offsets=(1, 0, 0), shifts=(5, 1, 0),
                                 topology="mesh", memory_slots=3, shared_core=False, pooling="mean",
                                 allocation="uniform", update_scale="linear", rotary_base=77.0)  # fmt: skip
    hf_config, tensors, params = random_model(spiral)
    folder = write_folder(tmp_path / "f", hf_config, {k: v.astype(np.float32) for k, v in tensors.items()})
    assert spiral_jax.load(folder)[0].config == spiral
    jax.tree.map(np.testing.assert_array_equal, loaded(folder), params)
    for field in ("schedule", "topology", "memory_slots", "pooling", "core_layers"):
        change_config(folder, **(hf_config | {field: None}))
        with pytest.raises(spiral_jax.errors.SpiralError, match=f"{field} is missing"):
            spiral_jax.load(folder)
    change_config(folder, **(hf_config | {"schedule": [{"chunk": 4, "offset": 1}] * 3}))
    with pytest.raises(spiral_jax.errors.SpiralError, match=r"schedule\[0\]: shift is missing"):
        spiral_jax.load(folder)
    assert config_to_huggingface(spiral, 64) == hf_config


def test_the_end_of_a_text_is_what_the_folder_says(folder, tmp_path):
    spec = (folder / "tokenizer.json").read_text().replace("<|endoftext|>", "<end>")
    (folder / "tokenizer.json").write_text(spec)
    status, errors = call(import_hf, f"--input={folder}", f"--workdir={tmp_path}/run")
    assert status == 2 and "separator" in errors
    for token in ("<end>", {"content": "<end>"}):
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}))
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        assert call(import_hf, f"--input={folder}", f"--workdir={tmp_path}/run") == (0, "")
    info = json.loads((tmp_path / "run/tokenizer/tokenizer_info.json").read_text())
    assert info["separator"] == "<end>"


@pytest.mark.slow
def test_from_training_through_export_and_import_to_training(tmp_path, capsys):
    """The commands: the same loss on a text, and training that goes on from the parameters."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i} of a text, naïvely counted\n" for i in range(90)))
    config = tmp_path / "config.py"
    config.write_text(CONFIG.replace("{text}", str(text)))
    first, out, second = tmp_path / "first", tmp_path / "out", tmp_path / "second"
    assert call(train, f"--config={config}", f"--workdir={first}") == (0, "")
    assert call(export, f"--workdir={first}", f"--output={out}") == (0, "")
    assert call(import_hf, f"--input={out}", f"--workdir={second}", f"--config={config}") == (0, "")
    losses = []
    for run, step in ((first, 3), (second, 0)):
        capsys.readouterr()
        assert call(evaluate, f"--workdir={run}", f"--input={text}", "--json") == (0, "")
        report = json.loads(capsys.readouterr().out)
        losses.append(report["loss"])
        assert report["step"] == step
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)

    for override, named in (
        ("--config.model.prelude_layers=2", "model.prelude_layers"),
        ("--config.model.rotary_fraction=1.0", "model.rotary_fraction"),
        (f"--config.upcycle.source={out}", "upcycle.source"),
    ):
        status, errors = call(train, f"--config={config}", f"--workdir={second}", override)
        assert status == 2 and errors.count("\n") == 1 and named in errors, errors
    # All else is free: another seed, say. And the same program, which is compiled already.
    assert call(train, f"--config={config}", f"--workdir={second}", "--config.seed=5") == (0, "")
    assert "imported parameters" in capsys.readouterr().out
    before, after = (
        [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()] for run in (first, second)
    )
    assert [row["step"] for row in after] == [1, 2, 3]
    assert after[0]["loss"] < before[-1]["loss"] < before[0]["loss"]
    assert after[-1]["loss"] < after[0]["loss"]
    assert json.loads((second / "config.json").read_text())["seed"] == 5
    # Now it is a run like any other.
    status, errors = call(train, f"--config={config}", f"--workdir={second}", "--config.seed=6")
    assert status == 2 and "seed" in errors
    card = (out / "README.md").read_text()
    assert f"{before[-1]['loss']:.4f} (step 3)" in card and f"{before[-1]['validation_loss']:.4f} (step 3)" in card
