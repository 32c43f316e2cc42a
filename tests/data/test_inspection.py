"""What `inspect` prints of each kind of token data, and the damage that it finds."""

import hashlib
import json
import re
import struct

import numpy as np
import pytest

from spiral_jax import progress
from spiral_jax.data.inspection import inspect
from spiral_jax.data.store_writer import StoreWriter
from spiral_jax.data.tokenizers import ByteTokenizer, train_bpe
from spiral_jax.errors import SpiralError

TEXTS = ["first document", "zweites,\twith Ümlaut\r\n", "x", "a \x1b[31mred\x1b[0m word\x00", "the end"]


def run(place, *, show=0, verify=False, **options):
    lines = []
    inspect(str(place), show=show, verify=verify, report=lines.append, **options)
    assert all("\n" not in line and line.isprintable() for line in lines)
    return "\n".join(lines)


def write_store(folder, tokenizer, texts=TEXTS):
    with StoreWriter(folder, tokenizer) as writer:
        for text in texts:
            writer.add(tokenizer.encode(text), utf8_bytes=len(text.encode()))


@pytest.fixture
def prepared(tmp_path):
    """What `prepare` writes: train/, validation/ and the tokenizer."""
    bpe = train_bpe(TEXTS * 3, 280)
    write_store(tmp_path / "data/train", bpe)
    write_store(tmp_path / "data/validation", bpe, ["held out", "text"])
    bpe.save(tmp_path / "data")
    return tmp_path / "data"


def write_megatron(folder, tokenizer, texts=TEXTS, end=True):
    pieces = [np.append(tokenizer.encode(text), [tokenizer.separator_id] * end) for text in texts]
    np.concatenate(pieces).astype("<u2").tofile(folder / "data.bin")
    sizes = np.array([len(piece) for piece in pieces])
    with open(folder / "data.idx", "wb") as file:
        file.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, len(sizes), len(sizes) + 1))
        file.write(sizes.astype("<i4").tobytes() + (2 * (np.cumsum(sizes) - sizes)).astype("<i8").tobytes())
        file.write(np.arange(len(sizes) + 1, dtype="<i8").tobytes())
    return sizes


def test_a_prepared_folder(prepared):
    text = run(prepared, show=2, verify=True)
    manifest = json.loads((prepared / "train/manifest.json").read_text(encoding="utf-8"))
    num_tokens = manifest["num_tokens"]
    sizes = np.diff(np.fromfile(prepared / "train/documents.bin", "<u8"))
    for expected in (
        f"{prepared}/train: token store",
        f"{prepared}/validation: token store",
        "  documents    5\n",
        "  documents    2\n",
        f"min {sizes.min()}, median {np.median(sizes):.0f}, mean {sizes.mean():.1f}, max {sizes.max()}\n",
        f"  tokens       {num_tokens}, uint16, {2 * num_tokens} bytes\n",
        f"{manifest['utf8_bytes']} bytes, {manifest['utf8_bytes'] / num_tokens:.3f} bytes per token",
        f"largest {manifest['max_token_id']} of a vocabulary of {manifest['vocab_size']}\n",
        "  separator    0 <|endoftext|>\n",
        f"SHA-256 {manifest['files']['tokens.bin']['sha256'][:12]}\n",
        "tokenizer: Hugging Face tokenizer.json, fingerprint " + manifest["tokenizer_fingerprint"][:12],
        f"  token 0, {prepared}/train/tokens.bin: document 0, token 0 of it (byte 0 of the file)",
        r"first document<|endoftext|>zweites,\twith Ümlaut\r\n<|endoftext|>x<|endoftext|>a \x1b[31mred\x1b[0m",
        "the end<|endoftext|>",
        "held out<|endoftext|>text<|endoftext|>",
        f"ok: {prepared}/train: checksums, 5 documents, separators, ids 0 to {manifest['max_token_id']}",
        f"ok: {prepared}/validation: checksums, 2 documents, separators, ids 0 to ",
    ):
        assert expected in text


def test_a_store_by_itself(prepared, tmp_path):
    text = run(prepared / "train", show=1)  # its tokenizer is in the folder above
    assert "first document<|endoftext|>" in text and "validation" not in text
    write_store(tmp_path / "bytes", ByteTokenizer())
    text = run(tmp_path / "bytes", show=1, verify=True)
    assert r"first document<|endoftext|>zweites,\twith" in text and "tokenizer: bytes" in text
    (prepared / "train").rename(tmp_path / "alone")
    text = run(tmp_path / "alone", show=1)
    tokens = np.fromfile(tmp_path / "alone/tokens.bin", "<u2")
    assert "tokenizer: none" in text and " ".join(map(str, tokens[:20])) in text
    text = run(tmp_path / "alone", show=1, tokenizer_file=str(prepared / "tokenizer.json"))
    assert "first document<|endoftext|>" in text
    with pytest.raises(SpiralError, match=r"data\.tokenizer has fingerprint"):
        run(tmp_path / "alone", tokenizer_file="bytes")


def test_windows_are_spread_over_the_tokens_and_cut_to_a_width(tmp_path):
    texts = [f"document {number:04} " * 9 for number in range(50)]
    write_store(tmp_path / "store", ByteTokenizer(), texts)
    text = run(tmp_path / "store", show=5)
    starts = [int(start.replace(",", "")) for start in re.findall(r"^  token ([\d,]+), ", text, re.MULTILINE)]
    num_tokens = 50 * 127
    assert starts == [(num_tokens - 64) * index // 4 for index in range(5)]
    for start in starts:
        assert f"tokens.bin: document {start // 127}, token {start % 127} of it (byte {2 * start} of" in text
    write_store(tmp_path / "wide", ByteTokenizer(), ["\x00" * 100])
    assert max(map(len, run(tmp_path / "wide", show=1).splitlines()[-4:])) < 200
    assert "…" in run(tmp_path / "wide", show=1)
    assert "token 0," not in run(tmp_path / "store", show=0)


@pytest.mark.parametrize("place", ["", "data", "data.idx", "data.bin"])
def test_a_megatron_dataset(tmp_path, place):
    bpe = train_bpe(TEXTS * 3, 280)
    sizes = write_megatron(tmp_path, bpe)
    bpe.save(tmp_path)
    text = run(tmp_path / place, show=2, verify=True)
    largest = np.fromfile(tmp_path / "data.bin", "<u2").max()
    for expected in (
        f"{tmp_path}/data.idx: Megatron dataset",
        "  documents    5\n",
        f"min {sizes.min()}, median {np.median(sizes):.0f}, mean {sizes.mean():.1f}, max {sizes.max()}\n",
        f"  tokens       {sizes.sum()}, uint16, {2 * sizes.sum()} bytes in 1 file(s)\n",
        f"  ids          largest {largest}\n",
        "0 <|endoftext|>, at the end of 5 of 5 looked at",
        f"  token 0, {tmp_path}/data.bin: document 0, token 0 of it (byte 0 of the file)",
        r"first document<|endoftext|>zweites,\twith Ümlaut\r\n<|endoftext|>",
        f"ok: {tmp_path}/data.idx: index, 5 documents, ids 0 to {largest}",
    ):
        assert expected in text


def test_a_megatron_dataset_without_tokenizer_or_separators(tmp_path):
    write_megatron(tmp_path, ByteTokenizer(), end=False)
    text = run(tmp_path, show=1, verify=True)
    assert " ".join(map(str, b"first document")) in text and "no tokenizer was there to compare with" in text
    text = run(tmp_path, show=1, tokenizer_file="bytes")
    assert "first documentzweites" in text and "at the end of 0 of 5 looked at" in text


@pytest.mark.parametrize("name", ["train/tokens.bin", "train/documents.bin", "validation/tokens.bin"])
def test_verify_finds_a_flipped_bit(prepared, name):
    content = bytearray((prepared / name).read_bytes())
    content[8] ^= 1
    (prepared / name).write_bytes(content)
    for verify in (False, True):  # a small store is read whole when it is opened
        with pytest.raises(SpiralError, match=rf"{prepared / name} is damaged \(bytes 0 to "):
            run(prepared, verify=verify)
    without_blocks((prepared / name).parent)
    run(prepared)
    with pytest.raises(SpiralError, match=rf"{prepared / name}: SHA-256 is"):
        run(prepared, verify=True)


def without_blocks(folder):
    """Makes of a store one of the versions that had no checksums of blocks."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    for file in manifest["files"].values():
        del file["block_bytes"], file["crc32_of_blocks"]
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def test_verify_locates_an_id_outside_the_vocabulary_of_megatron_data(tmp_path):
    sizes = write_megatron(tmp_path, ByteTokenizer())
    content = np.fromfile(tmp_path / "data.bin", "<u2")
    content[sizes[0] + 4] = 257
    content.tofile(tmp_path / "data.bin")
    run(tmp_path, verify=True)
    with pytest.raises(SpiralError, match=r"data\.bin: document 1, token 4 of it .* is id 257; allowed: 0 to 256"):
        run(tmp_path, verify=True, tokenizer_file="bytes")


def rewrite(folder, change):
    """Changes the files of a store and its checksums: what a writer with a mistake would leave."""
    without_blocks(folder)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    change()
    for name, file in manifest["files"].items():
        file["sha256"] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


@pytest.mark.parametrize(
    ("position", "value", "match"),
    [
        (18, 257, r"tokens\.bin: document 1, token 3 of it \(byte 36 of the file\) is id 257; allowed: 0 to 256"),
        (14, 32, r"documents\.bin is damaged \(document 0 does not end with the separator"),
        (-1, 32, r"documents\.bin is damaged \(document 4 does not end with the separator"),
    ],
)
def test_verify_finds_what_a_wrong_writer_left(tmp_path, position, value, match):
    write_store(tmp_path / "store", ByteTokenizer())

    def change():
        content = np.fromfile(tmp_path / "store/tokens.bin", "<u2")
        content[position] = value
        content.tofile(tmp_path / "store/tokens.bin")

    rewrite(tmp_path / "store", change)
    with pytest.raises(SpiralError, match=match):
        run(tmp_path / "store", verify=True)


def test_progress_says_how_long_it_takes(prepared, monkeypatch):
    clock = iter(range(0, 10**6, 3))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    lines = [line for line in run(prepared, verify=True).splitlines() if ": read: " in line]
    assert len(lines) == 4  # two files of two stores
    assert lines[1].startswith(f"{prepared}/train: read: ") and "(100%)" in lines[1] and "0s left" in lines[1]
    assert "(100%)" not in lines[0]


def test_places_that_hold_no_tokens(tmp_path):
    with pytest.raises(
        SpiralError, match=r"--inspect is .*/nothing', which does not exist; allowed: a folder with a token store"
    ):
        run(tmp_path / "nothing")
    with pytest.raises(SpiralError, match=rf"--inspect is '{tmp_path}', which holds no tokens; allowed: a folder"):
        run(tmp_path)


def test_a_megatron_dataset_with_a_validation_store_beside_it(tmp_path):
    """As docs/pile.md puts them on a bucket: both are read, not the small one alone."""
    write_megatron(tmp_path, ByteTokenizer())
    write_store(tmp_path / "validation", ByteTokenizer())
    printed = run(tmp_path, verify=True, tokenizer_file="bytes")
    assert f"ok: {tmp_path}/validation" in printed and printed.count("Megatron dataset") == 1
    content = np.fromfile(tmp_path / "data.bin", "<u2")
    content[1] = 300
    content.tofile(tmp_path / "data.bin")
    with pytest.raises(SpiralError, match="is id 300"):
        run(tmp_path, verify=True, tokenizer_file="bytes")
