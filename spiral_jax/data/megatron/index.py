"""The index of a Megatron dataset, an `.idx` file: where its sequences and documents begin.

Little-endian, without padding:

    9 bytes      "MMIDIDX" and two zero bytes
    uint64       version: 1
    uint8        type of a token: 1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, 6 and 7 floats, 8 uint16
    uint64       number of sequences, S
    uint64       number of document boundaries, D
    int32 [S]    tokens of each sequence
    int64 [S]    byte of the tokens at which it begins
    int64 [D]    document boundaries: the sequences at which documents begin, and S

Sources: `megatron/core/datasets/indexed_dataset.py` and `tools/preprocess_data.py` of NVIDIA/Megatron-LM,
`megatron/data/indexed_dataset.py` and `tools/datasets/preprocess_data.py` of EleutherAI/gpt-neox,
`utils/mmap_dataset.py` of EleutherAI/pythia and `MegatronTokenizedFile` of huggingface/datatrove. What they write:

  * Every one of them computes the beginnings as the running sum of the sizes: sequences leave no gaps, and that is
    what makes the tokens one stream. A file where they do is refused.
  * Sequences and documents may be empty (a text without tokens).
  * Boundaries start with 0 and each end of a document appends S so far. Data written without ends of documents has
    the single boundary 0, and the preshuffled Pile of Pythia is such data: 146,432,000 sequences of 2049 tokens and
    an index of 34 + 12 * 146,432,000 + 8 bytes. There each sequence counts as a document here.
  * megatron-core appends int8 [S] "modes" for multimodal data, without a mark in the header. Refused: not only text.
"""

import bisect
import dataclasses
import struct
from collections.abc import Iterable

import numpy as np

from spiral_jax.data.blob import Blob, Range
from spiral_jax.errors import SpiralError, require

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
HEADER_BYTES = _HEADER.size
_DTYPES = {code: np.dtype(kind) for code, kind in ((1, "u1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2"))}
_REFUSED = {2: "int8, too small for token ids", 6: "floats", 7: "floats"}
_SIZE, _POINTER = np.dtype("<i4"), np.dtype("<i8")


@dataclasses.dataclass(frozen=True)
class MegatronIndex:
    """An `.idx` file opened for reading by ranges; S sequences.

    Attributes:
      blob: the file.
      dtype: type of a token.
      num_sequences: number of sequences, S.
      num_boundaries: number of document boundaries.
    """

    blob: Blob
    dtype: np.dtype
    num_sequences: int
    num_boundaries: int

    @classmethod
    def open(cls, blob: Blob) -> "MegatronIndex":
        """Reads the header and checks that the file has the size that its counts give.

        `check_sequences` and `check_boundaries` look at its content.

        Raises:
          SpiralError: not a Megatron index, a damaged one, or one of something else than token ids.
        """
        name = blob.name
        if blob.size < HEADER_BYTES:
            raise SpiralError(f"{name} has {blob.size} bytes; allowed: a Megatron .idx, {HEADER_BYTES} bytes or more")
        magic, version, code, num_sequences, num_boundaries = _HEADER.unpack(bytes(blob.read(0, HEADER_BYTES)))
        if magic != _MAGIC:
            raise SpiralError(f"{name} begins with {magic!r}; allowed: a Megatron .idx, which begins with {_MAGIC!r}")
        require(version == _VERSION, f"{name}: version", version, str(_VERSION))
        if code not in _DTYPES:
            allowed = ", ".join(f"{known} ({dtype.name})" for known, dtype in _DTYPES.items())
            raise SpiralError(f"{name}: token type is {code} ({_REFUSED.get(code, 'unknown')}); allowed: {allowed}")
        counts = f"{num_sequences} sequences and {num_boundaries} document boundaries"
        if not num_sequences or not num_boundaries:
            raise SpiralError(f"{name} has {counts}; allowed: 1 or more of each")
        size = HEADER_BYTES + num_sequences * (_SIZE.itemsize + _POINTER.itemsize) + num_boundaries * _POINTER.itemsize
        if blob.size != size:
            modes = " (multimodal: the rest is a mode per sequence)" if blob.size == size + num_sequences else ""
            raise SpiralError(f"{name} has {blob.size} bytes{modes}; allowed: {size}, for {counts}")
        return cls(blob, _DTYPES[code], num_sequences, num_boundaries)

    @property
    def num_documents(self) -> int:
        """Number of documents; of sequences where no ends of documents were written."""
        return self.num_boundaries - 1 if self.has_documents else self.num_sequences

    @property
    def has_documents(self) -> bool:
        """Whether the file knows which sequences form a document."""
        return self.num_boundaries > 1

    @property
    def num_bytes(self) -> int:
        """Size of the tokens, in bytes: where the last sequence ends."""
        sizes_S, pointers_S = self._sequences(self.num_sequences - 1, self.num_sequences)
        return int(pointers_S[0]) + int(sizes_S[0]) * self.dtype.itemsize

    def pointers(self, start: int, stop: int) -> np.ndarray:
        """Returns the byte at which each of the sequences start to stop - 1 begins, int64 [stop - start]."""
        begin = HEADER_BYTES + self.num_sequences * _SIZE.itemsize
        return self._read(begin, _POINTER, start, stop)

    def first_sequences(self, start: int, stop: int) -> np.ndarray:
        """Returns the sequences at which documents start to stop - 1 begin, int64 [stop - start].

        Document `num_documents`, after the last one, begins at sequence S.
        """
        if not self.has_documents:
            return np.arange(start, stop)
        return self._boundaries(start, stop)

    def sequence_at(self, byte: int) -> int:
        """Returns the sequence to which a byte of the tokens belongs, in some 30 reads of 8 bytes."""
        return bisect.bisect_right(range(self.num_sequences), byte, key=lambda i: self.pointers(i, i + 1)[0]) - 1

    def document_of(self, sequence: int) -> int:
        """Returns the document to which a sequence belongs."""
        if not self.has_documents:
            return sequence
        boundaries = range(self.num_boundaries)
        return bisect.bisect_right(boundaries, sequence, key=lambda i: self.first_sequences(i, i + 1)[0]) - 1

    def check_sequences(self, ranges: Iterable[Range]) -> int | None:
        """Checks that each sequence of some ranges begins where the one before ends, the very first at 0.

        Args:
          ranges: of sequences. Those that follow each other and cover all prove it for the whole file.

        Returns:
          The number of tokens that each of these sequences has, or None where they differ.

        Raises:
          SpiralError: they do not, or a size is negative.
        """
        smallest, largest = np.iinfo(_SIZE).max, 0
        for begin, stop in ranges:
            # One more, to see that the last one ends where the next begins.
            sizes_S, pointers_S = self._sequences(begin, min(stop + 1, self.num_sequences))
            if stop == self.num_sequences:
                pointers_S = np.append(pointers_S, self.num_bytes)
            sizes_S = sizes_S[: stop - begin]
            wrong_S = (sizes_S < 0) | (np.diff(pointers_S) != sizes_S.astype(np.int64) * self.dtype.itemsize)
            if begin == 0 and pointers_S[0] != 0:
                wrong_S[0] = True
            if wrong_S.any():
                first = int(wrong_S.argmax())
                raise SpiralError(
                    f"{self.blob.name}: sequence {begin + first} has {sizes_S[first]} tokens from byte "
                    f"{pointers_S[first]} on, the next one begins at byte {pointers_S[first + 1]}; allowed: sequences "
                    f"of 0 or more tokens of {self.dtype.itemsize} bytes that follow each other from byte 0 on"
                )
            smallest, largest = min(smallest, int(sizes_S.min())), max(largest, int(sizes_S.max()))
        return largest if smallest == largest else None

    def check_boundaries(self, ranges: Iterable[Range]) -> None:
        """Checks that the first boundary is 0, the last S, and those of some ranges do not fall.

        Args:
          ranges: of boundaries. Those that follow each other and cover all prove it for the whole file.

        Raises:
          SpiralError: it is not so.
        """
        last = self.num_boundaries - 1
        first_sequence = int(self._boundaries(0, 1)[0])
        require(first_sequence == 0, f"{self.blob.name}: begin of the first document", first_sequence, "sequence 0")
        if not self.has_documents:
            return
        after_last = int(self._boundaries(last, last + 1)[0])
        allowed = f"{self.num_sequences}, the number of sequences"
        require(after_last == self.num_sequences, f"{self.blob.name}: end of the last document", after_last, allowed)
        for start, stop in ranges:
            boundaries_D = self._boundaries(start, min(stop + 1, self.num_boundaries))
            falling_D = boundaries_D[1:] < boundaries_D[:-1]
            if falling_D.any():
                first = int(np.argmax(falling_D))
                raise SpiralError(
                    f"{self.blob.name}: document {start + first} begins at sequence {boundaries_D[first]} and the next "
                    f"one at {boundaries_D[first + 1]}; allowed: boundaries that do not fall"
                )

    def _sequences(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        return self._read(HEADER_BYTES, _SIZE, start, stop), self.pointers(start, stop)

    def _boundaries(self, start: int, stop: int) -> np.ndarray:
        begin = HEADER_BYTES + self.num_sequences * (_SIZE.itemsize + _POINTER.itemsize)
        return self._read(begin, _POINTER, start, stop)

    def _read(self, begin: int, dtype: np.dtype, start: int, stop: int) -> np.ndarray:
        content = self.blob.read(begin + start * dtype.itemsize, begin + stop * dtype.itemsize)
        return np.frombuffer(content, dtype)
