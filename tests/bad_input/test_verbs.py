"""`prepare`, `generate`, `evaluate`, `probe`, `export`, `import_hf`, `bench` and `reference` on bad input."""

import gzip
import json
import subprocess
import sys

import pytest
from refusals import refused

from spiral_jax import bench, evaluate, export, generate, import_hf, prepare, probe, reference
from spiral_jax.__main__ import VERBS

# Each: arguments with {good} for the fixture's folder and {bad} for files of the test's own, and words of the line.
PREPARE = {
    "nothing": ((), "--input is missing"),
    "no output": (("--input={good}/text.txt", "--tokenizer=bytes"), "--output is missing"),
    "no tokenizer": (("--input={good}/text.txt", "--output={bad}/x/out"), "--tokenizer is missing"),
    "no such input": (("--input=/no/text", "--output={bad}/x/out", "--tokenizer=bytes"), "--input is '/no/text'"),
    "empty input": (("--input={good}/empty.txt", "--output={bad}/x/out", "--tokenizer=bytes"), "empty.txt"),
    "output is a file": (("--input={good}/text.txt", "--output={good}/text.txt", "--tokenizer=bytes"), "is a file"),
    "output holds things": (
        ("--input={good}/text.txt", "--output={good}/run", "--tokenizer=bytes"),
        "holds other files",
    ),
    "output below a file": (
        ("--input={good}/text.txt", "--output={good}/empty.txt/x", "--tokenizer=bytes"),
        "cannot be written",
    ),
    "output elsewhere": (("--input={good}/text.txt", "--output=gs://b/x", "--tokenizer=bytes"), "gs://b/x"),
    "no such tokenizer": (
        ("--input={good}/text.txt", "--output={bad}/x/out", "--tokenizer=/no/t.json"),
        "--tokenizer is '/no/t.json'",
    ),
    "text for a tokenizer": (
        ("--input={good}/text.txt", "--output={bad}/x/out", "--tokenizer={good}/text.txt"),
        "text.txt is damaged",
    ),
    "inspect and make": (("--inspect={good}/store", "--input={good}/text.txt"), "--input does not go with --inspect"),
    "inspect nothing": (("--inspect=/no/store",), "--inspect is '/no/store'"),
    "inspect a text": (("--inspect={good}/text.txt",), "text.txt"),
    "show nothing": (("--inspect={good}/store", "--show=-1"), "--show"),
    "verify what": (("--verify",), "--input is missing"),
    "input twice the output": (("--output={bad}/a", "--output={bad}/b"), "--output is given 2 times"),
}
INPUTS = {
    "not UTF-8": ("a.txt", b"abc\xff", "byte 3 is not UTF-8"),
    "a broken line": ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl:2"),
    "no object": ("a.jsonl", b"[1]\n", "a.jsonl:1"),
    "no field": ("a.jsonl", b'{"body": "a"}\n', 'no field "text"'),
    "a number": ("a.jsonl", b'{"text": 3}\n', 'field "text" is a number'),
    "half a character": ("a.jsonl", b'{"text": "\\ud800"}\n', "no UTF-8 form"),
    "nested deeply": ("a.jsonl", b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", "not JSON"),
    "an endless number": ("a.jsonl", b'{"text": ' + b"1" * 100_000 + b"}\n", "not JSON"),
    "no gzip": ("a.txt.gz", b"abc", "a.txt.gz is cut off or damaged"),
    "half a gzip": ("a.txt.gz", gzip.compress(bytes(range(256)) * 99)[:-20], "a.txt.gz is cut off or damaged"),
    "no zstd": ("a.txt.zst", b"abc", "a.txt.zst"),
    "no parquet": ("a.parquet", b"abc", "a.parquet is not a parquet file"),
    "blank lines": ("a.jsonl", b"\n\n\n", "no text for train"),
}
PREPARE_FLAGS = ("--validation_fraction=nan", "--validation_fraction=1", "--validation_fraction=x", "--workers=-1",
                 "--workers=99999999", "--bpe_vocab_size=3", "--format=csv", "--invalid=maybe", "--text_field=",
                 "--separator=x", "--longest_record=0", "--longest_record=x", "--exclude=*", "--validation_input=/no",
                 "--worker=3")  # fmt: skip
GENERATE = {
    "nothing": ((), "--workdir is missing"),
    "no such run": (("--workdir=/no/run", "--prompt=a"), "--workdir is '/no/run', which does not exist"),
    "no run": (("--workdir={good}/store", "--prompt=a"), "store"),
    "no prompt": (("--workdir={good}/run",), "--prompt or --input is missing"),
    "an empty prompt": (("--workdir={good}/run", "--prompt="), "--prompt 1 is empty"),
    "prompt and file": (("--workdir={good}/run", "--prompt=a", "--input=x"), "--input is 'x'"),
    "no such file": (("--workdir={good}/run", "--input=/no/file"), "--input /no/file cannot be read"),
    "a folder": (("--workdir={good}/run", "--input={good}"), "cannot be read"),
    "an empty file": (("--workdir={good}/run", "--input={good}/empty.txt"), "is empty"),
    "records without prompts": (("--workdir={good}/run", "--input={good}/records.jsonl"), "records.jsonl:1"),
    "step 7": (("--workdir={good}/run", "--prompt=a", "--max_new_tokens=2", "--step=7"), "step 7"),
    "a step of a folder": (("--workdir={good}/hf", "--prompt=a", "--max_new_tokens=2", "--step=0"), "step is 0"),
    "nothing to add": (("--workdir={good}/run", "--prompt=a", "--max_new_tokens=0"), "--max_new_tokens is 0"),
    "too much to add": (("--workdir={good}/run", "--prompt=a", "--max_new_tokens=999"), "--max_new_tokens"),
    "no length": (("--workdir={good}/run", "--prompt=a", "--max_length=1"), "--max_length is 1"),
    "no texts": (("--workdir={good}/run", "--prompt=a", "--batch_size=0"), "--batch_size is 0"),
    "temperature nan": (("--workdir={good}/run", "--prompt=a", "--temperature=nan"), "--temperature is nan"),
    "temperature inf": (("--workdir={good}/run", "--prompt=a", "--temperature=inf"), "--temperature is inf"),
    "temperature below 0": (("--workdir={good}/run", "--prompt=a", "--temperature=-1"), "--temperature"),
    "top_p of 0": (("--workdir={good}/run", "--prompt=a", "--top_p=0"), "--top_p"),
    "top_k below 0": (("--workdir={good}/run", "--prompt=a", "--top_k=-1"), "--top_k"),
    "seed below 0": (("--workdir={good}/run", "--prompt=a", "--max_new_tokens=2", "--seed=-1"), "--seed"),
    "an empty stop": (("--workdir={good}/run", "--prompt=a", "--stop="), "--stop is ''"),
    "a stop of many": (
        ("--workdir={good}/run", "--prompt=a", "--max_new_tokens=2", "--stop_token=a b"),
        "--stop_token",
    ),
    "mesh of two": (("--workdir={good}/run", "--prompt=a", "--max_new_tokens=2", "--mesh=1,1"), "--mesh is '1,1'"),
    "mesh of 0": (("--workdir={good}/run", "--prompt=a", "--max_new_tokens=2", "--mesh=0,1,1"), "--mesh"),
    "mesh of other digits": (("--workdir={good}/run", "--prompt=a", "--max_new_tokens=2", "--mesh=²,1,1"), "--mesh"),
    "mesh of 999": (("--workdir={good}/run", "--prompt=a", "--max_new_tokens=2", "--mesh=999,1,1"), "--mesh"),
    "unknown dtype": (("--workdir={good}/run", "--prompt=a", "--max_new_tokens=2", "--dtype=int8"), "dtype is 'int8'"),
}
EVALUATE = {
    "nothing": ((), "--workdir is missing"),
    "no run": (("--workdir={good}",), "has no checkpoints"),
    "an export": (("--workdir={good}/hf",), "has no checkpoints"),
    "no validation text": (("--workdir={good}/run",), "data.json"),
    "no such input": (("--workdir={good}/run", "--input=/no/file"), "/no/file"),
    "an empty input": (("--workdir={good}/run", "--input={good}/empty.txt"), "empty.txt"),
    "many inputs": (("--workdir={good}/run", "--input={good}/*.*"), "matches"),
    "a folder": (("--workdir={good}/run", "--input={good}/hf"), "manifest.json does not exist"),
    "records": (("--workdir={good}/run", "--input={good}/records.jsonl"), "records.jsonl', which is jsonl; allowed: a"),
    "another tokenizer's": (("--workdir={good}/run", "--input={good}/store/train"), "data.tokenizer has fingerprint"),
    "step 7": (("--workdir={good}/run", "--input={good}/text.txt", "--step=7"), "step 7"),
    "stride beyond the window": (("--workdir={good}/run", "--input={good}/text.txt", "--stride=17"), "--stride is 17"),
    "stride of 0": (("--workdir={good}/run", "--input={good}/text.txt", "--stride=0"), "--stride is 0"),
    "no windows": (("--workdir={good}/run", "--input={good}/text.txt", "--batch_size=0"), "--batch_size is 0"),
    "shots without tasks": (("--workdir={good}/run", "--num_fewshot=3"), "--num_fewshot is 3"),
    "limit below 0": (("--workdir={good}/run", "--limit=-1"), "--limit is -1"),
    "tasks and a text": (("--workdir={good}/run", "--tasks=piqa", "--input=x"), "--input is x"),
    "a URL of nobody": (("--workdir={good}/run", "--input=nope://x/y"), "nope://x/y"),
}
PROBE = {
    "nothing": ((), "--workdir is missing"),
    "no such run": (("--workdir=/no/run",), "--workdir is '/no/run', which does not exist"),
    "no run": (("--workdir={good}/store",), "has no checkpoints"),
    "no core": (("--workdir={good}/vanilla", "--data={good}/text.txt"), "2 layers, which has no core"),
    "no validation text": (("--workdir={good}/run",), "data.json is missing or broken; allowed: a text with --data"),
    "a folder without a text": (("--workdir={good}/hf",), "--data is missing"),
    "no such data": (("--workdir={good}/run", "--data=/no/file"), "--data is '/no/file'"),
    "empty data": (("--workdir={good}/run", "--data={good}/empty.txt"), "empty.txt"),
    "many data": (("--workdir={good}/run", "--data={good}/*.*"), "--data matches"),
    "records": (("--workdir={good}/run", "--data={good}/records.jsonl"), "records.jsonl', which is jsonl; allowed: a"),
    "another tokenizer's": (("--workdir={good}/run", "--data={good}/store/train"), "data.tokenizer has fingerprint"),
    "samples 0": (("--workdir={good}/run", "--data={good}/text.txt", "--samples=0"), "--samples is 0"),
    "more than there is": (("--workdir={good}/run", "--data={good}/text.txt", "--samples=99999"), "--samples is 99999"),
    "samples in words": (("--workdir={good}/run", "--samples=all"), "--samples is 'all'"),
    "seed below 0": (("--workdir={good}/run", "--data={good}/text.txt", "--seed=-1"), "--seed is -1"),
    "length 0": (("--workdir={good}/run", "--data={good}/text.txt", "--sequence_length=0"), "--sequence_length is 0"),
    "no chunk": (("--workdir={good}/run", "--data={good}/text.txt", "--sequence_length=1"), "--sequence_length is 1"),
    "short data": (("--workdir={good}/run", "--data={good}/text.txt", "--sequence_length=99999"), "at least 100000"),
    "no rows": (("--workdir={good}/run", "--data={good}/text.txt", "--batch_size=0"), "--batch_size is 0"),
    "step 7": (("--workdir={good}/run", "--data={good}/text.txt", "--step=7"), "step 7"),
    "a step of a folder": (("--workdir={good}/hf", "--data={good}/text.txt", "--step=0"), "--step is 0"),
    "no such other": (("--workdir={good}/run", "--data={good}/text.txt", "--samples=2", "--beside=/no/run"), "/no/run"),
    "beside itself": (
        ("--workdir={good}/run", "--data={good}/text.txt", "--samples=2", "--beside={good}/run"),
        "--beside is",
    ),
    "output holds things": (
        ("--workdir={good}/run", "--data={good}/text.txt", "--samples=2", "--output={good}"),
        "allowed: a folder that is new or empty",
    ),
    "output below a file": (
        ("--workdir={good}/run", "--data={good}/text.txt", "--samples=2", "--output={good}/text.txt/a"),
        "text.txt/a",
    ),
}
EXPORT = {
    "nothing": ((), "--workdir is missing"),
    "no output": (("--workdir={good}/run",), "--output is missing"),
    "no such run": (("--workdir=/no/run", "--output={bad}/x/out"), "--workdir is '/no/run', which does not exist"),
    "no run": (("--workdir={good}/store", "--output={bad}/x/out"), "has no checkpoints"),
    "output is a file": (("--workdir={good}/run", "--output={good}/text.txt"), "is a file"),
    "output holds things": (("--workdir={good}/run", "--output={good}"), "allowed: a folder that is new or empty"),
    "output below a file": (("--workdir={good}/run", "--output={good}/text.txt/a/b"), "text.txt/a/b"),
    "output elsewhere": (("--workdir={good}/run", "--output=gs://b/x"), "gs://b/x"),
    "output nowhere": (("--workdir={good}/run", "--output=/proc/x/out"), "/proc/x/out"),
    "step 7": (("--workdir={good}/run", "--output={bad}/x/out", "--step=7"), "step 7"),
    "a step in words": (("--workdir={good}/run", "--output={bad}/x/out", "--step=last"), "--step is 'last'"),
    "unknown dtype": (("--workdir={good}/run", "--output={bad}/x/out", "--dtype=int8"), "--dtype is 'int8'"),
}
IMPORT = {
    "nothing": ((), "--input is missing"),
    "no such folder": (("--input=/no/folder", "--workdir={bad}/x/run"), "--input /no/folder is no folder"),
    "no workdir": (("--input={good}/hf",), "--workdir is missing"),
    "workdir holds things": (("--input={good}/hf", "--workdir={good}/run"), "allowed: a folder that is new or empty"),
    "no model": (("--input={good}/store", "--workdir={bad}/x/run"), "config.json does not exist"),
    "no such tokenizer": (("--input={good}/hf", "--workdir={bad}/x/run", "--tokenizer=/no/t.json"), "/no/t.json"),
    "no such config": (("--input={good}/hf", "--workdir={bad}/x/run", "--config=nope.py"), "--config is 'nope.py'"),
}
BENCH = {
    "unknown subject": (("--subject=weather",), "--subject is 'weather'"),
    "no such store": (("--store=/no/store",), "/no/store"),
    "a path for a URL": (("--remote=/a/path", "--store={good}/store"), "--remote is '/a/path'"),
    "a URL alone": (("--remote=http://127.0.0.1:9/x",), "--store is ''"),
    "length 0": (("--sequence_length=0",), "--sequence_length is '0'"),
    "seconds nan": (("--seconds=nan",), "--seconds is nan"),
    "no repeats": (("--repeats=0",), "--repeats is '0'"),
    "no tokenizer": (("--subject=tokenizer", "--input={good}/text.txt"), "--tokenizer"),
    "no such text": (("--subject=tokenizer", "--input=/no", "--tokenizer={good}/hf/tokenizer.json"), "/no does not"),
    "no texts": (("--subject=decoding", "--texts=0"), "--texts is '0'"),
    "width 0": (("--subject=decoding", "--width=0"), "--width is 0"),
    "layers 5": (("--subject=decoding", "--layers=5"), "--layers is 5"),
    "nothing new": (("--subject=decoding", "--new_tokens=0"), "--new_tokens is 0"),
    "no prompt": (("--subject=decoding", "--prompt_tokens=0"), "--prompt_tokens is 0"),
}
REFERENCE = {"a word": (("words",), "'words'"), "a flag": (("--config=x",), "--config")}
TABLE = [
    pytest.param(verb, *case, id=f"{verb.__name__.rpartition('.')[2]}: {name}")
    for verb, cases in ((prepare, PREPARE), (generate, GENERATE), (evaluate, EVALUATE), (probe, PROBE),
                        (export, EXPORT), (import_hf, IMPORT), (bench, BENCH), (reference, REFERENCE))
    for name, case in cases.items()
]  # fmt: skip


@pytest.mark.parametrize("verb, arguments, words", TABLE)
def test_arguments(good, tmp_path, verb, arguments, words):
    arguments = [argument.format(good=good, bad=tmp_path) for argument in arguments]
    refused(verb, arguments, words, good)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name, content, words", INPUTS.values(), ids=INPUTS.keys())
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_texts(tmp_path, name, content, words, tokenizer):
    (tmp_path / name).write_bytes(content)
    arguments = f"--input={tmp_path}/{name}", f"--output={tmp_path}/a/b", f"--tokenizer={tokenizer}"
    refused(prepare, (*arguments, "--bpe_vocab_size=300"), words, tmp_path)


@pytest.mark.parametrize("flag", PREPARE_FLAGS)
def test_flags_of_prepare(good, tmp_path, flag):
    arguments = f"--input={good}/text.txt", f"--output={tmp_path}/x/out", "--tokenizer=bytes", flag
    refused(prepare, arguments, flag.partition("=")[0], good)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"[1]", b'{"text": "a"}', b'{"prompt": 3}', b"{", b"[" * 100_000, b"\xff"])
def test_prompts(good, tmp_path, content):
    (tmp_path / "prompts.jsonl").write_bytes(content)
    refused(generate, (f"--workdir={good}/run", f"--input={tmp_path}/prompts.jsonl"), "prompts.jsonl", tmp_path)


def test_a_name_that_is_not_utf_8_is_no_matter(good, tmp_path):
    refused(generate, (f"--workdir={tmp_path}/\udcff", "--prompt=a"), "does not exist", tmp_path)
    refused(generate, (f"--workdir={good}/run", "--prompt=\udcff", "--max_new_tokens=2"), "UTF-8", good)


def test_the_list_of_verbs():
    def run(*arguments):
        command = [sys.executable, "-m", "spiral_jax", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    found = run("foo")
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith("error: the verb is 'foo'; allowed: prepare, train, ")
    found = run("describe", "--config=nope.py")
    assert (found.returncode, found.stdout) == (2, "") and found.stderr.startswith("error: --config is 'nope.py'")
    found = run("--help")
    assert found.returncode == 0 and "import_hf" in found.stdout


@pytest.mark.slow
@pytest.mark.parametrize("verb", [*VERBS])
def test_as_a_process(tmp_path, verb):
    """The same from a shell, where what libraries print at start and exit would be seen."""
    command = [sys.executable, "-m", f"spiral_jax.{verb}", "--nope", "--workdir=x"]
    found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert found.returncode == 2 and not found.stdout and not list(tmp_path.iterdir())
    assert found.stderr.startswith("error: ") and found.stderr.count("\n") == 1, json.dumps(found.stderr)
