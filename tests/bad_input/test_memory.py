"""Small files that stand for much: refused in a line, without holding it."""

import gzip
import io

import pytest
from refusals import refused
from verbs import call

from spiral_jax import evaluate, prepare
from spiral_jax.corpus import pieces

GB = 10**9


@pytest.fixture(scope="module")
def packed():
    """A line of 1 GB in 32 kB: an object with one text."""
    zstandard = pytest.importorskip("zstandard", reason="unpacks zstd (extra `zstd`)")
    file, million = io.BytesIO(), b"a" * 10**6
    with zstandard.ZstdCompressor().stream_writer(file, closefd=False) as writer:
        writer.write(b'{"text": "')
        for _ in range(GB // len(million)):
            writer.write(million)
        writer.write(b'"}\n')
    assert len(file.getvalue()) < 100_000
    return file.getvalue()


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_a_line_of_a_gigabyte(tmp_path, packed, tokenizer):
    (tmp_path / "a.jsonl.zst").write_bytes(packed)
    arguments = f"--input={tmp_path}", f"--output={tmp_path}/x/out", f"--tokenizer={tokenizer}", "--workers=1"
    line = refused(prepare, arguments, ("a.jsonl.zst: the line at byte", "--longest_record"), tmp_path)
    assert f"is longer than {2**26} bytes" in line


def test_a_text_of_a_gigabyte_is_not_scored_whole(good, tmp_path, packed):
    (tmp_path / "a.txt.zst").write_bytes(packed)
    arguments = f"--workdir={good}/run", f"--input={tmp_path}/a.txt.zst"
    refused(evaluate, arguments, ("a.txt.zst has more than", "token store"), tmp_path)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
def test_the_longest_record_is_allowed_and_a_longer_one_is_not(tmp_path, suffix, workers):
    texts = ["a" * n for n in (10, 1000, 20)]
    write(tmp_path / f"in.{suffix}", texts)
    size = 1000 if suffix == "parquet" else len('{"text": ""}\n') + 1000
    arguments = f"--input={tmp_path}/in.{suffix}", f"--output={tmp_path}/out", "--tokenizer=bytes"
    more = f"--workers={workers}", "--validation_fraction=0"
    words = f"in.{suffix}: ", f"is longer than {size - 1} bytes"
    refused(prepare, (*arguments, *more, f"--longest_record={size - 1}"), words, tmp_path)
    assert call(prepare, *arguments, *more, f"--longest_record={size}") == (0, "")


def write(path, texts):
    lines = "".join(f'{{"text": "{text}"}}\n' for text in texts).encode()
    if path.suffix == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet", reason="reads parquet (extra `parquet`)")
        parquet.write_table(pytest.importorskip("pyarrow").table({"text": texts}), path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines))
    elif path.suffix == ".zst":
        zstandard = pytest.importorskip("zstandard", reason="unpacks zstd (extra `zstd`)")
        path.write_bytes(zstandard.compress(lines))
    else:
        path.write_bytes(lines)


@pytest.mark.parametrize("length", [100_000, 300_000])
def test_a_long_line_among_short_ones_in_a_cut_file(tmp_path, monkeypatch, capsys, length):
    """In files that are cut into pieces, where the line is longer than what is looked at for a cut."""
    monkeypatch.setattr(pieces, "_SMALLEST_PIECE", 50_000)
    write(tmp_path / "in.jsonl", ["a" * 100] * 1000 + ["b" * length] + ["c" * 100] * 1000)
    arguments = f"--input={tmp_path}/in.jsonl", f"--output={tmp_path}/out", "--tokenizer=bytes", "--workers=1"
    status, errors = call(prepare, *arguments, "--longest_record=90000")
    assert status == 2 and "in.jsonl: the line at byte" in errors and errors.count("\n") == 1
    # What came before the line is tokenised, and is gone on with.
    assert call(prepare, *arguments, "--longest_record=300100") == (0, "")
    assert "going on with" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out"]
