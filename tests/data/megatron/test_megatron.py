"""Megatron datasets: read back what a writer of our own, made from the format's description, wrote."""

import os
import struct
import threading

import numpy as np
import pytest

from spiral_jax.data.megatron import files as megatron_files
from spiral_jax.data.megatron.tokens import MegatronTokens, is_megatron
from spiral_jax.data.storage import Storage
from spiral_jax.data.windows import num_windows, read_windows
from spiral_jax.errors import SpiralError

CODES = {"uint8": 1, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}
HEADER = 34


def write_index(path, dtype, sizes, boundaries, pointers=None):
    """An .idx as Megatron-LM and GPT-NeoX write it."""
    if pointers is None:
        pointers = np.concatenate([[0], np.cumsum(np.asarray(sizes, np.int64))[:-1]]) * np.dtype(dtype).itemsize
    with open(path, "wb") as file:
        file.write(b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", CODES[np.dtype(dtype).name]))
        file.write(struct.pack("<Q", len(sizes)) + struct.pack("<Q", len(boundaries)))
        file.write(np.array(sizes, "<i4").tobytes())
        file.write(np.array(pointers, "<i8").tobytes())
        file.write(np.array(boundaries, "<i8").tobytes())


def write(folder, dtype="uint16", *, seed=0, documents=7, name="data", highest=300, empty=True):
    """Random documents of several sequences, some of them empty; returns tokens, sizes and boundaries."""
    rng = np.random.default_rng(seed)
    sizes, boundaries = [], [0]
    for _ in range(documents):
        sizes += rng.integers(0 if empty else 1, 9, size=rng.integers(0 if empty else 1, 4)).tolist()
        boundaries.append(len(sizes))
    tokens = rng.integers(0, highest, size=sum(sizes)).astype(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    tokens.astype(np.dtype(dtype).newbyteorder("<")).tofile(folder / f"{name}.bin")
    write_index(folder / f"{name}.idx", dtype, sizes, boundaries)
    return tokens, sizes, boundaries


def cut(folder, cuts, name="data", last=None):
    """Cuts NAME.bin into parts at some bytes, as EleutherAI's script does: numbered to the last one."""
    content = (folder / f"{name}.bin").read_bytes()
    edges = [0, *cuts, len(content)]
    last = len(edges) - 2 if last is None else last
    for number, (start, stop) in enumerate(zip(edges, edges[1:], strict=False)):
        (folder / f"{name}-{number:05}-of-{last:05}.bin").write_bytes(content[start:stop])
    (folder / f"{name}.bin").unlink()


def refused(place, match):
    with pytest.raises(SpiralError, match=match) as error:
        MegatronTokens.open(str(place))
    assert "\n" not in str(error.value)
    return str(error.value)


def assert_same(source, tokens, rng):
    assert source.num_tokens == len(tokens)
    edges = np.sort(rng.integers(0, len(tokens) + 1, size=(50, 2)))
    ranges = [(0, len(tokens)), (0, 0), (len(tokens), len(tokens)), *edges.tolist()]
    for found, (start, stop) in zip(source.read_many(ranges), ranges, strict=True):
        assert found.dtype == np.int32 and found.flags.writeable
        np.testing.assert_array_equal(found, tokens[start:stop])


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
        with pytest.raises(SpiralError, match=rf"a\.bin: document 1, token 1 of it .*: id {wrong}; allowed: 0 to"):
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
        SpiralError, match=r"data\.bin: document 11, token 2 of it \(byte \d+ .*: id 100; allowed: 0 to 99"
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


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
@pytest.mark.parametrize("last_is_a_count", [False, True])
def test_parts_cut_anywhere_are_one_stream(tmp_path, dtype, last_is_a_count):
    rng = np.random.default_rng(2)
    for trial in range(6):
        folder = tmp_path / str(trial)
        tokens, *_ = write(folder, dtype, documents=100, seed=trial, highest=2**15)
        whole = MegatronTokens.open(str(folder))
        before = whole.fingerprint, whole.locate(50).partition(":")[2].partition(" (")[0]
        size = len(tokens) * np.dtype(dtype).itemsize
        cuts = sorted([1, size - 1, *rng.integers(0, size + 1, size=10).tolist()])  # empty parts among them
        cut(folder, cuts, last=len(cuts) + last_is_a_count)
        places = [
            folder,
            folder / "data",
            folder / "data.idx",
            *folder.glob("data-00003-of-*.bin"),
            folder / "data.bin",
        ]
        for place in places:
            source = MegatronTokens.open(str(place))
            assert is_megatron(str(place)) and source.name == str(folder / "data.idx")
            assert_same(source, tokens, rng)
            assert (source.fingerprint, source.locate(50).partition(":")[2].partition(" (")[0]) == before
        for position in (0, 50, len(tokens) - 1):
            byte = position * np.dtype(dtype).itemsize
            part = max(i for i, start in enumerate([0, *cuts]) if start <= byte)
            name, _, rest = source.locate(position).partition(": ")
            assert name == source.parts[part].name and rest.endswith(f"(byte {byte - [0, *cuts][part]} of the file)")
        source.verify()


def test_a_missing_part_is_named(tmp_path):
    tokens, *_ = write(tmp_path, documents=100)
    size = 2 * len(tokens)
    cut(tmp_path, [size * i // 12 for i in range(1, 12)])  # 12 parts, numbered to 11
    parts = {number: tmp_path / f"data-{number:05}-of-00011.bin" for number in range(12)}
    contents = {number: path.read_bytes() for number, path in parts.items()}
    for gone in ([3], [0], [3, 7]):
        for number in gone:
            parts[number].unlink()
        error = refused(tmp_path, "missing; allowed: all parts of .*data.bin")
        assert [path.name for path in parts.values() if path.name in error] == [parts[number].name for number in gone]
        for number in gone:
            parts[number].write_bytes(contents[number])
    parts[11].unlink()  # or else 11 would be the number of parts, but then the size were right
    refused(
        tmp_path, r"data-00000-of-00011.bin to .*data-00010-of-00011.bin: \d+ bytes .*data-00011-of-00011.bin does not"
    )
    parts[11].write_bytes(contents[11])
    parts[5].write_bytes(contents[5][:-1])
    refused(tmp_path, rf"data-00000-of-00011.bin to .*: {size - 1} bytes; allowed: {size}, ")
    for number in range(6):
        parts[number].unlink()
    refused(tmp_path, "data-00000-of-00011.bin, .* and 2 more: missing")


def test_parts_of_two_sets_are_refused_unless_one_is_meant(tmp_path):
    tokens, *_ = write(tmp_path, documents=100)
    content = (tmp_path / "data.bin").read_bytes()
    cut(tmp_path, [100])
    (tmp_path / "data.bin").write_bytes(content)
    assert MegatronTokens.open(str(tmp_path)).locate(0).startswith(str(tmp_path / "data.bin"))  # the single file wins
    cut(tmp_path, [50, 100])
    refused(tmp_path, r"data.bin: parts of 2 sets \(-of-00001, -of-00002\)")
    source = MegatronTokens.open(str(tmp_path / "data-00001-of-00002.bin"))
    assert len(source.parts) == 3
    assert_same(source, tokens, np.random.default_rng(0))
    (tmp_path / "other-00000-of-00007.bin").write_bytes(b"")  # another dataset's
    for path in tmp_path.glob("*-of-00001.bin"):
        path.unlink()
    assert len(MegatronTokens.open(str(tmp_path)).parts) == 3


def test_a_dataset_whose_own_name_looks_like_a_part(tmp_path):
    tokens, *_ = write(tmp_path, name="train-00000-of-00002")
    write(tmp_path, name="train-00001-of-00002", seed=1)
    source = MegatronTokens.open(str(tmp_path / "train-00000-of-00002.bin"))
    assert_same(source, tokens, np.random.default_rng(0))


def test_places_that_hold_no_dataset(tmp_path):
    write(tmp_path, name="a")
    write(tmp_path, name="b", seed=1)
    assert is_megatron(str(tmp_path))
    refused(tmp_path, rf"{tmp_path}: holds {tmp_path}/a.idx, {tmp_path}/b.idx; allowed: a folder with one .idx")
    tokens, *_ = write(tmp_path, name="c", seed=2)
    assert_same(MegatronTokens.open(str(tmp_path / "c")), tokens, np.random.default_rng(0))
    refused(tmp_path / "nothing", "nothing: no Megatron dataset; allowed: ")
    refused(tmp_path / "nothing.idx", "nothing.idx: does not exist")
    refused(tmp_path / "nothing.bin", "nothing.idx: does not exist; allowed: a .bin, or its parts, beside its .idx")
    (tmp_path / "a.bin").unlink()
    refused(tmp_path / "a.idx", r"a.bin: does not exist; allowed: it, or the parts .*a-00000-of-NNNNN.bin")
    assert not is_megatron(str(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    assert not is_megatron(str(tmp_path / "empty"))


def test_every_flipped_bit_of_the_header_is_refused(tmp_path):
    for dtype in ("uint16", "int32"):
        write(tmp_path, dtype, empty=False)
        path = tmp_path / "data.idx"
        content = path.read_bytes()
        for byte in range(HEADER):
            for flip in [1 << bit for bit in range(8)] + [0xFF]:
                damaged = bytearray(content)
                damaged[byte] ^= flip
                path.write_bytes(damaged)
                error = refused(tmp_path, r"data\.(idx|bin): ")
                assert "; allowed: " in error


def test_every_flipped_bit_of_the_entries_is_refused_or_leaves_the_tokens_as_they_are(tmp_path):
    tokens, sizes, boundaries = write(tmp_path, empty=False, documents=4)
    path = tmp_path / "data.idx"
    content = path.read_bytes()
    inner = HEADER + 12 * len(sizes)
    harmless = 0
    for byte in range(HEADER, len(content)):
        for flip in [1 << bit for bit in range(8)] + [0xFF]:
            damaged = bytearray(content)
            damaged[byte] ^= flip
            path.write_bytes(damaged)
            try:
                source = MegatronTokens.open(str(tmp_path))
            except SpiralError as error:
                assert str(tmp_path / "data.") in str(error) and "\n" not in str(error)
                continue
            # Only a boundary between two documents that is still between its neighbours.
            assert inner < byte < len(content) - 8
            moved = np.frombuffer(damaged[inner:], "<i8")
            assert np.all(np.diff(moved) >= 0) and not np.array_equal(moved, boundaries)
            assert_same(source, tokens, np.random.default_rng(0))
            harmless += 1
    assert harmless < 30


def test_truncated_and_longer_files_are_refused(tmp_path):
    _, sizes, _ = write(tmp_path)
    index, data = (tmp_path / "data.idx").read_bytes(), (tmp_path / "data.bin").read_bytes()
    for length in range(len(index)):
        (tmp_path / "data.idx").write_bytes(index[:length])
        refused(tmp_path, r"data\.idx: ")
    for added in (1, 8, 4096):
        (tmp_path / "data.idx").write_bytes(index + bytes(added))
        refused(tmp_path, r"data\.idx: has \d+ bytes; allowed: ")
    (tmp_path / "data.idx").write_bytes(index + bytes(len(sizes)))
    refused(tmp_path, "multimodal")
    (tmp_path / "data.idx").write_bytes(index)
    for wrong in (*(data[:length] for length in range(len(data))), data + b"\0", data + b"\0\0"):
        (tmp_path / "data.bin").write_bytes(wrong)
        refused(tmp_path, rf"data\.bin: {len(wrong)} bytes; allowed: {len(data)}, which .*data\.idx says")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"pointers": [0, 4, 8]}, r"sequence 0 has 3 tokens from byte 0 on, the next one begins at byte 4"),
        ({"pointers": [2, 6, 10]}, r"data\.bin: 12 bytes; allowed: 14"),
        ({"pointers": [2, 8, 8], "sizes": [3, 0, 2]}, r"sequence 0 has 3 tokens from byte 2 on"),
        ({"sizes": [3, -1, 2], "pointers": [0, 6, 8]}, r"sequence 1 has -1 tokens"),
        ({"sizes": [-3, 1, 6], "pointers": [0, -6, 0]}, r"sequence 0 has -3 tokens"),
        ({"sizes": [2**31 - 1, 1, 2]}, r"data\.bin: 12 bytes"),
        ({"boundaries": [1, 3]}, "the first document begins at sequence 1; allowed: 0"),
        ({"boundaries": [1]}, "the first document begins at sequence 1; allowed: 0"),
        ({"boundaries": [0, 2]}, "the last document ends at sequence 2; allowed: 3"),
        ({"boundaries": [0, 4]}, "the last document ends at sequence 4; allowed: 3"),
        ({"boundaries": [0, 2, 1, 3]}, "document 1 begins at sequence 2 and the next one at 1"),
        ({"boundaries": [0, -1, 3]}, "document 0 begins at sequence 0 and the next one at -1"),
        ({"boundaries": [0, 9, 3]}, "document 1 begins at sequence 9 and the next one at 3"),
        ({"boundaries": []}, "3 sequences and 0 document boundaries; allowed: at least 1 each"),
        ({"sizes": [], "boundaries": [0], "pointers": []}, "0 sequences and 1 document boundaries"),
    ],
)
def test_indices_that_contradict_themselves_are_refused(tmp_path, change, match):
    (tmp_path / "data.bin").write_bytes(bytes(12))
    good = {"sizes": [3, 1, 2], "boundaries": [0, 1, 3]}
    write_index(tmp_path / "data.idx", "uint16", **good)
    MegatronTokens.open(str(tmp_path)).verify()
    write_index(tmp_path / "data.idx", "uint16", **(good | change))
    refused(tmp_path, match)


@pytest.mark.parametrize("code", [0, 2, 6, 7, 9, 255])
def test_other_token_types_are_refused(tmp_path, code):
    write(tmp_path)
    with open(tmp_path / "data.idx", "r+b") as file:
        file.seek(17)
        file.write(bytes([code]))
    refused(tmp_path, rf"data\.idx: token type {code} \(.*\); allowed: 1 \(uint8\), 3 \(int16\), 4 .*, 8 \(uint16\)")


def test_other_formats_are_refused(tmp_path):
    write(tmp_path)
    content = (tmp_path / "data.idx").read_bytes()
    (tmp_path / "data.idx").write_bytes(b"TNTIDX\x00\x00" + content[8:])  # the older format of both programs
    refused(tmp_path, r"begins with b'TNTIDX.*'; allowed: a Megatron \.idx")
    (tmp_path / "data.idx").write_bytes(content[:9] + struct.pack("<Q", 2) + content[17:])
    refused(tmp_path, r"Megatron index of version 2; allowed: 1")


def test_nothing_but_empty_sequences(tmp_path):
    (tmp_path / "data.bin").write_bytes(b"")
    write_index(tmp_path / "data.idx", "uint16", [0, 0], [0, 1, 2])
    refused(tmp_path, "2 sequences without a token")


def preshuffled(folder, sequences=10, length=9):
    """Like the preshuffled Pile: sequences of one length, and 0 as the only document boundary."""
    tokens = np.arange(sequences * length, dtype="<u2")
    tokens.tofile(folder / "document.bin")
    write_index(folder / "document.idx", "uint16", [length] * sequences, [0])
    assert (folder / "document.idx").stat().st_size == HEADER + 12 * sequences + 8
    return tokens


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


@pytest.fixture
def remote():
    """The URL of an empty folder in fsspec's memory."""
    fsspec = pytest.importorskip("fsspec")
    files = fsspec.filesystem("memory")
    files.mkdir("/megatron")
    yield "memory://megatron"
    files.rm("/megatron", recursive=True)


def upload(folder, url):
    fsspec = pytest.importorskip("fsspec")
    fsspec.filesystem("memory").put([str(path) for path in folder.iterdir()], url)


@pytest.mark.parametrize("parts", [False, True])
def test_urls(tmp_path, remote, parts):
    tokens, *_ = write(tmp_path, documents=100)
    here = MegatronTokens.open(str(tmp_path))
    if parts:
        cut(tmp_path, [33, 333])
    upload(tmp_path, remote)
    for place in (remote, f"{remote}/data", f"{remote}/data.idx", f"{remote}/data{'-00001-of-00002' * parts}.bin"):
        source = MegatronTokens.open(place)
        assert is_megatron(place) and source.fingerprint == here.fingerprint and len(source.parts) == 1 + 2 * parts
        assert_same(source, tokens, np.random.default_rng(0))
        assert source.locate(100).startswith(f"{remote}/data{'-00001-of-00002' * parts}.bin: document ")
    assert source.verify() == here.verify()
    assert not is_megatron(f"{remote}/nothing")


def test_urls_that_cannot_be_listed(tmp_path, remote, monkeypatch):
    tokens = preshuffled(tmp_path)
    cut(tmp_path, [33, 66], name="document")
    upload(tmp_path, remote)
    monkeypatch.setattr(megatron_files, "_list", lambda folder: [])
    source = MegatronTokens.open(f"{remote}/document-00000-of-00002.bin")
    assert source.sequence_tokens == 9
    assert_same(source, tokens, np.random.default_rng(0))
    assert is_megatron(remote)
    refused(remote, r"document\.bin: does not exist; allowed: .*-00000-of-NNNNN\.bin, or the URL of one of them")


def test_a_host_or_bucket_is_a_folder(monkeypatch):
    asked = []

    class Recording(Storage):
        def exists(self, place):
            asked.append(place)
            return False

    monkeypatch.setattr(megatron_files, "_list", lambda folder: [])
    assert not is_megatron("gs://bucket", Recording()) and not is_megatron("http://host:80/", Recording())
    assert asked == ["gs://bucket/document.idx", "http://host:80/document.idx"]


def test_a_relative_prefix(tmp_path, monkeypatch):
    tokens, *_ = write(tmp_path)
    cut(tmp_path, [9])
    monkeypatch.chdir(tmp_path)
    for place in (".", "data", "data.idx", "data-00000-of-00001.bin"):
        assert_same(MegatronTokens.open(place), tokens, np.random.default_rng(0))


def test_a_folder_as_file_url(tmp_path):
    tokens, *_ = write(tmp_path, documents=20)
    cut(tmp_path, [10])
    assert_same(MegatronTokens.open(f"file://{tmp_path}"), tokens, np.random.default_rng(0))


def test_elsewhere_verify_finds_what_the_sample_at_opening_leaves_out(tmp_path, remote):
    sequences = 2**17
    np.zeros(4 * sequences, "<u2").tofile(tmp_path / "a.bin")
    sizes, pointers = np.full(sequences, 4), np.arange(sequences) * 8
    sizes[5000:5002] = 3, 5  # with the right beginnings, and out of the sample
    pointers[5001] -= 2
    write_index(tmp_path / "a.idx", "uint16", sizes, range(sequences + 1), pointers)
    assert MegatronTokens.open(str(tmp_path)).sequence_tokens is None
    upload(tmp_path, remote)
    source = MegatronTokens.open(remote)
    assert source.sequence_tokens == 4
    with pytest.raises(SpiralError, match=r"a\.idx: sequences differ in length; allowed: 4"):
        source.verify()
    sizes[[0, 5000, 5001]] = 3, 5, 4  # the sample has a shorter one, and the sum is still that of equal ones
    write_index(tmp_path / "a.idx", "uint16", sizes, range(sequences + 1))
    upload(tmp_path, remote)
    assert MegatronTokens.open(remote).sequence_tokens is None
    sizes[[0, 5000, 5001]], pointers[5001] = [4, 3, 5], 5001 * 8
    write_index(tmp_path / "a.idx", "uint16", sizes, range(sequences + 1), pointers)
    refused(tmp_path, "sequence 5000 has 3 tokens")
    upload(tmp_path, remote)
    with pytest.raises(SpiralError, match=r"a\.idx: sequence 5000 has 3 tokens from byte 40000 on"):
        MegatronTokens.open(remote).verify()
