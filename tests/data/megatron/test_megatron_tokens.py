"""Megatron datasets read back: tokens, documents, ids, windows, fingerprints."""

import os
import threading

import numpy as np
import pytest
from megatron_writer import CODES, HEADER, assert_same, cut, preshuffled, write, write_index

from spiral_jax.data.megatron.tokens import MegatronTokens
from spiral_jax.data.windows import num_windows, read_windows
from spiral_jax.errors import SpiralError


@pytest.mark.parametrize("dtype", CODES)
def test_reads_what_was_written(tmp_path, dtype):
    tokens, sizes, boundaries = write(tmp_path, dtype, documents=60, highest=100 if dtype == "uint8" else 30_000)
    source = MegatronTokens.open(str(tmp_path))
    assert_same(source, tokens, np.random.default_rng(1))
    assert source.name == str(tmp_path / "data.idx") and source.dtype == dtype and source.sequence_tokens is None
    assert source.verify() == (tokens.min(), tokens.max())
    offsets = np.append(0, np.cumsum(sizes))[boundaries]
    assert source.num_documents == 60
    np.testing.assert_array_equal(source.document_offsets(0, 61), offsets)
    for start, stop in ((0, 1), (5, 9), (59, 61), (60, 61)):
        np.testing.assert_array_equal(source.document_offsets(start, stop), offsets[start:stop])
    for position in range(len(tokens)):
        document = max(d for d in range(60) if offsets[d] <= position < offsets[d + 1])
        byte = position * np.dtype(dtype).itemsize
        assert source.locate(position) == (
            f"{tmp_path}/data.bin: document {document}, token {position - offsets[document]} of it (byte {byte} of the "
            "file)"
        )


def test_ids_of_all_16_bits_and_of_31(tmp_path):
    np.array([0, 2**15, 2**16 - 1], "<u2").tofile(tmp_path / "a.bin")
    write_index(tmp_path / "a.idx", "uint16", [3], [0, 1])
    assert MegatronTokens.open(str(tmp_path / "a")).read(0, 3).tolist() == [0, 2**15, 2**16 - 1]
    np.array([0, 2**31 - 1], "<i8").tofile(tmp_path / "b.bin")
    write_index(tmp_path / "b.idx", "int64", [2], [0, 1])
    assert MegatronTokens.open(str(tmp_path / "b")).read(0, 2).tolist() == [0, 2**31 - 1]


@pytest.mark.parametrize("wrong", [-1, 2**31, 2**32 + 5])
def test_ids_that_int32_does_not_hold_are_not_cut_short(tmp_path, wrong):
    np.array([1, 2, 3, wrong], "<i8").tofile(tmp_path / "a.bin")
    write_index(tmp_path / "a.idx", "int64", [2, 2], [0, 1, 2])
    source = MegatronTokens.open(str(tmp_path))
    assert source.read(0, 3).tolist() == [1, 2, 3]
    for reads in (lambda: source.read(2, 4), source.verify):
        with pytest.raises(SpiralError, match=rf"a\.bin: document 1, token 1 of it .* is id {wrong}; allowed: 0 to"):
            reads()


def test_verify_locates_an_id_outside_the_vocabulary(tmp_path):
    _, sizes, boundaries = write(tmp_path, "uint16", documents=40, highest=100)
    starts = np.append(0, np.cumsum(sizes))[boundaries]
    position = int(starts[11]) + 2
    assert starts[12] > position
    content = np.fromfile(tmp_path / "data.bin", "<u2")
    content[[position, -1]] = 100
    content.tofile(tmp_path / "data.bin")
    source = MegatronTokens.open(str(tmp_path))
    assert source.verify(101) == (0, 100)
    with pytest.raises(
        SpiralError, match=r"data\.bin: document 11, token 2 of it \(byte \d+ .* is id 100; allowed: 0 to 99"
    ):
        source.verify(100)
    seen = []
    source.verify(progress=seen.append)
    assert sum(seen) == source.num_bytes - HEADER


@pytest.mark.parametrize("range_", [(-1, 3), (0, 10**9), (5, 4)])
def test_read_outside_is_an_error(tmp_path, range_):
    write(tmp_path)
    with pytest.raises(IndexError, match=str(tmp_path)):
        MegatronTokens.open(str(tmp_path)).read(*range_)


def test_threads_read_at_once(tmp_path):
    tokens, *_ = write(tmp_path, documents=500)
    cut(tmp_path, [333, 1001])
    source, failed = MegatronTokens.open(str(tmp_path)), []

    def read(seed):
        try:
            for _ in range(20):
                assert_same(source, tokens, np.random.default_rng(seed))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_sequences_of_one_length_are_windows(tmp_path):
    tokens = preshuffled(tmp_path)
    cut(tmp_path, [37, 101], name="document")
    source = MegatronTokens.open(str(tmp_path))
    assert source.sequence_tokens == 9 and source.num_documents == 10
    assert num_windows(source, 8) == 10
    np.testing.assert_array_equal(read_windows(source, [0, 9, 4], 8), tokens.reshape(10, 9)[[0, 9, 4]])
    assert num_windows(source, 4) == 22  # any other length runs over the whole stream
    np.testing.assert_array_equal(read_windows(source, [21], 4), tokens[None, 84:89])
    assert source.locate(31).startswith(f"{tmp_path}/document-00001-of-00002.bin: sequence 3, token 4 of it (byte 25 ")
    np.testing.assert_array_equal(source.document_offsets(3, 6), [27, 36, 45])
    np.testing.assert_array_equal(source.document_offsets(9, 11), [81, 90])
    source.verify()


@pytest.mark.parametrize("sizes", [[9], [9, 9, 8], [9, 0, 9, 9, 18]])
def test_a_single_sequence_or_different_lengths_are_one_stream(tmp_path, sizes):
    np.arange(sum(sizes), dtype="<u2").tofile(tmp_path / "a.bin")
    write_index(tmp_path / "a.idx", "uint16", sizes, [0])
    assert MegatronTokens.open(str(tmp_path)).sequence_tokens is None


@pytest.mark.parametrize("sequence_length", [1, 5, 8, 64])
def test_windows(tmp_path, sequence_length):
    tokens, *_ = write(tmp_path, documents=100)
    cut(tmp_path, [101, 103, 400])
    source = MegatronTokens.open(str(tmp_path))
    windows = num_windows(source, sequence_length)
    found = read_windows(source, range(windows), sequence_length)
    for index in range(windows):
        start = index * sequence_length
        np.testing.assert_array_equal(found[index], tokens[start : start + sequence_length + 1])


def test_beyond_31_and_32_bits(tmp_path):
    per_sequence, sequences = 2**31 - 1, 3  # sizes are int32
    num_tokens = per_sequence * sequences
    places = {
        "token 2**31": 2**31,
        "byte 2**31": 2**30,
        "token 2**32": 2**32,
        "the end": num_tokens - 1,
    }
    with open(tmp_path / "big.bin", "wb") as file:  # sparse: takes no room
        file.truncate(num_tokens * 2)
        for value, position in enumerate(places.values(), 7):
            file.seek(2 * position - (6 if position != num_tokens - 1 else 0))
            file.write(np.array([1, 2, 3, value][0 if position != num_tokens - 1 else 3 :], "<u2").tobytes())
    if os.stat(tmp_path / "big.bin").st_blocks * 512 > 2**24:
        pytest.skip("needs a file system with sparse files")
    write_index(tmp_path / "big.idx", "uint16", [per_sequence] * sequences, range(sequences + 1))
    source = MegatronTokens.open(str(tmp_path))
    assert source.num_tokens == num_tokens and source.sequence_tokens == per_sequence
    for value, position in enumerate(places.values(), 7):
        start = position - 3
        expected = [1, 2, 3, value] if position != num_tokens - 1 else [0, 0, 0, value]
        for as_int in (int, np.int64):
            (found,) = source.read_many([(as_int(start), as_int(position + 1))])
            assert found.tolist() == expected
        document = position // per_sequence
        assert source.locate(position) == (
            f"{tmp_path}/big.bin: document {document}, token {position - document * per_sequence} of it "
            f"(byte {2 * position} of the file)"
        )
    np.testing.assert_array_equal(source.document_offsets(0, 4), np.arange(4) * per_sequence)
    assert num_windows(source, 2047) == (num_tokens - 2048) // 2047 + 1
    last = read_windows(source, [num_windows(source, 2047) - 1], 2047)
    assert last.shape == (1, 2048)


def test_the_fingerprint_changes_with_the_data_and_nothing_else(tmp_path):
    write(tmp_path / "a", documents=2000)
    first = MegatronTokens.open(str(tmp_path / "a")).fingerprint
    write(tmp_path / "b", documents=2000, name="another_name")
    assert MegatronTokens.open(str(tmp_path / "b")).fingerprint == first
    write(tmp_path / "c", documents=2000, seed=1)
    assert MegatronTokens.open(str(tmp_path / "c")).fingerprint != first
    content = (tmp_path / "a/data.bin").read_bytes()
    for byte in (0, len(content) // 2, len(content) - 1):  # small files are read whole
        damaged = bytearray(content)
        damaged[byte] ^= 1
        (tmp_path / "a/data.bin").write_bytes(damaged)
        assert MegatronTokens.open(str(tmp_path / "a")).fingerprint != first
    cut_at = bytes(content)
    (tmp_path / "a/data.bin").write_bytes(cut_at)
    cut(tmp_path / "a", [1, 777])
    assert MegatronTokens.open(str(tmp_path / "a")).fingerprint == first


def test_the_fingerprint_of_large_files_is_a_sample_that_sees_both_ends(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 1000, 2**20).astype("<u2")
    found = []
    for seed in range(4):
        changed = tokens.copy()
        if seed == 1:
            changed[0] += 1
        elif seed == 2:
            changed[-1] += 1
        elif seed == 3:  # 64 KiB: more than the distance between two blocks
            changed[2**19 : 2**19 + 2**15] = 0
        changed.tofile(tmp_path / "data.bin")
        write_index(tmp_path / "data.idx", "uint16", [2**20], [0, 1])
        found.append(MegatronTokens.open(str(tmp_path)).fingerprint)
    assert len(set(found)) == 4
    write_index(tmp_path / "data.idx", "uint16", [2**19, 2**19], [0, 1, 2])
    assert MegatronTokens.open(str(tmp_path)).fingerprint not in found
