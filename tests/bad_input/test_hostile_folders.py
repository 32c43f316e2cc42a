"""Hostile files in the folders of models and runs: refused from what they say, before anything of that size is made."""

import json
import re
import shutil

import pytest
from refusals import refused
from verbs import call

from spiral_jax import evaluate, export, generate, import_hf
from spiral_jax.errors import SpiralError
from spiral_jax.run.config import RunConfig

HUGE = 10**8
# A change of the Hugging Face folder's config.json, and words of the line.
CONFIGS = {
    "layers 1e8": (dict(core_layers=HUGE), "model.core_layers is 100000000"),
    "layers 1e8 before": (dict(prelude_layers=HUGE), "model.prelude_layers is 100000000"),
    "layers that are not there": (dict(core_layers=2500), "and "),
    "one layer too many": (dict(coda_layers=2), "spiralformer.coda.1.input_layernorm.weight [16] is missing"),
    "one layer too few": (dict(coda_layers=0), "is not a tensor of this model"),
    "a schedule of 1e5": (
        dict(schedule=[dict(chunk=1, offset=0, shift=0)] * 10**4),
        "schedule is of 10000 iterations",
    ),
    "a schedule of another length": (dict(schedule=[dict(chunk=1, offset=0, shift=0)]), "is not a tensor"),
    "a schedule of numbers": (dict(schedule=[1, 2]), "schedule is [1, 2]"),
    "a schedule that is none": (dict(schedule={"a": 1}), "schedule is {'a': 1}"),
    "a level without a shift": (dict(schedule=[dict(chunk=1, offset=0)]), "schedule[0]: shift is missing"),
    "a chunk of 1e12": (dict(schedule=[dict(chunk=10**12, offset=0, shift=10**12)]), "model.chunks"),
    "a shift of 1e12": (dict(schedule=[dict(chunk=2, offset=0, shift=10**12)] * 3), "model.shifts[0]"),
    "a chunk of 0": (dict(schedule=[dict(chunk=0, offset=0, shift=0)] * 3), "model.chunks"),
    "a shift that leaks": (dict(schedule=[dict(chunk=4, offset=0, shift=0)] * 3), "leaks the future"),
    "a vocabulary of 1e12": (dict(vocab_size=10**12), "model.vocab_size is 1000000000000"),
    "a vocabulary of 1e7": (dict(vocab_size=10**7), "has shape [19, 16], expected [10000000, 16]"),
    "a vocabulary of another size": (dict(vocab_size=20), "expected [20, 16]"),
    "a vocabulary below 0": (dict(vocab_size=-5), "model.vocab_size is -5"),
    "a vocabulary of 1e400": (dict(vocab_size=10**400), "model.vocab_size is 1000"),
    "a width of 1e6": (dict(hidden_size=10**6, intermediate_size=4 * 10**6), "expected [19, 1000000]"),
    "a width of 1e9": (dict(hidden_size=10**9, intermediate_size=4 * 10**9), "model.d_model is 1000000000"),
    "a width in words": (dict(hidden_size="wide"), "hidden_size is 'wide'"),
    "a width in a list": (dict(hidden_size=[16]), "hidden_size is [16]"),
    "slots 1e9": (dict(memory_slots=10**9), "model.memory_slots is 1000000000"),
    "rotary of 1e400": (dict(rotary_emb_base=10**400), "rotary_emb_base is 1000"),
    "rotary nan": (dict(rotary_pct=float("nan")), "rotary_pct is nan"),
    "epsilon inf": (dict(layer_norm_eps=float("inf")), "layer_norm_eps is inf"),
    "rope in a list": (dict(rope_parameters=[1]), "rope_parameters is [1]"),
    "heads 0": (dict(num_attention_heads=0), "model.num_heads is 0"),
    "heads true": (dict(num_attention_heads=True), "num_attention_heads is True"),
    "type in a list": (dict(model_type=["spiralformer"]), "model_type is ['spiralformer']"),
    "an unknown topology": (dict(topology={"a": []}), "topology is {'a': []}"),
    "a pooling in a list": (dict(pooling=["mean"]), "pooling is ['mean']"),
    "an activation in a list": (dict(hidden_act=[]), "hidden_act is []"),
    "a long text": (dict(pooling="x" * 100_000), "model.pooling is"),
    "lines in a text": (dict(pooling="a\nb\rc\u2028d"), "model.pooling is"),
    "length 0": (dict(max_position_embeddings=0), "sequence_length is 0"),
    "length 1e12": (dict(max_position_embeddings=10**12), "sequence_length is 1000000000000"),
    "length below a chunk": (dict(max_position_embeddings=2), "model.chunks[0] is 4"),
}
RAW = {
    "empty": b"",
    "no JSON": b"{",
    "a list": b"[1]",
    "not UTF-8": b"\xff\xfe",
    "nested 1e5 deep": b'{"model_type": ' + b"[" * 10**5 + b"]" * 10**5 + b"}",
    "2 MB": b'{"model_type": "spiralformer", "x": "' + b"x" * 2**21 + b'"}',
    "40 MB of lists": b'{"model_type": "spiralformer", "schedule": [' + b"[]," * 14_000_000 + b"[]]}",
    "an endless number": b'{"model_type": "spiralformer", "vocab_size": ' + b"9" * 10**5 + b"}",
}
# Changes of a run's config.json.
RUNS = {
    "layers 1e8": ("model", dict(core_layers=HUGE), "model.core_layers is 100000000"),
    "a schedule of 1e5": ("model", dict(chunks=[1] * 10**5, offsets=None, shifts=None), "model.chunks"),
    "a vocabulary of 1e12": ("model", dict(vocab_size=10**12), "model.vocab_size"),
    "a rate of inf": ("optimizer", dict(peak_learning_rate=float("inf")), "optimizer.peak_learning_rate is inf"),
    "a time of inf": ("logging", dict(seconds=float("inf")), "logging.seconds is inf"),
    "a temperature of nan": ("summary", dict(temperature=float("nan")), "summary.temperature is nan"),
    "an integer of 1e400": ("train", dict(steps=10**400), "train.steps"),
    "a float of 1e400": ("optimizer", dict(clip_norm=10**400), "optimizer.clip_norm"),
    "a NUL": ("data", dict(paths=["a\0b"]), "data.paths[0]"),
    "a room in a list": ("model", [1, 2], "model is [1, 2]"),
    "lines in a name": ("model", {"a\nb\nc": 1}, "is not a field"),
    "a long name": ("model", {"a" * 10**5: 1}, "is not a field"),
    "a topology in a list": ("model", dict(topology=["mesh"]), "model.topology"),
}


def copy(good, tmp_path, name):
    shutil.copytree(good / name, tmp_path / name)
    return tmp_path / name


@pytest.mark.parametrize("change, words", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_hugging_face_folder(good, tmp_path, change, words):
    folder = copy(good, tmp_path, "hf")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | change
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    refused(import_hf, (f"--input={folder}", f"--workdir={tmp_path}/a/run"), words, tmp_path)
    if "max_position_embeddings" not in change:  # which only a run is made with
        refused(generate, (f"--workdir={folder}", "--prompt=a", "--max_new_tokens=2"), words, tmp_path)


@pytest.mark.parametrize("content", RAW.values(), ids=RAW.keys())
def test_a_config_that_is_none(good, tmp_path, content):
    folder = copy(good, tmp_path, "hf")
    (folder / "config.json").write_bytes(content)
    words = "config.json has more than 1048576 bytes" if len(content) > 2**20 else "config.json"
    refused(import_hf, (f"--input={folder}", f"--workdir={tmp_path}/x/run"), words, tmp_path)


@pytest.mark.parametrize("room, change, words", RUNS.values(), ids=RUNS.keys())
def test_the_configuration_in_a_checkpoint(room, change, words):
    config = json.loads(json.dumps(RunConfig().to_dict()))
    config[room] = change if isinstance(change, list) else config[room] | change
    with pytest.raises(SpiralError, match=re.escape(words)) as raised:
        RunConfig.from_dict(config)
    assert len(str(raised.value)) < 2000


@pytest.mark.parametrize(
    "content",
    [pytest.param(RAW[name], id=name, marks=() if name in ("empty", "2 MB") else pytest.mark.slow) for name in RAW],
)
def test_a_config_of_a_run_is_for_people(good, tmp_path, content):
    """Commands read the one in the checkpoint, which has a digest."""
    folder = copy(good, tmp_path, "run")
    (folder / "config.json").write_bytes(content)
    assert call(generate, f"--workdir={folder}", "--prompt=a", "--max_new_tokens=1")[0] == 0


def test_weights_that_are_none(good, tmp_path):
    folder = copy(good, tmp_path, "hf")
    weights = (folder / "model.safetensors").read_bytes()
    arguments = f"--input={folder}", f"--workdir={tmp_path}/a/run"
    endless, nested = (2**62).to_bytes(8, "little") + weights[8:], weights[:8] + b"[" * 1000 + weights[1008:]
    for content in (b"", b"{}", weights[:100], weights[:-1], weights + b"x", endless, nested):
        (folder / "model.safetensors").write_bytes(content)
        refused(import_hf, arguments, "model.safetensors is damaged or no safetensors file", tmp_path)
    (folder / "model.safetensors").unlink()
    refused(import_hf, arguments, "no weights", tmp_path)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../x"}}', encoding="utf-8")
    refused(import_hf, arguments, "weight_map", tmp_path)


def test_a_damaged_checkpoint(good, tmp_path):
    folder = copy(good, tmp_path, "run")
    largest = max((folder / "checkpoints/0/params").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 64
    largest.write_bytes(content)
    refused(export, (f"--workdir={folder}", f"--output={tmp_path}/a/b/out"), "is damaged", tmp_path)
    refused(generate, (f"--workdir={folder}", "--prompt=a", "--max_new_tokens=2"), "is damaged", tmp_path)


@pytest.mark.parametrize("name", ["data.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_info.json"])
def test_side_files_of_a_run(good, tmp_path, name):
    folder = copy(good, tmp_path, "run")
    for content in (b"", b"[", b"[" * 10**5, b"[1]", b"\xff", b'{"train": 3, "validation": [1]}'):
        (folder / name).write_bytes(content)
        refused(evaluate, (f"--workdir={folder}",), name.rpartition("/")[2].partition(".")[0], tmp_path)
    if name != "data.json":
        refused(export, (f"--workdir={folder}", f"--output={tmp_path}/a/out"), "tokenizer", tmp_path)
