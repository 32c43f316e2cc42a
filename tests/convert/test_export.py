"""Export: exactly what docs/spec.md section 7 says, the same bytes each time, and read by `transformers` as it is."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
from cases import slow
from folders import contents, run_of, write_folder, write_words
from safetensors.numpy import load_file
from verbs import call

import spiral_jax
from spiral_jax import export
from spiral_jax.convert.card import model_card
from spiral_jax.convert.tokenizer_files import byte_level_json, write_tokenizer
from spiral_jax.convert.weights import Weights, write_weights
from spiral_jax.data.tokenizers import ByteTokenizer, HuggingFaceTokenizer, train_bpe
from spiral_jax.errors import SpiralError
from spiral_jax.model.config import ModelConfig

GOLDEN = Path(__file__).parent.parent / "golden"
VANILLA = ModelConfig(vocab_size=19, d_model=24, num_heads=3, prelude_layers=2, core_layers=0, coda_layers=0,
                      rotary_fraction=0.5, chunks=(), topology="base", dtype="float32")  # fmt: skip
SPIRAL = dataclasses.replace(VANILLA, prelude_layers=1, core_layers=1, coda_layers=1, chunks=(4, 1), topology="mesh")
# Every byte that UTF-8 can have; line ends, joined emoji, the separator.
HARD = "".join(
    map(chr, [*range(0x900), *range(0x1000, 0xF800, 0x1000), 0xD7FF, 0xFFFF, *range(0x10000, 0x110000, 0x10000)])
)
HARD += "naïve 👩‍👩‍👧 \r\n\n\t  'll don't 1234 <|endoftext|>x <|endoftext|> y <|endoftext|"


@pytest.fixture(scope="module")
def runs(tmp_path_factory, random_model):
    """Runs of a vanilla model and of a spiral, at step 0."""
    folder = tmp_path_factory.mktemp("runs")
    for name, config in (("vanilla", VANILLA), ("spiral", SPIRAL)):
        hf_config, tensors, _ = random_model(config)
        tensors = {key: tensor.astype(np.float32) for key, tensor in tensors.items()}
        run_of(write_folder(folder / f"{name}_folder", hf_config, tensors), folder / name)
    return folder


@pytest.fixture
def golden_folder(request):
    return GOLDEN / request.node.callspec.params["golden"]


@pytest.fixture(scope="module")
def auto(trusted_code):
    """(folder, tokens) to `transformers`' model, its code trusted if asked to, and its logits."""
    import torch
    import transformers

    def logits(folder, tokens_BxL, **kwargs):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, local_files_only=True, dtype=torch.float32, **kwargs
        )
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        with torch.no_grad():
            return model, model(torch.tensor(tokens_BxL)).logits.numpy()

    return logits


def tokens(vocab_size, shape=(2, 13)):
    return np.random.default_rng(0).integers(0, vocab_size, shape).astype(np.int32)


def ours(folder, forward, tokens_BxL, **kwargs):
    model, params = spiral_jax.load(folder, **kwargs)
    return forward(model.config, params, tokens_BxL)


FEW = ("vanilla_mesh", "spiral_b_mesh")


@pytest.mark.parametrize(
    "golden",
    [
        *FEW,
        *(slow(path.name) for path in sorted(GOLDEN.glob("*/")) if path.name not in FEW),
    ],
    indirect=True,
)
def test_goldens_are_loaded_and_exported_again(golden, golden_folder, forward, x64, tmp_path):
    """Logits within bounds; tensors bit for bit but embed_in, within an ulp; the next export is identical."""
    for dtype, bound in (("float32", 2e-4), ("float64", 1e-9)):
        with x64(dtype == "float64"):
            logits_BxLxV = ours(golden_folder, forward, golden.tokens_BxL, dtype=dtype)
        np.testing.assert_allclose(logits_BxLxV, golden.logits_BxLxV, rtol=0, atol=bound)
    export.export(run_of(golden_folder, tmp_path / "run"), tmp_path / "first")
    exported = load_file(tmp_path / "first/model.safetensors")
    assert exported.keys() == golden.tensors.keys()
    for name, tensor in golden.tensors.items():
        assert (exported[name].dtype, exported[name].shape) == (tensor.dtype, tensor.shape)
        np.testing.assert_array_max_ulp(exported[name], tensor, maxulp=int(name.endswith("embed_in.weight")))
    config = json.loads((tmp_path / "first/config.json").read_text())
    vanilla = golden.config["model_type"] == "gpt_neox"
    assert {key: value for key, value in config.items() if key in golden.config} == golden.config
    assert config.get("auto_map") == (None if vanilla else export.AUTO_MAP)
    assert (tmp_path / "first/modeling_spiralformer.py").exists() != vanilla
    export.export(run_of(tmp_path / "first", tmp_path / "again"), tmp_path / "second")
    assert contents(tmp_path / "second") == contents(tmp_path / "first")


def test_the_command_writes_the_same_bytes_again_and_only_over_its_own(runs, tmp_path):
    output = tmp_path / "out"
    assert call(export, f"--workdir={runs}/spiral", f"--output={output}") == (0, "")
    first = contents(output)
    assert set(first) == {
        "README.md", "config.json", "configuration_spiralformer.py", "export.json", "generation_config.json",
        "model.safetensors", "modeling_spiralformer.py", "tokenizer.json", "tokenizer_config.json",
        "tokenizer_info.json",
    }  # fmt: skip
    (tmp_path / ".out.partial").mkdir()  # of an export that was killed
    assert call(export, f"--workdir={runs}/spiral", f"--output={output}") == (0, "")
    assert contents(output) == first
    assert call(export, f"--workdir={runs}/vanilla", f"--output={output}") == (0, "")
    assert not (output / "modeling_spiralformer.py").exists()
    (output / "notes.txt").write_text("mine")
    before = contents(output)
    status, errors = call(export, f"--workdir={runs}/spiral", f"--output={output}")
    assert status == 2 and "notes.txt" in errors and contents(output) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize(
    "arguments, named",
    [
        (("--workdir={runs}/vanilla",), "--output"),
        (("--output={tmp}/out",), "--workdir"),
        (("--workdir=/no/run", "--output={tmp}/out"), "/no/run"),
        (("--workdir={runs}/vanilla", "--output={runs}/vanilla"), "--output"),
        (("--workdir={runs}/vanilla", "--output={runs}/vanilla_folder"), "config.json"),
        (("--workdir={runs}/vanilla", "--output={runs}/vanilla_folder/config.json"), "is a file"),
        (("--workdir={runs}/vanilla", "--output={tmp}/out", "--step=3"), "step 3"),
        (("--workdir={runs}/vanilla", "--output={tmp}/out", "--dtype=int8"), "--dtype"),
        (("--workdir={runs}/vanilla_folder", "--output={tmp}/out"), "checkpoints"),
    ],
)
def test_bad_input_is_one_line(runs, tmp_path, arguments, named):
    status, errors = call(export, *(argument.format(runs=runs, tmp=tmp_path) for argument in arguments))
    assert status == 2 and errors.count("\n") == 1 and named in errors, errors
    assert not list(tmp_path.iterdir())


def test_vanilla_is_a_gpt_neox_of_transformers(runs, tmp_path, auto, forward):
    """Also in shards, at most of the size that was asked for, unless a tensor is larger."""
    tokens_BxL = tokens(VANILLA.vocab_size)
    expected = ours(runs / "vanilla", forward, tokens_BxL)
    export.export(runs / "vanilla", tmp_path / "one")
    model, logits = auto(tmp_path / "one", tokens_BxL)
    assert type(model).__name__ == "GPTNeoXForCausalLM"
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)

    export.export(runs / "vanilla", tmp_path / "many", max_shard_bytes=12_000)
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert files == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))] and len(files) > 3
    for file in files:
        tensors = load_file(tmp_path / "many" / file)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 12_000
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    whole = load_file(tmp_path / "one/model.safetensors")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert {name: whole[name].tobytes() for name in whole} == {
        name: load_file(tmp_path / "many" / file)[name].tobytes() for name, file in index["weight_map"].items()
    }
    np.testing.assert_array_equal(auto(tmp_path / "many", tokens_BxL)[1], logits)
    np.testing.assert_array_equal(
        ours(tmp_path / "many", forward, tokens_BxL), ours(tmp_path / "one", forward, tokens_BxL)
    )


def test_a_spiral_brings_its_code(runs, tmp_path, auto, forward):
    tokens_BxL = tokens(SPIRAL.vocab_size)
    export.export(runs / "spiral", tmp_path / "out")
    model, logits = auto(tmp_path / "out", tokens_BxL, trust_remote_code=True)
    assert type(model).__name__ == "SpiralFormerForCausalLM"
    np.testing.assert_allclose(logits, ours(runs / "spiral", forward, tokens_BxL), rtol=0, atol=1e-5)
    assert model.generation_config.suppress_tokens is None  # a fine-tune may have use for any of the 19
    assert model.generation_config.eos_token_id == model.config.eos_token_id == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_rounded_once(runs, tmp_path, dtype):
    """embed_in, too: from float64, where sqrt(d) is folded in."""
    export.export(runs / "vanilla", tmp_path / "out", dtype=dtype)
    params = jax.tree.map(np.asarray, spiral_jax.load(runs / "vanilla")[1])
    tensors = Weights(tmp_path / "out")
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(jax.numpy.dtype(dtype))}
    folded = (params["embed"]["embedding"].astype(np.float64) * np.sqrt(24)).astype(dtype)
    np.testing.assert_array_equal(tensors["gpt_neox.embed_in.weight"], folded)
    np.testing.assert_array_equal(tensors["embed_out.weight"], params["head"]["kernel"].T.astype(dtype))
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == dtype
    loaded = spiral_jax.load(tmp_path / "out")[1]
    assert {array.dtype for array in jax.tree.leaves(loaded)} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(loaded["head"]["kernel"], tensors["embed_out.weight"].astype(np.float32).T)


def test_what_float16_cannot_hold_is_named(random_model, tmp_path):
    hf_config, tensors, _ = random_model(VANILLA)
    tensors = {key: tensor.astype(np.float32) for key, tensor in tensors.items()}
    tensors["embed_out.weight"][0, 0] = 7e4
    run = run_of(write_folder(tmp_path / "folder", hf_config, tensors), tmp_path / "run")
    with pytest.raises(SpiralError, match=r"--dtype is 'float16'.*embed_out.weight"):
        export.export(run, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()


def test_bytes_as_a_tokenizer_json():
    """Our ids on any text, and back."""
    tokenizer = ByteTokenizer()
    theirs = tokenizers.Tokenizer.from_str(byte_level_json(tokenizer))
    theirs.encode_special_tokens = True
    assert theirs.get_vocab_size() == 257 and theirs.token_to_id("<|endoftext|>") == 256
    assert {*range(256)} - {*tokenizer.encode(HARD)} == {0xC0, 0xC1, *range(0xF5, 0x100)}  # no UTF-8 has these
    for text in (HARD, "", " ", "\r\n", "a  b", *(chr(i) for i in range(300))):
        ids = theirs.encode(text).ids
        assert ids == tokenizer.encode(text).tolist(), text
        assert theirs.decode(ids, skip_special_tokens=False) == text
    assert theirs.decode([104, 105, 256], skip_special_tokens=False) == "hi<|endoftext|>"


def test_transformers_gives_our_ids(tmp_path):
    """Of every tokenizer: nothing is added, and the separator's spelling in a text is text where that is asked for.

    Without that it is the separator, and a token that is added is that token, as with transformers' own tokenizers.
    """
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    bpe = train_bpe([HARD * 2], 300)
    bpe.save(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    template = tokenizers.Tokenizer.from_str(json.dumps(spec))
    template.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    plain = spec | {"added_tokens": [token | {"special": False} for token in spec["added_tokens"]]}
    for name, tokenizer in {
        "bytes": ByteTokenizer(),
        "bpe": bpe,
        "separator that is not special": HuggingFaceTokenizer(json.dumps(plain)),
        "template": HuggingFaceTokenizer(template.to_str()),
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        write_tokenizer(folder, tokenizer, max_length=9999)
        (folder / "config.json").write_text('{"model_type": "gpt_neox"}')
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        assert theirs(HARD, split_special_tokens=True)["input_ids"] == tokenizer.encode(HARD).tolist(), name
        plain_text = HARD.replace("<|endoftext|>", "<|endoftext|")
        assert theirs(plain_text)["input_ids"] == tokenizer.encode(plain_text).tolist(), name
        added = theirs.add_tokens(["<|im_end|>"], special_tokens=True) and len(theirs) - 1
        a, b = tokenizer.encode("a").tolist(), tokenizer.encode("b").tolist()
        assert theirs("a<|endoftext|>b<|im_end|>b")["input_ids"] == [*a, tokenizer.separator_id, *b, added, *b]
        assert (theirs.eos_token_id, theirs.bos_token_id, theirs.pad_token_id) == (tokenizer.separator_id,) * 3
        assert theirs(["", "longer"], padding=True).attention_mask[0][0] == 0 and theirs.padding_side == "left"
        assert theirs.decode(tokenizer.encode(HARD)) == HARD


def test_the_card_says_what_the_model_is():
    from spiral_jax.run.config import RunConfig
    from spiral_jax.training.config import TrainConfig

    config = RunConfig(model=SPIRAL, train=TrainConfig(steps=90, batch_size=4, sequence_length=8))
    rows = [
        {"step": 10, "loss": 3.25, "validation_loss": 3.5}, {"step": 20, "loss": 3.0}, {"step": 30, "loss": 2.0}
    ]  # fmt: skip
    start = {"packages": {"jax": "0.10.2", "flax": None}, "git_commit": None}
    card = model_card(
        config, 20, rows=rows, start=start, fingerprints=["abc"], tokenizer=ByteTokenizer(), dtype="bfloat16"
    )
    for said in (
        "1+1x{1/4,1}+1", f"{SPIRAL.total_parameters:,}", f"{SPIRAL.non_embedding_parameters:,}", "20 of 90 steps",
        "640 tokens", "3.0000 (step 20)", "3.5000 (step 10)", "`abc`", "trust_remote_code", "bfloat16",
        "jax 0.10.2; git commit unknown",
        # What a fine-tuner must know: length, padding and labels, and below, added tokens.
        "windows were of 8 tokens", "`pad_token` is the separator, `<|endoftext|>`", "DataCollatorForSeq2Seq",
    ):  # fmt: skip
        assert said in card, said
    assert "2.0000" not in card
    assert "Every row of the vocabulary is taken" in card
    config = dataclasses.replace(config, model=dataclasses.replace(SPIRAL, vocab_size=272))
    card = model_card(config, 20, rows=[], start=None, fingerprints=[], tokenizer=ByteTokenizer(), dtype="float32")
    assert "has 15 rows more than the tokenizer has ids (257)" in card


def test_a_tensor_larger_than_a_shard_has_a_file_to_itself(tmp_path):
    tensors = {name: np.full(size, i, np.float32) for i, (name, size) in enumerate({"a": 9, "b": 1, "c": 1}.items())}
    write_weights(tmp_path, tensors, max_shard_bytes=8)
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    ]  # fmt: skip
    read = Weights(tmp_path)
    assert list(read) == ["a", "b", "c"] and all((read[name] == tensors[name]).all() for name in tensors)


def test_step_goes_with_a_run(runs, tmp_path):
    write_words(tmp_path / "tokenizer.json")
    with pytest.raises(SpiralError, match="step"):
        spiral_jax.load(runs / "vanilla_folder", step=3)
    with pytest.raises(SpiralError, match=r"model\.dtype.*JAX_ENABLE_X64"):
        spiral_jax.load(runs / "vanilla_folder", dtype="float64")
