"""Texts and records to make stores of, in this process or in one that is killed."""

import gzip
import hashlib
import json
import os
import pathlib
import subprocess
import sys

import pytest

import spiral_jax
from spiral_jax.corpus.prepare import prepare_folder
from spiral_jax.data.config import DataConfig

REPOSITORY = pathlib.Path(spiral_jax.__file__).parents[1]
SHARED = REPOSITORY / "../shared/data"
NEOX = SHARED / "tokenizer/20B_tokenizer.json"
needs_shared = pytest.mark.skipif(not NEOX.exists(), reason=f"no {NEOX}")
ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPOSITORY)}

# Read from standard input, without `if __name__ == "__main__"`: what a user may type into a shell.
PROGRAM = """
import sys, json
from spiral_jax.corpus import pieces, prepare
from spiral_jax.data.config import DataConfig
piece, output, fields = json.loads(sys.argv[1])
pieces._SMALLEST_PIECE = piece
fields = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
prepare.prepare_folder(DataConfig(**fields), output, report=lambda line: print(line, flush=True))
"""


def silent(line):
    del line


def make(corpus, output, **fields):
    fields = {"paths": (str(corpus),), "validation_fraction": 0.2, "workers": 1} | fields
    report = fields.pop("report", silent)
    prepare_folder(DataConfig(**fields), output, report=report)
    return output


def digests(folder):
    """Names and content of all files."""
    files = (path for path in pathlib.Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def texts_of(store, tokenizer):
    offsets = store.document_offsets_M.tolist()
    return [tokenizer.decode(store.read(start, end - 1)) for start, end in zip(offsets[:-1], offsets[1:], strict=True)]


def expected_texts(corpus):
    """What is in the files, read the simplest way."""
    texts = [path.read_bytes().decode() for path in sorted(corpus.glob("*.txt"))]
    for content in ((corpus / "records.jsonl").read_bytes(), gzip.decompress((corpus / "more.json.gz").read_bytes())):
        texts += [json.loads(line)["text"] for line in content.split(b"\n")]
    return [text for text in texts if text]


def start(piece_bytes, output, **fields):
    argument = json.dumps([piece_bytes, str(output), fields])
    return subprocess.Popen(
        [sys.executable, "-", argument],
        env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def run_until_killed(piece_bytes, output, seconds, **fields):
    """Runs the program and kills it after a while; whether it ended by itself, and what it said."""
    process = start(piece_bytes, output, **fields)
    process.stdin.write(PROGRAM)
    process.stdin.close()
    try:
        status = process.wait(seconds)
        assert status == 0
    except subprocess.TimeoutExpired:
        process.kill()
        status = process.wait()
    with process.stdout:
        return status == 0, process.stdout.read()


def workers_of(output):
    """Processes that are workers writing next to an output."""
    found = []
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            if b"spiral_jax.corpus.workers" in (folder / "cmdline").read_bytes() and any(
                str(output) in os.readlink(file) for file in (folder / "fd").iterdir()
            ):
                found.append(folder.name)
        except OSError:
            continue
    return found
