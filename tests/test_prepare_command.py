"""`python -m spiral_jax.prepare` as people type it."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from cases import slow
from verbs import call

from spiral_jax import prepare
from spiral_jax.data.prepared import open_folder

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": f"record {i}"}) + "\n" for i in range(100)))
    (tmp_path / "b.txt").write_text("a text\n" * 100)
    return tmp_path


def test_text_becomes_stores_with_statistics(texts, tmp_path, capsys):
    arguments = [f"--input={texts}/a.jsonl", f"--input={texts}/b.txt", "--text_field=body", "--validation_fraction=0.3",
                 f"--output={tmp_path}/out", "--tokenizer=bpe", "--bpe_vocab_size=300"]  # fmt: skip
    status, errors = call(prepare, *arguments)
    output = capsys.readouterr().out
    assert (status, errors) == (0, "")
    prepared = open_folder(tmp_path / "out")
    documents = prepared.train[0].num_documents, prepared.validation.num_documents
    assert sum(documents) == 101
    last = output.splitlines()[-1]
    assert f"train {documents[0]} documents" in last and f"validation {documents[1]} documents" in last
    assert last.count("bytes per token") == 2
    status, errors = call(prepare, *arguments)
    output = capsys.readouterr().out
    assert (status, errors) == (0, "") and "is complete" in output
    status, errors = call(prepare, *arguments, "--invalid=skip")
    assert status == 2 and errors.count("\n") == 1 and "allowed: a new or an empty folder" in errors


MISTAKES = {
    "no input": (["--output=o", "--tokenizer=bytes"], "--input is missing"),
    "no output": (["--input=b.txt", "--tokenizer=bytes"], "--output is missing"),
    "no tokenizer": (["--input=b.txt", "--output=o"], "--tokenizer is missing"),
    "no such input": (
        ["--input=nowhere", "--output=o", "--tokenizer=bytes"],
        "--input is 'nowhere', which does not exist; allowed: files, folders",
    ),
    "no such validation": (
        ["--input=b.txt", "--validation_input=nowhere", "--output=o", "--tokenizer=bytes"],
        "--validation_input is 'nowhere', which does not exist",
    ),
    "all excluded": (["--input=b.txt", "--exclude=*", "--output=o", "--tokenizer=bytes"], "--exclude leaves out all 1"),
    "no such tokenizer": (
        ["--input=b.txt", "--output=o", "--tokenizer=no.json"],
        "--tokenizer is 'no.json'; allowed: ",
    ),
    "format": (["--input=b.txt", "--output=o", "--tokenizer=bytes", "--format=csv"], "--format is 'csv'; allowed: "),
    "fraction": (
        ["--input=b.txt", "--output=o", "--tokenizer=bytes", "--validation_fraction=1"],
        "--validation_fraction is 1.0; allowed: ",
    ),
    "field": (
        ["--input=a.jsonl", "--output=o", "--tokenizer=bytes"],
        'a.jsonl:1: no field "text" (--text_field); fields: body',
    ),
    "no json": (
        ["--input=b.txt", "--format=jsonl", "--output=o", "--tokenizer=bytes"],
        'b.txt:1: not JSON (Expecting value: line 1 column 1 (char 0)); allowed: UTF-8 text, or --invalid="skip"',
    ),
    "inspect and make": (["--inspect=s", "--output=o"], "--output does not go with --inspect"),
    "verify what is made": (["--input=b.txt", "--output=o", "--tokenizer=bytes", "--verify"], "--verify goes with"),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line(texts, monkeypatch, arguments, message):
    monkeypatch.chdir(texts)
    status, errors = call(prepare, *arguments)
    assert status == 2 and errors.startswith("error: ") and errors.count("\n") == 1 and message in errors
    assert not (texts / "o").exists()


@pytest.mark.parametrize(("number", "workers"), [slow(signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_a_signal_stops_it_and_the_same_command_goes_on(tmp_path, capsys, number, workers):
    (tmp_path / "a.txt").write_text("".join(f"line {i % 1000} of a long text\n" for i in range(150_000)))
    arguments = [f"--input={tmp_path}/a.txt", f"--output={tmp_path}/out", "--tokenizer=bpe", f"--workers={workers}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "spiral_jax.prepare", *arguments],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list((tmp_path / ".out.partial/parts").glob("*.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    assert errors == f"stopped; the same command goes on from here ({tmp_path}/out is not complete)\n"
    assert not (tmp_path / "out").exists()
    status, errors = call(prepare, *arguments)
    output = capsys.readouterr().out
    assert (status, errors) == (0, "") and "going on with" in output
    open_folder(tmp_path / "out").train[0].verify()


def test_a_store_is_inspected(texts, tmp_path, capsys):
    assert call(prepare, f"--input={texts}/b.txt", f"--output={tmp_path}/out", "--tokenizer=bytes") == (0, "")
    capsys.readouterr()
    assert call(prepare, f"--inspect={tmp_path}/out", "--show=1", "--verify") == (0, "")
    assert "a text" in capsys.readouterr().out
    os.truncate(tmp_path / "out/train/tokens.bin", 10)
    status, errors = call(prepare, f"--inspect={tmp_path}/out")
    assert status == 2 and "tokens.bin has 10 bytes" in errors
