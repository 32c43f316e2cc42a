"""`python -m spiral_jax.generate` on a folder with a model of three words."""

import io
import json

import numpy as np
import pytest
from folders import run_of, write_folder
from verbs import call

from spiral_jax import generate
from spiral_jax.data.json_files import for_stdout
from spiral_jax.data.tokenizers import ByteTokenizer
from spiral_jax.decoding.decoder import Token
from spiral_jax.model.config import ModelConfig

CONFIG = ModelConfig(vocab_size=6, d_model=8, num_heads=2, prelude_layers=0, core_layers=1, coda_layers=0,
                     chunks=(2,), rotary_fraction=0.5, dtype="float32")  # fmt: skip


@pytest.fixture(scope="module")
def folder(random_model, tmp_path_factory):
    hf_config, tensors, _ = random_model(CONFIG, scale=3.0)
    return write_folder(tmp_path_factory.mktemp("generate") / "model", hf_config, tensors)


def run(capsys, *arguments):
    """(exit status, stdout, stderr)."""
    status, errors = call(generate, *arguments)
    return status, capsys.readouterr().out, errors


def greedy(forward, random_model, prompt, new):
    ids = list(prompt)
    for _ in range(new):
        logits = forward(CONFIG, random_model(CONFIG, scale=3.0)[2], np.pad(ids, (0, 16 - len(ids)))[None])
        ids.append(int(np.argmax(logits[0, len(ids) - 1, :3])))
        if ids[-1] == 0:
            break
    return ids[len(prompt) :]


def test_texts_of_several_prompts(folder, capsys, forward, random_model, tmp_path, monkeypatch):
    """As JSON, in the order of the prompts, from flags, a file and standard input; from a run as from a folder."""
    texts, prompts = ["a b a", "b", "b b"], [[1, 2, 1], [2], [2, 2]]
    wanted = [greedy(forward, random_model, ids, 5) for ids in prompts]
    status, out, errors = run(
        capsys, f"--workdir={folder}", *(f"--prompt={text}" for text in texts), "--max_new_tokens=5", "--json",
        "--batch_size=2",
    )  # fmt: skip
    assert status == 0
    found = [json.loads(line) for line in out.splitlines()]
    assert [(x["prompt"], x["ids"]) for x in found] == list(zip(texts, wanted, strict=True))
    assert [x["end"] for x in found] == ["stop" if ids[-1] == 0 else "length" for ids in wanted]
    for line in ("compiled in", "prompts      6 tokens in 3 prompts", "(2 at a time)", "bytes a token", "runs a token"):
        assert line in errors

    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("\n".join(texts).encode())))
    run_folder = run_of(folder, tmp_path / "run")
    for source, place in ((tmp_path / "prompts.jsonl", folder), ("-", run_folder)):
        again = run(capsys, f"--workdir={place}", f"--input={source}", "--max_new_tokens=5", "--json", "--batch_size=2")
        assert again[:2] == (0, out)


def test_a_single_token(folder, capsys, forward, random_model):
    status, out, _ = run(capsys, f"--workdir={folder}", "--prompt=a b a", "--max_new_tokens=1", "--json")
    assert status == 0
    assert json.loads(out)["ids"] == greedy(forward, random_model, [1, 2, 1], 1)


class Writes(io.StringIO):
    def __init__(self):
        super().__init__()
        self.pieces = []

    def write(self, text):
        self.pieces.append(text)
        return len(text)


def test_text_streams_in_whole_characters_and_without_what_may_be_a_stop(monkeypatch):
    out = Writes()
    monkeypatch.setattr("sys.stdout", out)
    shown = generate.Shown(ByteTokenizer(), ["in ", "2nd"], ["END"], as_json=False)
    ids = [[*"xé".encode(), *b"yEN.END"], [*b"z", 256]]
    shown.add(Token(1, ids[1][0], ""))
    for id_ in ids[0][:-1]:
        shown.add(Token(0, id_, ""))
    # After `END` less its last byte, the two before may still become the stop.
    assert "".join(out.pieces) == "=== 1\nin xéyEN."
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in out.pieces)
    assert [piece for piece in out.pieces if piece] != ["".join(out.pieces)], "it came at once"
    shown.add(Token(1, ids[1][1], "stop"))
    shown.add(Token(0, ids[0][-1], "stop"))
    assert "".join(out.pieces) == "=== 1\nin xéyEN.\n=== 2\n2ndz\n"
    assert shown.tokens == len(ids[0]) + 2


BAD = {
    "empty": (["--prompt="], "--prompt 1 is empty; allowed: at least one token"),
    "longer than the cache": (["--prompt=a a a", "--max_new_tokens=62"],
                              "--prompt 1 has 3 tokens and 62 to add (--max_new_tokens); allowed: 64 together"),
    "than --max_length": (["--prompt=a a a", "--max_new_tokens=2", "--max_length=4"], "allowed: 4 together"),
    "temperature": (["--prompt=a", "--temperature=-0.5"], "--temperature is -0.5; allowed: 0 (greedy) or more"),
    "top_p 0": (["--prompt=a", "--top_p=0"], "--top_p is 0.0; allowed: above 0, at most 1"),
    "top_p 1.5": (["--prompt=a", "--top_p=1.5"], "--top_p is 1.5; allowed: above 0, at most 1"),
    "top_k": (["--prompt=a", "--top_k=-1"], "--top_k is -1; allowed: 0"),
    "seed": (["--prompt=a", "--seed=-1"], "--seed is -1; allowed: 0 to 2^32 - 1"),
    "no such token": (["--prompt=a", "--stop_token=zebra"], "--stop_token is 'zebra'; allowed: the text of one"),
    "empty stop": (["--prompt=a", "--stop="], "--stop is ''; allowed: a text"),
    "no prompt": ([], "--prompt or --input is missing; allowed: one of them"),
    "both": (["--prompt=a", "--input=x"], "--input is 'x'; allowed: none beside --prompt"),
    "no such file": (["--input=/nowhere"], "--input /nowhere cannot be read (No such file or directory)"),
    "mesh": (["--prompt=a", "--mesh=2,2"], "--mesh is '2,2'; allowed: data,fsdp,tensor, as in 1,1,8"),
    "too many devices": (["--prompt=a", "--mesh=3,3,1"], "--mesh is '3,3,1'; allowed: a product of at most 8"),
    "heads": (["--prompt=a", "--mesh=1,1,4"], "model.num_heads is 2; allowed: a multiple of mesh.tensor 4"),
    "new tokens": (["--prompt=a", "--max_new_tokens=0"], "--max_new_tokens is 0; allowed: 1 or more"),
    "batch": (["--prompt=a", "--batch_size=0"], "--batch_size is 0; allowed: 1 or more"),
    "step": (["--prompt=a", "--step=3"], "step is 3; allowed: none"),
}  # fmt: skip


def test_lines_of_prompts_end_at_line_feeds_only(tmp_path, monkeypatch):
    """Also in what `generate --json` itself has written; and a mark of the byte order is no part of a prompt."""
    text = "a\x0bb\x0cc\x1cd\x85e\u2028f\u2029g\rh"
    (tmp_path / "x.txt").write_bytes(f"\ufeff{text}\r\nb\n".encode())
    assert [prompt for _, prompt in generate.read_prompts([], str(tmp_path / "x.txt"))] == [text, "b"]
    line = json.dumps({"prompt": text, "text": text, "ids": [1], "end": "stop"}, ensure_ascii=False)
    (tmp_path / "x.jsonl").write_bytes(f"\ufeff{line}\n".encode())
    assert generate.read_prompts([], str(tmp_path / "x.jsonl")) == [(f"--input {tmp_path}/x.jsonl:1", text)]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(f"\ufeff{line}\n".encode())))
    assert generate.read_prompts([], "-") == [("--input -:1", text)]


@pytest.mark.parametrize("encoding", ["utf-8", "iso8859-1", "ascii"])
def test_json_is_json_whatever_standard_output_can_show(monkeypatch, encoding):
    text, written = "é – “日本” \U0001f600 \x85", io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding=encoding, errors="backslashreplace"))
    print(for_stdout(json.dumps([text], ensure_ascii=False)), flush=True)
    assert json.loads(written.getvalue().decode("utf-8")) == [text]


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, folder, capsys):
    arguments, message = BAD[case]
    status, out, errors = run(capsys, f"--workdir={folder}", "--max_new_tokens=5", *arguments)
    assert (status, out, errors.count("\n")) == (2, "", 1)
    assert errors.startswith("error: ") and message in errors


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("x.jsonl", b'{"prompt": "a"}\n{"text": "a"}\n', "x.jsonl:2 is no JSON object with a text `prompt`"),
     ("x.jsonl", b'{"prompt": 3}\n', "x.jsonl:1 is no JSON object"), ("x", b"a\n\nb\n", "x:2 is empty"),
     ("x", b"", "x is empty"), ("x", b"a\xff", "x is not UTF-8 at byte 1")],
)  # fmt: skip
def test_bad_files_are_named(name, content, message, folder, capsys, tmp_path):
    (tmp_path / name).write_bytes(content)
    status, out, errors = run(capsys, f"--workdir={folder}", f"--input={tmp_path / name}", "--max_new_tokens=5")
    assert (status, out) == (2, "") and message in errors and errors.count("\n") == 1


def test_tokens_by_their_text():
    assert [ByteTokenizer().token_id(text) for text in ("a", "<|endoftext|>", "ab", "é")] == [97, 256, None, None]
