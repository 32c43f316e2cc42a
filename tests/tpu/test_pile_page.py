"""docs/pile.md: its commands parse, its numbers follow from the formats, and its steps work on small files."""

import hashlib
import io
import json
import re
from pathlib import Path

import megatron_writer
import pytest
from pages import commands, lint, parse_verb
from verbs import call

from spiral_jax import prepare
from spiral_jax.data.config import DataConfig
from spiral_jax.data.prepared import open_stores

PAGE = Path(__file__).parents[2] / "docs" / "pile.md"
TEXT = PAGE.read_text(encoding="utf-8")
NAME = "pile_0.87_deduped_text_document"


def test_commands_of_ours_parse():
    found = [parse_verb(arguments) for arguments in commands(PAGE, "python -m spiral_jax.")]
    assert len(found) == 3 and found[0].verify and found[1].validation_fraction == 0


@pytest.mark.slow
def test_gcloud_accepts_the_others():
    found = commands(PAGE, "gcloud")
    assert len(found) == 6
    assert not list(filter(None, map(lint, found)))


def test_every_command_is_of_a_program_that_is_known():
    assert {arguments[0] for arguments in commands(PAGE)} == {"gcloud", "hf", "cat", "python"}


def test_numbers_follow_from_the_format():
    sequences = 143_000 * 1024
    assert f"{sequences:,} sequences of 2049 tokens" in TEXT
    assert f"{sequences * 2049 * 2:,} bytes in 21 parts" in TEXT and sequences * 2049 * 2 // 20 > 30e9
    assert f"an index of {34 + 12 * sequences + 8:,} bytes" in TEXT
    assert round(207e9 * 2 / 1e9) == 414


@pytest.fixture
def pile(tmp_path):
    """Small files of the published names and formats, and a tokenizer that knows their ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path / "pile"
    tokens, _, _ = megatron_writer.write(folder, name=NAME, documents=40, highest=90, empty=False)
    content = (folder / f"{NAME}.bin").read_bytes()
    megatron_writer.cut(folder, [101, 200], NAME)  # not between two tokens
    vocabulary = {"<|endoftext|>": 0} | {chr(33 + i): i + 1 for i in range(90)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="!"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder, tokens, content


def test_the_steps_on_small_files(pile, tmp_path, monkeypatch, capsys):
    zstandard = pytest.importorskip("zstandard")
    folder, tokens, content = pile
    texts = tmp_path / "pile-val"
    texts.mkdir()
    lines = "".join(json.dumps({"text": "abc" * i, "meta": {"pile_set_name": "Github"}}) + "\n" for i in range(1, 30))
    packed = io.BytesIO()
    with zstandard.ZstdCompressor().stream_writer(packed, closefd=False) as writer:
        writer.write(lines.encode())
    (texts / "val.jsonl.zst").write_bytes(packed.getvalue())
    monkeypatch.chdir(tmp_path)

    # `cat PARTS | sha256sum` is the sum of the file that was cut, in the order of the pattern.
    (pattern,) = (arguments[1] for arguments in commands(PAGE, "cat"))
    parts = sorted(tmp_path.glob(pattern.replace("of-00082", "of-00002")))
    assert len(parts) == 3
    assert hashlib.sha256(b"".join(part.read_bytes() for part in parts)).digest() == hashlib.sha256(content).digest()
    assert re.search(r"`[0-9a-f]{64}`", TEXT)

    inspected, made, _ = (arguments[3:] for arguments in commands(PAGE, "python -m spiral_jax.prepare"))
    assert call(prepare, *inspected) == (0, "")
    assert re.search(rf"tokens +{len(tokens):,}, uint16", capsys.readouterr().out)
    assert call(prepare, *made) == (0, "")

    # What the page uploads where: `train` of the store becomes `validation` beside the parts.
    (tmp_path / "pile-val" / "store" / "train").rename(folder / "validation")
    data = open_stores(DataConfig(stores=(str(folder),)))
    assert sum(source.num_tokens for source in data.train) == len(tokens)
    assert data.validation.num_tokens == 3 * sum(range(1, 30)) + 29


def test_damage_is_seen(pile, monkeypatch, tmp_path):
    """By the check that the page gives."""
    folder, _, _ = pile
    part = folder / f"{NAME}-00001-of-00002.bin"
    monkeypatch.chdir(tmp_path)
    inspected = commands(PAGE, "python -m spiral_jax.prepare")[0][3:]
    original = part.read_bytes()
    part.write_bytes(original[:-2])
    assert call(prepare, *inspected)[0] == 2
    part.write_bytes(original[:1] + b"\xff" * (len(original) - 1))  # from the first whole token on, ids of no text
    assert call(prepare, *inspected)[0] == 2
    part.unlink()
    assert call(prepare, *inspected)[0] == 2
