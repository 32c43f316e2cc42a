import fcntl
import functools
import json
import os
import pathlib
import shutil
import threading
import time

import numpy as np
import pytest

import spiral_jax
from spiral_jax.corpus import pieces, prepare, texts
from spiral_jax.corpus.prepare import prepare_stores
from spiral_jax.data.config import DataConfig
from spiral_jax.data.tokenizers import train_bpe
from spiral_jax.errors import SpiralError
from spiral_jax.progress import Progress

REPOSITORY = pathlib.Path(spiral_jax.__file__).parents[1]
NEOX = REPOSITORY / "../shared/data/tokenizer/20B_tokenizer.json"


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    for i in range(60):
        path = folder / f"part{i % 3}" / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"document {i}\r\nwith <|endoftext|> and ünïcode\n".encode() * (i % 5))  # every fifth is empty
    return folder


def silent(line):
    del line


def texts_of(store, tokenizer):
    offsets = store.document_offsets_M.tolist()
    return [tokenizer.decode(store.read(start, end - 1)) for start, end in zip(offsets[:-1], offsets[1:], strict=True)]


def config_for(corpus, **kwargs):
    return DataConfig(**({"paths": (str(corpus),), "validation_fraction": 0.2} | kwargs))


@pytest.mark.parametrize(
    "tokenizer",
    ["bytes", "bpe", pytest.param(str(NEOX), marks=pytest.mark.skipif(not NEOX.exists(), reason=f"no {NEOX}"))],
)
def test_the_stores_hold_every_file_once_and_exactly(corpus, tmp_path, tokenizer):
    prepared = prepare_stores(config_for(corpus, tokenizer=tokenizer), tmp_path / "cache", report=silent)
    train = texts_of(prepared.train[0], prepared.tokenizer)
    validation = texts_of(prepared.validation, prepared.tokenizer)
    files = [path.read_bytes().decode() for path in corpus.rglob("*.txt")]
    assert sorted(train + validation) == sorted(text for text in files if text)
    assert validation and len(train) > len(validation)
    for store, found in ((prepared.train[0], train), (prepared.validation, validation)):
        store.verify()
        store.check_tokenizer(prepared.tokenizer)
        assert store.utf8_bytes == sum(len(text.encode()) for text in found)
        separators = np.flatnonzero(store.read(0, store.num_tokens) == prepared.tokenizer.separator_id)
        assert separators.tolist() == [offset - 1 for offset in store.document_offsets_M[1:].tolist()]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_where_and_when_does_not_matter(corpus, tmp_path, tokenizer):
    elsewhere = tmp_path / "some/other/place"
    names = sorted((p.relative_to(corpus) for p in corpus.rglob("*.txt")), reverse=True)
    for name in names:  # written in another order, with other times
        (elsewhere / name).parent.mkdir(parents=True, exist_ok=True)
        (elsewhere / name).write_bytes((corpus / name).read_bytes())
    one = prepare_stores(config_for(corpus, tokenizer=tokenizer), tmp_path / "cache1", report=silent)
    other = prepare_stores(config_for(elsewhere, tokenizer=tokenizer), tmp_path / "cache2", report=silent)
    assert one.fingerprints == other.fingerprints
    assert one.tokenizer.fingerprint == other.tokenizer.fingerprint
    assert one.validation.manifest.tokens_sha256 == other.validation.manifest.tokens_sha256


def test_a_second_run_uses_the_stores_of_the_first(corpus, tmp_path, monkeypatch):
    config = config_for(corpus, tokenizer="bpe")
    first = prepare_stores(config, tmp_path / "cache", report=silent)
    monkeypatch.setattr(prepare, "_build", None)
    monkeypatch.setattr(texts, "train_bpe", None)
    lines = []
    second = prepare_stores(config, tmp_path / "cache", report=lines.append)
    assert second.fingerprints == first.fingerprints
    assert second.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert len(lines) == 1 and "using" in lines[0]


@pytest.mark.parametrize("change", ["content", "new file", "removed file", "renamed file", "fraction", "tokenizer"])
def test_a_change_of_the_source_makes_other_stores(corpus, tmp_path, change):
    config = config_for(corpus)
    first = prepare_stores(config, tmp_path / "cache", report=silent)
    victim = next(path for path in sorted(corpus.rglob("*.txt")) if path.stat().st_size)
    if change == "content":
        victim.write_bytes(victim.read_bytes().swapcase())  # as long as before
    elif change == "new file":
        (corpus / "new.txt").write_text("new")
    elif change == "removed file":
        victim.unlink()
    elif change == "renamed file":
        victim.rename(victim.with_name("zzz.txt"))
    elif change == "fraction":
        config = config_for(corpus, validation_fraction=0.5)
    else:
        config = config_for(corpus, tokenizer="bpe", bpe_vocab_size=300)
    second = prepare_stores(config, tmp_path / "cache", report=silent)
    fresh = prepare_stores(config, tmp_path / "fresh", report=silent)
    assert first.train[0].folder != second.train[0].folder
    for mine, theirs in ((second.train[0], fresh.train[0]), (second.validation, fresh.validation)):
        assert mine.manifest.tokens_sha256 == theirs.manifest.tokens_sha256
    first.train[0].verify()  # a run that goes on with the old stores is not disturbed


@pytest.mark.parametrize("damage", ["truncated", "no manifest", "no tokenizer", "no validation"])
def test_a_damaged_cache_is_prepared_again(corpus, tmp_path, damage):
    config = config_for(corpus, tokenizer="bpe")
    first = prepare_stores(config, tmp_path / "cache", report=silent)
    fingerprint, folder = first.fingerprints, pathlib.Path(first.train[0].folder).parent
    if damage == "truncated":
        os.truncate(folder / "train/tokens.bin", 100)
    elif damage == "no manifest":
        (folder / "validation/manifest.json").unlink()
    elif damage == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    else:
        shutil.rmtree(folder / "validation")
    second = prepare_stores(config, tmp_path / "cache", report=silent)
    assert second.fingerprints == fingerprint
    second.train[0].verify()
    second.validation.verify()


def test_what_a_killed_run_left_of_other_inputs_is_removed(corpus, tmp_path):
    (tmp_path / "cache/.0123456789abcdef.partial/parts").mkdir(parents=True)
    prepared = prepare_stores(config_for(corpus), tmp_path / "cache", report=silent)
    assert sorted(os.listdir(tmp_path / "cache")) == [pathlib.Path(prepared.train[0].folder).parent.name]


def test_processes_that_share_a_cache_wait_for_each_other(corpus, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    lines = []
    with open(cache / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread = threading.Thread(
            target=prepare_stores, args=(config_for(corpus), cache), kwargs={"report": lines.append}
        )
        thread.start()
        deadline = time.monotonic() + 20
        while not any("waiting for another process" in line for line in lines):
            assert thread.is_alive() and time.monotonic() < deadline
            time.sleep(0.01)
        thread.join(0.1)
        assert thread.is_alive()
    thread.join(20)
    assert not thread.is_alive() and "wrote" in lines[-1]


def test_validation_files_are_never_trained_on(corpus, tmp_path):
    config = config_for(corpus, validation_paths=(str(corpus / "part1"),))
    prepared = prepare_stores(config, tmp_path / "cache", report=silent)
    for store, folders in ((prepared.train[0], ("part0", "part2")), (prepared.validation, ("part1",))):
        files = [path.read_bytes().decode() for folder in folders for path in (corpus / folder).glob("*.txt")]
        assert sorted(texts_of(store, prepared.tokenizer)) == sorted(text for text in files if text)
    with pytest.raises(SpiralError, match=r"data\.paths: all 48 files are in data\.validation_paths"):
        prepare_stores(config_for(corpus, validation_paths=(str(corpus),)), tmp_path / "cache", report=silent)


def test_a_single_file_is_split_by_its_lines(tmp_path):
    (tmp_path / "book.txt").write_text("".join(f"line {i}\n" for i in range(200)))
    lines = []
    prepared = prepare_stores(DataConfig(paths=(str(tmp_path / "book.txt"),)), tmp_path / "cache", report=lines.append)
    text = texts_of(prepared.train[0], prepared.tokenizer)[0] + texts_of(prepared.validation, prepared.tokenizer)[0]
    assert text == (tmp_path / "book.txt").read_text()
    assert any("the last 5.0% of each" in line for line in lines)


def test_without_validation_there_is_none(corpus, tmp_path):
    prepared = prepare_stores(config_for(corpus, validation_fraction=0.0), tmp_path / "cache", report=silent)
    assert prepared.validation is None
    again = prepare_stores(config_for(corpus, validation_fraction=0.0), tmp_path / "cache", report=silent)
    assert again.validation is None


def test_files_that_are_not_utf8_stop_or_are_skipped_and_counted(corpus, tmp_path):
    (corpus / "part0/bad.txt").write_bytes(b"ab\xff")
    for tokenizer in ("bytes", "bpe"):
        with pytest.raises(SpiralError, match=r"part0/bad\.txt: byte 2 is not UTF-8"):
            prepare_stores(config_for(corpus, tokenizer=tokenizer), tmp_path / "cache", report=silent)
    assert not (tmp_path / "cache").exists()
    lines = []
    prepared = prepare_stores(config_for(corpus, invalid="skip"), tmp_path / "cache", report=lines.append)
    assert any("skipped 1 file(s)" in line for line in lines)
    assert prepared.train[0].num_documents + prepared.validation.num_documents == 48


@pytest.mark.parametrize("content", [b"", b"\xff"])
def test_no_text_at_all_is_an_error(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    config = DataConfig(paths=(str(tmp_path / "a.txt"),), invalid="skip")
    with pytest.raises(SpiralError, match=r"data\.paths: .*no text"):
        prepare_stores(config, tmp_path / "cache", report=silent)
    assert not (tmp_path / "cache").exists()


def test_validation_files_that_are_all_skipped_are_an_error(tmp_path):
    (tmp_path / "good.txt").write_text("text")
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    fields = {"paths": (str(tmp_path / "good.txt"),), "invalid": "skip"}
    with pytest.raises(SpiralError, match=r"data\.validation_paths: no text for validation \(1 skipped"):
        config = DataConfig(validation_paths=(str(tmp_path / "bad.txt"),), **fields)
        prepare_stores(config, tmp_path / "cache", report=silent)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"paths": ()}, r"data\.paths is empty"),
        ({"paths": ("/no/such/place",)}, r"data\.paths is '/no/such/place', which does not exist"),
        ({"validation_paths": ("/no/such/*.txt",)}, r"data\.validation_paths is '/no/such/\*\.txt', .* no file"),
        ({"exclude": ("*",)}, r"data\.exclude leaves out all"),
        ({"tokenizer": "/no/such.json"}, r"data\.tokenizer is '/no/such\.json'; allowed: \"bytes\", \"bpe\""),
    ],
)
def test_bad_input_is_named_before_anything_is_written(corpus, tmp_path, fields, message):
    with pytest.raises(SpiralError, match=message) as error:
        prepare_stores(config_for(corpus, **fields), tmp_path / "cache", report=silent)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "cache").exists()


def test_an_unwritable_cache_is_named(corpus, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SpiralError, match=r"file/cache cannot be written \(Not a directory\)"):
        prepare_stores(config_for(corpus), tmp_path / "file/cache", report=silent)


def test_progress_says_how_long_it_will_take(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "_SMALLEST_PIECE", 300)
    monkeypatch.setattr(prepare, "Progress", functools.partial(Progress, seconds=0))
    lines = []
    prepare_stores(config_for(corpus), tmp_path / "cache", report=lines.append)
    progress = [line for line in lines if "tokenising" in line]
    assert len(progress) > 5 and all("s left" in line for line in progress)
    assert "(100%)" in progress[-1] and " 0s left" in progress[-1]


@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_the_sample_for_a_bpe_is_bounded_and_comes_from_all_over(corpus, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(texts, "SAMPLE_BYTES", 1000)
    if kind == "jsonl":
        for path in corpus.rglob("*.txt"):
            lines = path.read_bytes().decode().splitlines(keepends=True)
            path.with_suffix(".jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
            path.unlink()
    seen = []
    monkeypatch.setattr(texts, "train_bpe", lambda sample, size: seen.extend(sample) or train_bpe(sample, size))
    prepared = prepare_stores(config_for(corpus, tokenizer="bpe"), tmp_path / "cache", report=silent)
    assert 900 < sum(len(text) for text in seen) <= 1000
    if kind == "text":
        parts = {int(text.split()[1]) % 3 for text in seen}
        assert len(parts) > 1
    held_out = set(texts_of(prepared.validation, prepared.tokenizer))
    assert held_out and not held_out & set(seen)
