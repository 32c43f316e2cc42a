"""Megatron datasets as a writer of our own, made from the format's description, writes them."""

import struct

import numpy as np
import pytest

from spiral_jax.data.megatron.tokens import MegatronTokens
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


def preshuffled(folder, sequences=10, length=9):
    """Like the preshuffled Pile: sequences of one length, and 0 as the only document boundary."""
    tokens = np.arange(sequences * length, dtype="<u2")
    tokens.tofile(folder / "document.bin")
    write_index(folder / "document.idx", "uint16", [length] * sequences, [0])
    assert (folder / "document.idx").stat().st_size == HEADER + 12 * sequences + 8
    return tokens
