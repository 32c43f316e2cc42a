"""Indices that are damaged, contradict themselves, or are of another kind."""

import struct

import numpy as np
import pytest
from megatron_writer import HEADER, assert_same, refused, write, write_index

from spiral_jax.data.megatron.tokens import MegatronTokens
from spiral_jax.errors import SpiralError


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
                error = refused(tmp_path, r"data\.(idx|bin)")
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
        refused(tmp_path, r"data\.idx has \d+ bytes; allowed: ")
    for added in (1, 8, 4096):
        (tmp_path / "data.idx").write_bytes(index + bytes(added))
        refused(tmp_path, r"data\.idx has \d+ bytes; allowed: ")
    (tmp_path / "data.idx").write_bytes(index + bytes(len(sizes)))
    refused(tmp_path, "multimodal")
    (tmp_path / "data.idx").write_bytes(index)
    for wrong in (*(data[:length] for length in range(len(data))), data + b"\0", data + b"\0\0"):
        (tmp_path / "data.bin").write_bytes(wrong)
        refused(tmp_path, rf"data\.bin has {len(wrong)} bytes; allowed: {len(data)}, which .*data\.idx says")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"pointers": [0, 4, 8]}, r"sequence 0 has 3 tokens from byte 0 on, the next one begins at byte 4"),
        ({"pointers": [2, 6, 10]}, r"data\.bin has 12 bytes; allowed: 14"),
        ({"pointers": [2, 8, 8], "sizes": [3, 0, 2]}, r"sequence 0 has 3 tokens from byte 2 on"),
        ({"sizes": [3, -1, 2], "pointers": [0, 6, 8]}, r"sequence 1 has -1 tokens"),
        ({"sizes": [-3, 1, 6], "pointers": [0, -6, 0]}, r"sequence 0 has -3 tokens"),
        ({"sizes": [2**31 - 1, 1, 2]}, r"data\.bin has 12 bytes"),
        ({"boundaries": [1, 3]}, "begin of the first document is 1; allowed: sequence 0"),
        ({"boundaries": [1]}, "begin of the first document is 1; allowed: sequence 0"),
        ({"boundaries": [0, 2]}, "end of the last document is 2; allowed: 3"),
        ({"boundaries": [0, 4]}, "end of the last document is 4; allowed: 3"),
        ({"boundaries": [0, 2, 1, 3]}, "document 1 begins at sequence 2 and the next one at 1"),
        ({"boundaries": [0, -1, 3]}, "document 0 begins at sequence 0 and the next one at -1"),
        ({"boundaries": [0, 9, 3]}, "document 1 begins at sequence 9 and the next one at 3"),
        ({"boundaries": []}, "3 sequences and 0 document boundaries; allowed: 1 or more of each"),
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
    refused(tmp_path, rf"data\.idx: token type is {code} \(.*\); allowed: 1 \(uint8\), 3 \(int16\), 4 .*, 8 \(uint16\)")


def test_other_formats_are_refused(tmp_path):
    write(tmp_path)
    content = (tmp_path / "data.idx").read_bytes()
    (tmp_path / "data.idx").write_bytes(b"TNTIDX\x00\x00" + content[8:])  # the older format of both programs
    refused(tmp_path, r"begins with b'TNTIDX.*'; allowed: a Megatron \.idx")
    (tmp_path / "data.idx").write_bytes(content[:9] + struct.pack("<Q", 2) + content[17:])
    refused(tmp_path, r"data\.idx: version is 2; allowed: 1")


def test_nothing_but_empty_sequences(tmp_path):
    (tmp_path / "data.bin").write_bytes(b"")
    write_index(tmp_path / "data.idx", "uint16", [0, 0], [0, 1, 2])
    refused(tmp_path, "2 sequences without a token")
