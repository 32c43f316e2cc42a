"""Opening what a run trains on: one store or several, with their tokenizer and validation text."""

import os
import shutil

import numpy as np
import pytest

from spiral_jax.data.config import DataConfig
from spiral_jax.data.prepared import open_source, open_stores
from spiral_jax.data.store_writer import StoreWriter
from spiral_jax.data.tokenizers import ByteTokenizer, train_bpe
from spiral_jax.errors import SpiralError

BPE = train_bpe(["a text to train a tokenizer on, of a few words"], 280)


def make_store(folder, texts, tokenizer=BPE, *, validation=(), save=True):
    for name, part in (("train", texts), ("validation", validation)):
        if part:
            with StoreWriter(folder / name, tokenizer) as writer:
                for text in part:
                    writer.add(tokenizer.encode(text), utf8_bytes=len(text.encode()))
    if save:
        tokenizer.save(folder)
    return folder


def open_config(*stores, **fields):
    return open_stores(DataConfig(stores=tuple(map(str, stores)), **fields))


def text_of(source, tokenizer):
    return tokenizer.decode(source.read(0, source.num_tokens - 1))


def test_a_folder_is_opened_with_its_tokenizer_and_validation_store(tmp_path):
    folder = make_store(tmp_path / "store", ["some words"], validation=["others"])
    data = open_config(folder)
    assert data.tokenizer.fingerprint == BPE.fingerprint
    (train,) = data.train
    assert text_of(train, data.tokenizer) == "some words" and text_of(data.validation, data.tokenizer) == "others"
    assert data.fingerprints == (train.manifest.tokens_sha256,)
    shutil.rmtree(folder / "validation")
    assert open_config(folder).validation is None


def test_several_stores_in_their_order_and_the_first_validation_store_there_is(tmp_path):
    one = make_store(tmp_path / "one", ["one"])
    two = make_store(tmp_path / "two", ["two"], validation=["held out of two"])
    three = make_store(tmp_path / "three", ["three"], validation=["held out of three"])
    data = open_config(one, two / "train", three)
    assert [text_of(source, BPE) for source in data.train] == ["one", "two", "three"]
    assert len(set(data.fingerprints)) == 3
    assert text_of(data.validation, BPE) == "held out of three"  # two/train is a store without one
    assert text_of(open_config(one, validation_store=str(two)).validation, BPE) == "held out of two"
    assert text_of(open_config(one, validation_store=str(two / "train")).validation, BPE) == "two"


def test_a_path_is_relative_to_where_the_command_runs_and_knows_the_home_folder(tmp_path, monkeypatch):
    make_store(tmp_path / "store", ["some words"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for place in ("store", "~/store"):
        assert open_config(place).train[0].name == str(tmp_path / "store/train")


def test_stores_of_different_tokenizers_do_not_mix(tmp_path):
    one, two = make_store(tmp_path / "one", ["one"]), make_store(tmp_path / "two", ["two"], ByteTokenizer())
    with pytest.raises(
        SpiralError, match=r"data\.tokenizer has fingerprint .*; allowed: the tokenizer that wrote .*two/train"
    ):
        open_config(one, two)


def test_a_store_does_not_go_with_another_tokenizer(tmp_path):
    folder = make_store(tmp_path / "store", ["some words"])
    (tmp_path / "other").mkdir()
    train_bpe(["another text"], 300).save(tmp_path / "other")
    with pytest.raises(SpiralError, match=r"data\.tokenizer has fingerprint"):
        open_config(folder, tokenizer=str(tmp_path / "other/tokenizer.json"))
    for name in ("tokenizer_info.json", "tokenizer.json"):
        (folder / name).rename(tmp_path / name)
    with pytest.raises(SpiralError, match=r"has no tokenizer\.json; allowed: one in the store, or data\.tokenizer"):
        open_config(folder)
    assert open_config(folder, tokenizer=str(tmp_path / "tokenizer.json")).tokenizer.fingerprint == BPE.fingerprint


def test_a_store_of_bytes_needs_no_tokenizer_file(tmp_path):
    folder = make_store(tmp_path / "store", ["text"], ByteTokenizer(), save=False)
    data = open_config(folder)
    assert text_of(data.train[0], data.tokenizer) == "text"
    os.truncate(folder / "train/tokens.bin", 8)
    with pytest.raises(SpiralError, match=r"train/tokens\.bin has 8 bytes; allowed: "):
        open_config(folder)


def test_what_is_no_store_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SpiralError, match=r"data\.stores is .*/empty', which holds no tokens; allowed: "):
        open_config(tmp_path / "empty")
    with pytest.raises(SpiralError, match=r"data\.stores is '/no/such/store', which does not exist; allowed: "):
        open_config("/no/such/store")
    folder = make_store(tmp_path / "store", ["text"])
    with pytest.raises(
        SpiralError, match=r"data\.validation_store is .*/empty', which holds no token store; allowed: "
    ):
        open_config(folder, validation_store=str(tmp_path / "empty"))


def test_a_megatron_dataset_is_a_source_like_any_other(tmp_path):
    tokens_N = np.arange(10, dtype="<u2")
    header = b"MMIDIDX\x00\x00" + np.array(1, "<u8").tobytes() + b"\x08" + np.array([2, 3], "<u8").tobytes()
    index = np.array([4, 6], "<i4").tobytes() + np.array([0, 8], "<i8").tobytes() + np.array([0, 1, 2], "<i8").tobytes()
    (tmp_path / "pile").mkdir()
    (tmp_path / "pile/document.idx").write_bytes(header + index)
    tokens_N.tofile(tmp_path / "pile/document.bin")
    source = open_source(str(tmp_path / "pile"))
    assert source.read(2, 7).tolist() == [2, 3, 4, 5, 6]
    with pytest.raises(SpiralError, match=r"pile has no tokenizer\.json"):
        open_config(tmp_path / "pile")
    BPE.save(tmp_path / "pile")
    make_store(tmp_path / "pile", [], validation=["held out"], save=False)
    data = open_config(tmp_path / "pile")
    assert data.tokenizer.fingerprint == BPE.fingerprint and text_of(data.validation, BPE) == "held out"
    for place in ("document", "document.idx", "document.bin"):
        assert open_config(tmp_path / "pile" / place).tokenizer.fingerprint == BPE.fingerprint
