import fcntl
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import spiral_jax
from spiral_jax.data import prepare
from spiral_jax.data.config import DataConfig
from spiral_jax.data.prepare import prepare_stores
from spiral_jax.data.store import StoreWriter, TokenStore
from spiral_jax.data.tokenizers import ByteTokenizer, train_bpe
from spiral_jax.errors import SpiralError

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
    train = texts_of(prepared.train, prepared.tokenizer)
    validation = texts_of(prepared.validation, prepared.tokenizer)
    files = [path.read_bytes().decode() for path in corpus.rglob("*.txt")]
    assert sorted(train + validation) == sorted(text for text in files if text)
    assert validation and len(train) > len(validation)
    for store, texts in ((prepared.train, train), (prepared.validation, validation)):
        store.verify()
        store.check_tokenizer(prepared.tokenizer)
        assert store.utf8_bytes == sum(len(text.encode()) for text in texts)
        separators = np.flatnonzero(store.tokens_N == prepared.tokenizer.separator_id)
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
    assert one.fingerprint == other.fingerprint
    assert one.tokenizer.fingerprint == other.tokenizer.fingerprint
    assert one.validation.manifest.tokens_sha256 == other.validation.manifest.tokens_sha256


def test_a_second_run_uses_the_stores_of_the_first(corpus, tmp_path, monkeypatch):
    config = config_for(corpus, tokenizer="bpe")
    first = prepare_stores(config, tmp_path / "cache", report=silent)
    monkeypatch.setattr(prepare, "StoreWriter", None)
    monkeypatch.setattr(prepare, "train_bpe", None)
    lines = []
    second = prepare_stores(config, tmp_path / "cache", report=lines.append)
    assert second.fingerprint == first.fingerprint
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
    assert first.train.folder != second.train.folder
    for mine, theirs in ((second.train, fresh.train), (second.validation, fresh.validation)):
        assert mine.manifest.tokens_sha256 == theirs.manifest.tokens_sha256
    first.train.verify()  # a run that goes on with the old stores is not disturbed


@pytest.mark.parametrize("damage", ["truncated", "no manifest", "no tokenizer", "no validation"])
def test_a_damaged_cache_is_prepared_again(corpus, tmp_path, damage):
    config = config_for(corpus, tokenizer="bpe")
    first = prepare_stores(config, tmp_path / "cache", report=silent)
    fingerprint, folder = first.fingerprint, first.train.folder.parent
    if damage == "truncated":
        os.truncate(folder / "train/tokens.bin", 100)
    elif damage == "no manifest":
        (folder / "validation/manifest.json").unlink()
    elif damage == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    else:
        shutil.rmtree(folder / "validation")
    second = prepare_stores(config, tmp_path / "cache", report=silent)
    assert second.fingerprint == fingerprint
    second.train.verify()
    second.validation.verify()


def test_killed_in_the_middle_the_next_run_succeeds(corpus, tmp_path):
    program = (
        "import sys, time; from spiral_jax.data import prepare; from spiral_jax.data.config import DataConfig\n"
        "class Slow(prepare.StoreWriter):\n"
        "    def add(self, *args, **kwargs):\n"
        "        super().add(*args, **kwargs)\n"
        "        if self.num_documents == 3 and self._folder.name == 'validation':\n"
        "            print('now', flush=True); time.sleep(60)\n"
        "prepare.StoreWriter = Slow\n"
        "prepare.prepare_stores(DataConfig(paths=(sys.argv[1],), validation_fraction=0.2), sys.argv[2])\n"
    )
    cache = tmp_path / "cache"
    command = [sys.executable, "-c", program, str(corpus), str(cache)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "now\n"
        process.send_signal(signal.SIGKILL)
    assert [name for name in os.listdir(cache) if not name.startswith(".")] == []
    assert (cache / ".partial/train/tokens.bin").exists()  # it was in the middle, train complete
    prepared = prepare_stores(config_for(corpus), cache, report=silent)
    prepared.train.verify()
    prepared.validation.verify()
    assert sorted(os.listdir(cache)) == [".lock", prepared.train.folder.parent.name]


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
    for store, folders in ((prepared.train, ("part0", "part2")), (prepared.validation, ("part1",))):
        files = [path.read_bytes().decode() for folder in folders for path in (corpus / folder).glob("*.txt")]
        assert sorted(texts_of(store, prepared.tokenizer)) == sorted(text for text in files if text)
    with pytest.raises(SpiralError, match=r"data\.paths: all 48 files are in data\.validation_paths"):
        prepare_stores(config_for(corpus, validation_paths=(str(corpus),)), tmp_path / "cache", report=silent)


def test_a_single_file_is_split_by_its_lines(tmp_path):
    (tmp_path / "book.txt").write_text("".join(f"line {i}\n" for i in range(200)))
    lines = []
    prepared = prepare_stores(DataConfig(paths=(str(tmp_path / "book.txt"),)), tmp_path / "cache", report=lines.append)
    text = texts_of(prepared.train, prepared.tokenizer)[0] + texts_of(prepared.validation, prepared.tokenizer)[0]
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
    assert os.listdir(tmp_path / "cache") == [".lock"]
    lines = []
    prepared = prepare_stores(config_for(corpus, invalid_utf8="skip"), tmp_path / "cache", report=lines.append)
    assert any("skipped 1 file(s)" in line for line in lines)
    assert prepared.train.num_documents + prepared.validation.num_documents == 48


@pytest.mark.parametrize("content", [b"", b"\xff"])
def test_no_text_at_all_is_an_error(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    config = DataConfig(paths=(str(tmp_path / "a.txt"),), invalid_utf8="skip")
    with pytest.raises(SpiralError, match=r"data\.paths: .*no text"):
        prepare_stores(config, tmp_path / "cache", report=silent)
    assert not (tmp_path / "cache").exists() or os.listdir(tmp_path / "cache") == [".lock"]


def test_validation_files_that_are_all_skipped_are_an_error(tmp_path):
    (tmp_path / "good.txt").write_text("text")
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    fields = {"paths": (str(tmp_path / "good.txt"),), "invalid_utf8": "skip"}
    with pytest.raises(SpiralError, match=r"data\.validation_paths: the 1 file\(s\) hold no text \(1 skipped"):
        config = DataConfig(validation_paths=(str(tmp_path / "bad.txt"),), **fields)
        prepare_stores(config, tmp_path / "cache", report=silent)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"paths": ()}, r"data\.paths: empty"),
        ({"paths": ("/no/such/place",)}, r"data\.paths: /no/such/place does not exist"),
        ({"validation_paths": ("/no/such/*.txt",)}, r"data\.validation_paths: /no/such/\*\.txt: .* no file"),
        ({"exclude": ("*",)}, r"data\.exclude leaves out all"),
        ({"tokenizer": "/no/such.json"}, r'data\.tokenizer: no file /no/such\.json; allowed: "bytes", "bpe"'),
        ({"store": "/no/such/store"}, r"data\.store: no folder /no/such/store"),
    ],
)
def test_bad_input_is_named_before_anything_is_written(corpus, tmp_path, fields, message):
    with pytest.raises(SpiralError, match=message) as error:
        prepare_stores(config_for(corpus, **fields), tmp_path / "cache", report=silent)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "cache").exists()


def test_an_unwritable_cache_is_named(corpus, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SpiralError, match=r"file/cache: cannot be written \(Not a directory\)"):
        prepare_stores(config_for(corpus), tmp_path / "file/cache", report=silent)


def test_ready_made_stores_are_opened_with_their_tokenizer(corpus, tmp_path):
    made = prepare_stores(config_for(corpus, tokenizer="bpe"), tmp_path / "cache", report=silent)
    folder = made.train.folder.parent
    opened = prepare_stores(DataConfig(store=str(folder)), tmp_path / "unused", report=silent)
    assert opened.fingerprint == made.fingerprint and opened.validation.num_tokens == made.validation.num_tokens
    assert opened.tokenizer.fingerprint == made.tokenizer.fingerprint
    assert not (tmp_path / "unused").exists()
    shutil.rmtree(folder / "validation")
    assert prepare_stores(DataConfig(store=str(folder)), tmp_path / "unused", report=silent).validation is None


def test_a_ready_made_store_does_not_go_with_another_tokenizer(corpus, tmp_path):
    made = prepare_stores(config_for(corpus, tokenizer="bpe"), tmp_path / "cache", report=silent)
    folder = made.train.folder.parent
    (tmp_path / "other").mkdir()
    train_bpe(["another text"], 300).save(tmp_path / "other")
    config = DataConfig(store=str(folder), tokenizer=str(tmp_path / "other/tokenizer.json"))
    with pytest.raises(SpiralError, match=r"data\.tokenizer: fingerprint"):
        prepare_stores(config, tmp_path / "unused", report=silent)
    (folder / "tokenizer_info.json").unlink()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(SpiralError, match=r"allowed: a tokenizer in the store, or data\.tokenizer=FILE"):
        prepare_stores(DataConfig(store=str(folder)), tmp_path / "unused", report=silent)


def test_a_ready_made_store_of_bytes_needs_no_tokenizer_file(tmp_path):
    with StoreWriter(tmp_path / "store/train", ByteTokenizer()) as writer:
        writer.add(np.frombuffer(b"text", np.uint8), utf8_bytes=4)
    prepared = prepare_stores(DataConfig(store=str(tmp_path / "store")), tmp_path / "unused", report=silent)
    assert texts_of(prepared.train, prepared.tokenizer) == ["text"]
    os.truncate(tmp_path / "store/train/tokens.bin", 8)
    with pytest.raises(SpiralError, match=r"train/tokens\.bin: has 8 bytes"):
        prepare_stores(DataConfig(store=str(tmp_path / "store")), tmp_path / "unused", report=silent)


def test_progress_says_how_long_it_will_take(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "_SECONDS_PER_REPORT", 0)
    monkeypatch.setattr(prepare, "_BYTES_PER_ENCODE", 500)
    lines = []
    prepared = prepare_stores(config_for(corpus), tmp_path / "cache", report=lines.append)
    progress = [line for line in lines if "tokenising" in line]
    assert len(progress) > 5 and all("s left" in line for line in progress)
    assert " 0 s left" in progress[-1]
    assert TokenStore.open(prepared.train.folder).num_documents == prepared.train.num_documents


def test_the_sample_for_a_bpe_is_bounded_and_comes_from_all_over(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "_BPE_SAMPLE_BYTES", 1000)
    seen = []
    monkeypatch.setattr(prepare, "train_bpe", lambda texts, size: seen.extend(texts) or train_bpe(texts, size))
    prepare_stores(config_for(corpus, tokenizer="bpe"), tmp_path / "cache", report=silent)
    assert 900 < sum(len(text) for text in seen) <= 1000
    parts = {int(text.split()[1]) % 3 for text in seen}
    assert len(parts) > 1
