import gzip
import json
import random

import pytest

from spiral_jax.corpus import pieces


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(pieces, "_SMALLEST_PIECE", 5_000)


@pytest.fixture
def corpus(tmp_path):
    """Texts, short and long, and records, some of them packed."""
    rng = random.Random(0)
    folder = tmp_path / "corpus"
    folder.mkdir()

    def text(size):
        words = ["word", "naïve", "日本", "x", "\n", "\r\n", "it's", "<|endoftext|>", "\U0001f600"]
        return " ".join(rng.choices(words, k=size))

    for i in range(12):
        (folder / f"{i}.txt").write_bytes(text(rng.randrange(1, 300)).encode())
    (folder / "long.txt").write_bytes(text(9_000).encode())
    (folder / "empty.txt").write_bytes(b"")
    lines = [json.dumps({"text": text(rng.randrange(0, 200))}) for _ in range(350)]
    (folder / "records.jsonl").write_text("\n".join(lines[:200]))
    (folder / "more.json.gz").write_bytes(gzip.compress("\n".join(lines[200:]).encode(), mtime=0))
    return folder
