"""What is made of text: the same bytes for any number of workers, and what stops it."""

import hashlib
import json
import os
import pathlib

import numpy as np
import pytest
from cases import slow
from corpora import (
    NEOX,
    SHARED,
    digests,
    expected_texts,
    make,
    needs_shared,
    texts_of,
)

from spiral_jax.corpus import parts, prepare
from spiral_jax.data.prepared import open_folder
from spiral_jax.data.tokenizers import HuggingFaceTokenizer
from spiral_jax.errors import SpiralError

pytestmark = pytest.mark.usefixtures("small_pieces")


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_the_stores_do_not_depend_on_the_number_of_workers(corpus, tmp_path, tokenizer):
    one = make(corpus, tmp_path / "one", tokenizer=tokenizer, bpe_vocab_size=300)
    for workers in (2, 3):
        other = make(corpus, tmp_path / str(workers), tokenizer=tokenizer, bpe_vocab_size=300, workers=workers)
        assert digests(other) == digests(one)
    prepared = open_folder(one)
    found = []
    for store in (*prepared.train, prepared.validation):
        store.verify()
        found += texts_of(store, prepared.tokenizer)
    assert sorted(found) == sorted(expected_texts(corpus))
    assert sorted(os.listdir(tmp_path)) == ["2", "3", "corpus", "one"]


def test_the_size_of_a_batch_makes_no_difference(corpus, tmp_path, monkeypatch):
    one = make(corpus, tmp_path / "one", tokenizer="bpe", bpe_vocab_size=300)
    monkeypatch.setattr(parts, "_BATCH_BYTES", 700)
    assert digests(make(corpus, tmp_path / "other", tokenizer="bpe", bpe_vocab_size=300)) == digests(one)


def test_equal_records_are_on_one_side_and_texts_go_by_their_names(corpus, tmp_path):
    (corpus / "again.jsonl").write_bytes((corpus / "records.jsonl").read_bytes())
    prepared = open_folder(make(corpus, tmp_path / "out"))
    train, validation = (set(texts_of(store, prepared.tokenizer)) for store in (*prepared.train, prepared.validation))
    assert len(train) > len(validation) > 20 and not train & validation
    for text in validation | train:
        share = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32
        if text not in {path.read_bytes().decode() for path in corpus.glob("*.txt")}:
            assert (text in validation) == (share < 0.2)


def test_parts_are_in_the_order_of_the_input(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} " * 200}) + "\n" for i in range(300)))
    prepared = open_folder(make(path, tmp_path / "out", validation_fraction=0.0, workers=2))
    assert [int(text.split()[0]) for text in texts_of(prepared.train[0], prepared.tokenizer)] == list(range(300))


def test_a_long_text_has_one_separator_and_its_own_tokens(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one line of text\n" * 20_000)
    prepared = open_folder(make(path, tmp_path / "out", validation_fraction=0.0, workers=2))
    [store] = prepared.train
    assert store.num_documents == 1 and store.num_tokens == len(path.read_bytes()) + 1
    assert texts_of(store, prepared.tokenizer) == [path.read_text()]


def test_a_second_call_says_that_all_is_there(corpus, tmp_path):
    before = digests(make(corpus, tmp_path / "out"))
    lines = []
    make(corpus, tmp_path / "out", report=lines.append)
    assert len(lines) == 1 and "is complete" in lines[0] and digests(tmp_path / "out") == before


@pytest.mark.parametrize("there", ["other store", "other files", "file", "damaged"])
def test_what_is_there_is_not_overwritten(corpus, tmp_path, there):
    corpus, output = corpus, tmp_path / "out"
    if there == "other files":
        output.mkdir()
        (output / "mine.txt").write_text("x")
    elif there == "file":
        output.write_text("x")
    else:
        make(corpus, output, validation_fraction=0.3 if there == "other store" else 0.2)
        if there == "damaged":
            os.truncate(output / "train/tokens.bin", 10)
    before = digests(tmp_path)
    message = "has 10 bytes" if there == "damaged" else "allowed: a new or an empty folder"
    with pytest.raises(SpiralError, match=rf"out.*{message}"):
        make(corpus, output)
    assert digests(tmp_path) == before


CHANGES = ("grown", "touched", "removed", "cut short")


@pytest.mark.parametrize(
    ("change", "workers"),
    [
        *((change, 1) for change in CHANGES),
        ("grown", 2),
        *(slow(change, 2) for change in CHANGES[1:]),
    ],
)
def test_input_that_changes_while_it_is_read_is_an_error(corpus, tmp_path, monkeypatch, change, workers):
    corpus, output = corpus, tmp_path / "out"
    victim, original = corpus / "long.txt", prepare.encode_pieces

    def changing(*args):
        for number, finished in enumerate(original(*args)):
            if number == 2:
                if change == "grown":
                    with victim.open("ab") as file:  # `write_bytes` would cut it short first, and a worker is reading
                        file.write(b"more")
                elif change == "touched":
                    os.utime(victim, ns=(1, 1))
                elif change == "removed":
                    victim.unlink()
                else:
                    os.truncate(victim, 100)
            yield finished

    monkeypatch.setattr(prepare, "encode_pieces", changing)
    message = {"removed": "cannot be read", "cut short": "while it was read"}.get(
        change, "has changed while it was read"
    )
    with pytest.raises(SpiralError, match=rf"long\.txt .*{message}"):
        make(corpus, output, workers=workers)
    assert not output.exists()
    monkeypatch.setattr(prepare, "encode_pieces", original)
    make(corpus, output, workers=workers)
    assert digests(output) == digests(make(corpus, tmp_path / "straight"))


def test_an_error_of_a_worker_is_the_error_of_the_call(corpus, tmp_path):
    lines = (corpus / "records.jsonl").read_bytes().split(b"\n")
    lines[150] = b"{broken"
    (corpus / "records.jsonl").write_bytes(b"\n".join(lines))
    for workers in (1, 2):
        with pytest.raises(SpiralError, match=r'records\.jsonl:151: not JSON .*; allowed: .*data\.invalid="skip"'):
            make(corpus, tmp_path / "out", workers=workers)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_no_text_is_skipped_counted_and_named(corpus, tmp_path, workers):
    before = expected_texts(corpus)
    lines = (corpus / "records.jsonl").read_bytes().split(b"\n")
    lines[20:20] = [b"{broken"]
    lines[150:150] = [b'{"text": 1}', b"\xff"]
    (corpus / "records.jsonl").write_bytes(b"\n".join(lines))
    third = (corpus / "3.txt").read_bytes().decode()
    (corpus / "3.txt").write_bytes(b"caf\xe9")  # shares a piece with others
    long = (corpus / "long.txt").read_bytes()
    (corpus / "long.txt").write_bytes(long[:-1] + b"\xff")  # in the last of several pieces
    said = []
    output = make(corpus, tmp_path / "out", invalid="skip", report=said.append, workers=workers)
    assert any("skipped 3 record(s) and 2 file(s)" in line for line in said)
    named = "\n".join(said)
    for place in ("records.jsonl:21: not JSON", "records.jsonl:151: field", "long.txt: byte", "3.txt: byte 3"):
        assert place in named, place
    prepared = open_folder(output)
    found = [text for store in (*prepared.train, prepared.validation) for text in texts_of(store, prepared.tokenizer)]
    good = list(before)
    for text in (long.decode(), third):
        good.remove(text)
    assert sorted(found) == sorted(good)


def test_a_tail_of_a_file_that_is_not_utf8_takes_the_rest_with_it(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"line\n" * 1000 + b"\xff\n" * 10)
    (tmp_path / "good.txt").write_bytes(b"line\n" * 1000)
    said = []
    output = make(tmp_path / "*.txt", tmp_path / "out", invalid="skip", validation_fraction=0.001, report=said.append)
    prepared = open_folder(output)
    assert prepared.train[0].num_documents == prepared.validation.num_documents == 1
    assert any("skipped 1 file(s)" in line for line in said)


def test_records_that_give_no_validation_are_reported(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    said = []
    output = make(tmp_path / "a.jsonl", tmp_path / "out", validation_fraction=1e-9, report=said.append)
    assert open_folder(output).validation is None and any("no document was held out" in line for line in said)
    with pytest.raises(SpiralError, match=r"data\.paths: no text for train"):
        make(tmp_path / "a.jsonl", tmp_path / "other", validation_fraction=0.999999)


def test_validation_paths_take_all_their_records(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n{"text": ""}\n')
    output = make(tmp_path / "a.jsonl", tmp_path / "out", validation_paths=(str(tmp_path / "b.jsonl"),))
    prepared = open_folder(output)
    assert texts_of(prepared.train[0], prepared.tokenizer) == ["one", "two"]
    assert texts_of(prepared.validation, prepared.tokenizer) == ["three"]


def test_output_within_the_input_is_no_input(tmp_path):
    (tmp_path / "a.txt").write_text("some text\n" * 100)
    make(tmp_path, tmp_path / "out")
    said = []
    make(tmp_path, tmp_path / "out", report=said.append)
    assert "is complete" in said[-1]


@needs_shared
def test_the_tokens_are_those_the_library_gives(tmp_path):
    """WikiText-2 and Alice with the NeoX tokenizer, cut into many pieces, against one call of the library."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name in ("wikitext-2/valid.txt", "prose/carroll-alice.txt"):
        (corpus / pathlib.Path(name).name).write_bytes((SHARED / name).read_bytes())
    output = make(corpus, tmp_path / "out", tokenizer=str(NEOX), validation_fraction=0.0, workers=2)
    [store] = open_folder(output).train
    tokenizer = HuggingFaceTokenizer.from_file(NEOX)
    expected = [tokenizer.encode(path.read_bytes().decode()) for path in sorted(corpus.iterdir())]
    for document, ids in enumerate(expected):
        begin, end = store.document_offsets_M[document : document + 2].astype(int)
        assert np.array_equal(store.read(begin, end - 1), ids)
