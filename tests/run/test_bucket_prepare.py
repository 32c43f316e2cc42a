"""Stores that `prepare` makes on a bucket: made on this machine, copied when whole."""

import tempfile

import pytest
from verbs import call

from spiral_jax import command, prepare
from spiral_jax.corpus import result
from spiral_jax.corpus.prepare import prepare_folder, prepare_stores
from spiral_jax.data.bucket import _file_system
from spiral_jax.data.config import DataConfig
from spiral_jax.data.prepared import open_folder
from spiral_jax.errors import Unreachable


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """Where folders of this machine stand in for those of a bucket."""
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    return tmp_path / "scratch"


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "texts").mkdir()
    for name in "abcd":
        (tmp_path / f"texts/{name}.txt").write_text(f"text {name}\n" * 1000)
    return tmp_path / "texts"


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def objects_of(place):
    found = {name: _file_system().cat_file(name) for name in generations(place)}
    return {name.removeprefix(f"{str(place).removeprefix('gs://')}/"): content for name, content in found.items()}


def generations(place):
    return {name: info["generation"] for name, info in _file_system().find(str(place), detail=True).items()}


def test_a_bucket_holds_what_a_disk_does(place, texts, scratch, tmp_path, capsys):
    flags = [f"--input={texts}", "--tokenizer=bpe", "--bpe_vocab_size=300", "--validation_fraction=0.3"]
    assert call(prepare, *flags, f"--output={tmp_path}/disk") == (0, "")
    assert call(prepare, *flags, f"--output={place}") == (0, "")
    assert f"copied to {place}" in capsys.readouterr().out
    assert objects_of(place) == files_of(tmp_path / "disk") and files_of(scratch) == {}
    open_folder(str(place)).train[0].verify()
    before = generations(place)
    assert call(prepare, *flags, f"--output={place}") == (0, "")
    assert f"{place} is complete: train" in capsys.readouterr().out and generations(place) == before
    for more, output, found in (
        (["--invalid=skip"], place, f"error: {place} holds stores of other input or options; allowed: a new"),
        ([], place / "train", f"error: {place}/train holds other files; allowed: a new"),
        ([], place / "prepared.json", f"error: {place}/prepared.json is a file; allowed: a new"),
    ):
        status, errors = call(prepare, *flags, *more, f"--output={output}")
        assert status == 2 and errors.count("\n") == 1 and errors.startswith(found), errors
    assert generations(place) == before


def test_a_copy_that_broke_off_goes_on_with_what_is_not_there(place, texts, scratch):
    config = DataConfig(paths=(str(texts),), tokenizer="bytes", validation_fraction=0.3)
    said, copied = [], []

    def stop_at_the_third():
        if any("wrote" in line for line in said):
            copied.append(1)
            if len(copied) > 2:
                raise command.Interrupted("stopped", 143)

    with pytest.raises(command.Interrupted):
        prepare_folder(config, place, report=said.append, check=stop_at_the_third)
    half = {name: generation for name, generation in generations(place).items() if "preparing" not in name}
    assert half and (place / "preparing.json").exists() and not (place / "prepared.json").exists()
    said.clear()
    prepare_folder(config, place, report=said.append)
    assert said == [f"data: copied to {place}"]
    whole = generations(place)
    assert half.items() < whole.items() and files_of(scratch) == {}
    assert not (place / "preparing.json").exists()
    open_folder(str(place)).train[0].verify()


def test_a_folder_that_another_command_has_begun_is_left(place, texts, scratch):
    (place / "preparing.json").write_text('{"source": "of other input"}')
    status, errors = call(prepare, f"--input={texts}", "--tokenizer=bytes", f"--output={place}")
    assert status == 2 and f"{place} holds stores of other input or options" in errors


def test_what_a_stand_in_has_lost_is_made_again(place, texts, scratch, monkeypatch):
    config, said = DataConfig(paths=(str(texts),), tokenizer="bytes", validation_fraction=0.3), []

    def refused(*given, **more):
        raise Unreachable("gone")

    with monkeypatch.context() as patch:
        patch.setattr(result, "upload", refused)
        with pytest.raises(Unreachable):
            prepare_folder(config, place, report=said.append)
    (lost,) = scratch.rglob("train/tokens.bin")
    lost.unlink()  # as what is old below /tmp
    prepare_folder(config, place, report=said.append)
    assert sum("wrote" in line for line in said) == 2
    open_folder(str(place)).train[0].verify()


def test_a_bucket_that_does_not_answer_is_43(place, texts, scratch, monkeypatch):
    def refused(*given, **more):
        raise Unreachable("gs://x cannot be written")

    monkeypatch.setattr(result, "upload", refused)
    status, errors = call(prepare, f"--input={texts}", "--tokenizer=bytes", f"--output={place}")
    assert (status, errors) == (43, "error: gs://x cannot be written; the same command goes on\n")


def test_damaged_stores_of_a_run_are_made_again(place, texts, scratch):
    config, said = DataConfig(paths=(str(texts),), tokenizer="bytes", validation_fraction=0.3), []
    folder = prepare_stores(config, place / "cache", report=said.append).train[0].name
    _file_system().rm_file(f"{folder}/tokens.bin")
    prepare_stores(config, place / "cache", report=said.append).train[0].verify()
    assert any("preparing again, the cache is damaged" in line for line in said)


def test_text_of_a_run_is_made_into_stores_once(place, texts, scratch):
    """A start that was stopped before its first checkpoint finds them."""
    config = DataConfig(paths=(str(texts),), tokenizer="bytes", validation_fraction=0.3)
    said = []
    made = prepare_stores(config, place / "cache", report=said.append)
    assert any("wrote" in line for line in said) and made.train[0].name.startswith(f"{place}/cache/")
    before = generations(place)
    said.clear()
    again = prepare_stores(config, place / "cache", report=said.append)
    assert again.fingerprints == made.fingerprints and generations(place) == before and files_of(scratch) == {}
    assert len(said) == 1 and "is complete" in said[0]
