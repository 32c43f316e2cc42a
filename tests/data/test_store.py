import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import zlib

import numpy as np
import pytest

import spiral_jax
from spiral_jax.data.store import TOKENS, TokenStore
from spiral_jax.data.store_writer import StoreWriter
from spiral_jax.data.tokenizers import ByteTokenizer, train_bpe
from spiral_jax.errors import SpiralError

REPOSITORY = pathlib.Path(spiral_jax.__file__).parents[1]
TEXTS = ["first document", "zweites, mit Ümlaut\r\n", "x"]


class WideTokenizer(ByteTokenizer):
    """Bytes as ids from 2**16 on, to need more than 16 bits."""

    vocab_size = 2**16 + 257
    separator_id = 2**16 + 256
    fingerprint = "wide"

    def encode(self, text):
        return super().encode(text) + 2**16


def write(folder, texts=TEXTS, tokenizer=None, source="src"):
    tokenizer = tokenizer or ByteTokenizer()
    with StoreWriter(folder, tokenizer, source=source) as writer:
        for text in texts:
            writer.add(tokenizer.encode(text), utf8_bytes=len(text.encode()))
    return TokenStore.open(folder)


@pytest.mark.parametrize(("tokenizer", "dtype"), [(ByteTokenizer(), "<u2"), (WideTokenizer(), "<u4")])
def test_the_files_hold_what_was_added_as_plain_numpy_reads_them(tmp_path, tokenizer, dtype):
    store = write(tmp_path / "store", tokenizer=tokenizer)
    shift = tokenizer.separator_id - 256
    expected = [byte + shift for text in TEXTS for byte in [*text.encode(), 256]]
    assert np.fromfile(tmp_path / "store/tokens.bin", dtype).tolist() == expected
    lengths = [len(text.encode()) + 1 for text in TEXTS]
    assert np.fromfile(tmp_path / "store/documents.bin", "<u8").tolist() == [0, *np.cumsum(lengths)]
    manifest = json.loads((tmp_path / "store/manifest.json").read_text(encoding="utf-8"))
    assert manifest["format"] == "spiral_jax.token_store" and manifest["version"] == 1
    assert manifest["dtype"] == dtype and manifest["source"] == "src"
    assert manifest["num_tokens"] == len(expected) and manifest["num_documents"] == 3
    assert manifest["utf8_bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert manifest["vocab_size"] == tokenizer.vocab_size and manifest["separator_id"] == tokenizer.separator_id
    assert manifest["max_token_id"] == max(expected)
    for name, file in manifest["files"].items():
        content = (tmp_path / "store" / name).read_bytes()
        blocks = {"block_bytes": 2**20, "crc32_of_blocks": f"{zlib.crc32(content):08x}"}
        assert file == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} | blocks
    assert store.read(0, store.num_tokens).tolist() == expected
    assert store.num_tokens == len(expected) and store.utf8_bytes == manifest["utf8_bytes"]
    store.verify()


def test_read_gives_int32_that_may_be_changed(tmp_path):
    store = write(tmp_path / "store")
    tokens = store.read(2, 7)
    assert type(tokens) is np.ndarray and tokens.dtype == np.int32
    assert tokens.tolist() == list(TEXTS[0].encode()[2:7])
    tokens[:] = 0
    store.verify()


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (0, 10**9), (5, 4)])
def test_read_outside_the_store_is_an_error(tmp_path, start, stop):
    store = write(tmp_path / "store")
    with pytest.raises(IndexError, match=str(tmp_path / "store")):
        store.read(start, stop)


def test_an_id_outside_the_vocabulary_does_not_wrap_around(tmp_path):
    for ids in ([2**16 + 5], [-1], [257]):
        with pytest.raises(SpiralError, match=r"document 0 has ids .*; allowed: 0 to 256"):
            with StoreWriter(tmp_path / "store", ByteTokenizer()) as writer:
                writer.add(np.array(ids), utf8_bytes=1)
    assert os.listdir(tmp_path) == []


def test_a_store_without_documents_is_refused(tmp_path):
    with pytest.raises(SpiralError, match=r"store: no text to store"):
        write(tmp_path / "store", texts=[])
    assert os.listdir(tmp_path) == []


def test_an_exception_while_writing_leaves_the_store_before_it_untouched(tmp_path):
    write(tmp_path / "store")
    with pytest.raises(KeyError):
        with StoreWriter(tmp_path / "store", ByteTokenizer()) as writer:
            writer.add(np.arange(10), utf8_bytes=10)
            raise KeyError
    assert os.listdir(tmp_path) == ["store"]
    assert TokenStore.open(tmp_path / "store").num_documents == 3


def test_a_store_is_replaced(tmp_path):
    before = write(tmp_path / "store")
    first = before.read(0, 5).tolist()
    write(tmp_path / "store", texts=["other"])
    assert os.listdir(tmp_path) == ["store"]
    assert TokenStore.open(tmp_path / "store").num_documents == 1
    assert before.read(0, 5).tolist() == first  # a reader keeps what it opened


def test_a_killed_writer_leaves_nothing_that_looks_like_a_store(tmp_path):
    program = (
        "import sys, numpy as np; from spiral_jax.data.store_writer import StoreWriter\n"
        "from spiral_jax.data.tokenizers import ByteTokenizer\n"
        "writer = StoreWriter(sys.argv[1], ByteTokenizer())\n"
        "for i in range(10**9):\n"
        "    writer.add(np.full(100_000, i % 256), utf8_bytes=1)\n"
        "    print(i, flush=True)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "store")]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        while process.stdout.readline() != "30\n":
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    leftovers = os.listdir(tmp_path)
    assert len(leftovers) == 1 and (tmp_path / leftovers[0] / "tokens.bin").stat().st_size > 0  # it was in the middle
    with pytest.raises(SpiralError, match="does not exist"):
        TokenStore.open(tmp_path / "store")
    write(tmp_path / "store").verify()
    assert os.listdir(tmp_path) == ["store"]


def test_a_crash_between_the_renames_is_cleaned_up_by_the_next_run(tmp_path, monkeypatch):
    write(tmp_path / "store")
    rename = os.rename

    def rename_once(source, target):
        rename(source, target)
        monkeypatch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))

    with monkeypatch.context():
        monkeypatch.setattr(os, "rename", rename_once)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "store", texts=["new"])
    monkeypatch.undo()
    assert not (tmp_path / "store").exists()
    write(tmp_path / "store", texts=["new"]).verify()
    assert os.listdir(tmp_path) == ["store"]


@pytest.mark.parametrize("name", ["tokens.bin", "documents.bin", "manifest.json"])
def test_missing_and_truncated_files_are_named(tmp_path, name):
    write(tmp_path / "store")
    path = tmp_path / "store" / name
    content = path.read_bytes()
    for damaged in (content[:-2], content + b"{", b""):
        path.write_bytes(damaged)
        with pytest.raises(SpiralError, match=str(path)) as error:
            TokenStore.open(tmp_path / "store")
        assert "\n" not in str(error.value)
    path.unlink()
    with pytest.raises(SpiralError, match=f"{path} does not exist"):
        TokenStore.open(tmp_path / "store")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": "other"}, r"format is 'other'; allowed: 'spiral_jax\.token_store'"),
        ({"version": 2}, "version is 2; allowed: 1"),
        ({"dtype": "<u4"}, "dtype"),
        ({"dtype": "object"}, "dtype"),
        ({"num_tokens": "41"}, "num_tokens"),
        ({"num_tokens": 39}, r"tokens\.bin"),
        ({"num_documents": -1}, "-1 documents"),
        ({"num_documents": True}, "num_documents"),
        ({"utf8_bytes": None}, "utf8_bytes"),
        ({"max_token_id": 300}, "max_token_id"),
        ({"files": []}, "is damaged"),
        ({"files": {}}, r"tokens\.bin"),
    ],
)
def test_a_manifest_that_is_wrong_is_refused(tmp_path, change, reason):
    write(tmp_path / "store")
    path = tmp_path / "store/manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change), encoding="utf-8")
    with pytest.raises(SpiralError, match=rf"manifest\.json.*{reason}") as error:
        TokenStore.open(tmp_path / "store")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"[]", b"not json", b"\xff\xfe", b"[" * 100_000])
def test_a_manifest_that_is_no_manifest_is_refused(tmp_path, content):
    write(tmp_path / "store")
    (tmp_path / "store/manifest.json").write_bytes(content)
    with pytest.raises(SpiralError, match=r"manifest\.json(: format is None; allowed: | is damaged \(no JSON: )"):
        TokenStore.open(tmp_path / "store")


@pytest.mark.parametrize("name", ["tokens.bin", "documents.bin"])
def test_verify_finds_a_flipped_bit(tmp_path, name):
    store = write(tmp_path / "store")
    path = tmp_path / "store" / name
    content = bytearray(path.read_bytes())
    content[8] ^= 1
    path.write_bytes(content)
    with pytest.raises(SpiralError, match=f"{path}: SHA-256"):
        store.verify()


def test_another_tokenizer_is_refused_with_both_fingerprints(tmp_path):
    store = write(tmp_path / "store")
    store.check_tokenizer(ByteTokenizer())
    bpe = train_bpe(TEXTS, 300)
    with pytest.raises(SpiralError, match=r"data\.tokenizer has fingerprint .*; allowed: ") as error:
        store.check_tokenizer(bpe)
    assert bpe.fingerprint in str(error.value) and ByteTokenizer.fingerprint in str(error.value)


def test_a_vocabulary_too_small_for_the_data_is_refused(tmp_path):
    store = write(tmp_path / "store")
    store.check_vocab_size(257)
    store.check_vocab_size(288)
    with pytest.raises(SpiralError, match=r"model\.vocab_size is 256; allowed: 257 or more"):
        store.check_vocab_size(256)


def test_an_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(SpiralError, match=r"file/deeper/store: the token store cannot be written \(Not a directory\)"):
        write(tmp_path / "file/deeper/store")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a disk that is always full")
def test_a_full_disk_is_an_error_of_one_line_and_leaves_nothing(tmp_path):
    writer = StoreWriter(tmp_path / "store", ByteTokenizer())
    writer._files[TOKENS] = open("/dev/full", "wb")
    with pytest.raises(SpiralError, match=r"store: the token store cannot be written \(No space left on device\)"):
        with writer:
            writer.add(np.zeros(2**22, np.int32), utf8_bytes=1)
    assert os.listdir(tmp_path) == []
