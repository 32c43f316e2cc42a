"""Megatron datasets, read in place: an index (`.idx`) and the tokens (`.bin`, in one file or in numbered parts)."""

import bisect
import hashlib
import itertools
import os
from collections.abc import Callable, Sequence

import numpy as np

from spiral_jax.data.blob import Blob, JoinedBlobs, LocalBlob
from spiral_jax.data.megatron.files import find_index, find_tokens, is_megatron
from spiral_jax.data.megatron.index import HEADER_BYTES, MegatronIndex, chunks, spread
from spiral_jax.data.storage import LOCAL, Storage
from spiral_jax.data.windows import TokenSource
from spiral_jax.errors import SpiralError

__all__ = ["MegatronTokens", "is_megatron"]

_MAX_ID = np.iinfo(np.int32).max


class MegatronTokens(TokenSource):
    """All sequences of a Megatron dataset as one stream of tokens."""

    def __init__(self, index: MegatronIndex, parts: Sequence[Blob], sequence_tokens: int | None):
        """Use `MegatronTokens.open`."""
        self.name = index.blob.name
        self.index = index
        self.parts = tuple(parts)
        self.sequence_tokens = sequence_tokens
        self._tokens = self.parts[0] if len(parts) == 1 else JoinedBlobs(f"{self.name[:-4]}.bin", parts)
        self.num_tokens = self._tokens.size // index.dtype.itemsize
        self.fingerprint = _fingerprint(index.blob, self._tokens)

    @classmethod
    def open(cls, place: str | os.PathLike, storage: Storage = LOCAL) -> "MegatronTokens":
        """Opens a dataset and checks it: all of the index on this machine, its ends and a sample of it elsewhere.

        Args:
          place: The `.idx`, the `.bin` or one of its parts, their path without the suffix, or a folder with one
            `.idx`. A URL where files cannot be listed (http) has to be that of one of the parts where there are parts,
            and in a folder there the index has to be called document.idx.
          storage: How to open files.

        Returns:
          The dataset. Elsewhere, `sequence_tokens` goes by the sample; `verify` reads all.

        Raises:
          SpiralError: Names the file that is missing, truncated or not what it should be.
        """
        place = str(place)
        index = MegatronIndex.open(storage.open(find_index(place, storage)))
        tokens, missing = find_tokens(index.blob.name, place, storage)
        parts = [storage.open(part) for part in tokens]
        size = sum(part.size for part in parts)
        if size != index.num_bytes:
            found = tokens[0] if len(tokens) == 1 else f"{tokens[0]} to {tokens[-1]}"
            absent = f" ({missing} does not exist)" if missing else ""
            raise SpiralError(
                f"{found}: {size} bytes{absent}; allowed: {index.num_bytes}, which {index.blob.name} says"
            )
        if not size:
            raise SpiralError(
                f"{index.blob.name}: {index.num_sequences} sequences without a token; allowed: some tokens"
            )
        here = isinstance(index.blob, LocalBlob)
        same = index.check_sequences(chunks(index.num_sequences) if here else spread(index.num_sequences, 16, 2048))
        index.check_boundaries(chunks(index.num_boundaries) if here else spread(index.num_boundaries, 16, 2048))
        if same is None or index.num_sequences < 2 or same * index.num_sequences * index.dtype.itemsize != size:
            same = None
        return cls(index, parts, same)

    @property
    def dtype(self) -> np.dtype:
        """Type of a token in the files."""
        return self.index.dtype

    @property
    def num_documents(self) -> int:
        """Number of documents; of sequences where the index does not know documents."""
        return self.index.num_documents

    @property
    def num_bytes(self) -> int:
        """Size of index and tokens, in bytes: what `verify` reads."""
        return self.index.blob.size + self._tokens.size

    def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """Returns tokens start to stop - 1 of each range, int32, not tied to the file.

        Raises:
          IndexError: Not inside the dataset.
          SpiralError: The files have ids that int32 does not hold.
        """
        for start, stop in ranges:
            if not 0 <= start <= stop <= self.num_tokens:
                raise IndexError(f"tokens {start}:{stop} of {self.name}, which has {self.num_tokens}")
        size = self.dtype.itemsize
        # Python's integers, because NumPy's int32 would overflow beyond 2**31 bytes.
        found = self._tokens.read_many([(int(start) * size, int(stop) * size) for start, stop in ranges])
        tokens = [np.frombuffer(content, self.dtype) for content in found]
        if self.dtype.itemsize > 4:
            for (start, stop), tokens_N in zip(ranges, tokens, strict=True):
                if start < stop:
                    self._check_ids(start, tokens_N, _MAX_ID)
        return [tokens_N.astype(np.int32) for tokens_N in tokens]

    def document_offsets(self, start: int, stop: int) -> np.ndarray:
        """Returns the positions at which documents start to stop - 1 begin, int64 [stop - start].

        Document `num_documents`, after the last one, begins at `num_tokens`.
        """
        first_D = self.index.first_sequences(start, stop)
        begin, end = int(first_D[0]), int(first_D[-1]) + 1
        pointers_S = self.index.pointers(begin, min(end, self.index.num_sequences))
        if end > self.index.num_sequences:
            pointers_S = np.append(pointers_S, self._tokens.size)
        return pointers_S[first_D - begin] // self.dtype.itemsize

    def locate(self, position: int) -> str:
        byte = int(position) * self.dtype.itemsize
        document = self.index.document_of(self.index.sequence_at(byte))
        offset = position - int(self.document_offsets(document, document + 1)[0])
        starts = list(itertools.accumulate((part.size for part in self.parts[:-1]), initial=0))
        part = bisect.bisect_right(starts, byte) - 1
        kind = "document" if self.index.has_documents else "sequence"
        file_byte = byte - starts[part]
        return f"{self.parts[part].name}: {kind} {document}, token {offset} of it (byte {file_byte} of the file)"

    def verify(
        self, vocab_size: int = _MAX_ID + 1, progress: Callable[[int], None] = lambda num_bytes: None
    ) -> tuple[int, int]:
        """Reads everything: the whole index and the range of all ids.

        Args:
          vocab_size: Ids have to be below it.
          progress: Called with a number of bytes each time that these have been read.

        Returns:
          The smallest and the largest id.

        Raises:
          SpiralError: Names the file that is damaged, or document and offset of the first id outside the vocabulary.
        """

        def reported(pieces, num_bytes):
            for start, stop in pieces:
                yield start, stop
                progress((stop - start) * num_bytes)

        same = self.index.check_sequences(reported(chunks(self.index.num_sequences), 12))
        self.index.check_boundaries(reported(chunks(self.index.num_boundaries), 8))
        if self.sequence_tokens is not None and same != self.sequence_tokens:
            raise SpiralError(
                f"{self.name}: sequences differ in length; allowed: {self.sequence_tokens}, as in the sample"
            )
        smallest, largest = _MAX_ID, 0
        for start, stop in chunks(self.num_tokens, 2**25 // self.dtype.itemsize):
            content = self._tokens.read(start * self.dtype.itemsize, stop * self.dtype.itemsize)
            low, high = self._check_ids(start, np.frombuffer(content, self.dtype), vocab_size - 1)
            smallest, largest = min(smallest, low), max(largest, high)
            progress(len(content))
        return smallest, largest

    def _check_ids(self, position: int, tokens_N: np.ndarray, allowed: int) -> tuple[int, int]:
        low, high = int(tokens_N.min()), int(tokens_N.max())
        if low < 0 or high > allowed:
            first = int(((tokens_N < 0) | (tokens_N > allowed)).argmax())
            raise SpiralError(f"{self.locate(position + first)}: id {tokens_N[first]}; allowed: 0 to {allowed}")
        return low, high


def _fingerprint(index: Blob, tokens: Blob) -> str:
    """Counts, sizes and 64 blocks of 4 KiB of each file: cheap at any size, and the same wherever the files are."""
    digest = hashlib.sha256(f"{index.size} {tokens.size} ".encode())
    digest.update(index.read(0, HEADER_BYTES))
    for blob in (index, tokens):
        for content in blob.read_many(spread(blob.size, 64, 4096)):
            digest.update(content)
    return digest.hexdigest()
