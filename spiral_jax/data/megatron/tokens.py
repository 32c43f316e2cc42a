"""Megatron datasets, read in place: an index (`.idx`) and the tokens (`.bin`, in one file or in numbered parts)."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from spiral_jax.data.blob import Blob, JoinedBlobs, LocalBlob, Range, chunks, spread
from spiral_jax.data.megatron.files import find_index, find_tokens, is_megatron
from spiral_jax.data.megatron.index import HEADER_BYTES, MegatronIndex
from spiral_jax.data.storage import LOCAL, Storage
from spiral_jax.data.windows import TokenSource
from spiral_jax.errors import SpiralError

__all__ = ["MegatronTokens", "is_megatron"]

_MAX_ID = np.iinfo(np.int32).max
_ENTRIES_AT_ONCE = 2**21  # of the index
_BYTES_AT_ONCE = 2**25  # of the tokens


class MegatronTokens(TokenSource):
    """All sequences of a Megatron dataset as one stream of tokens.

    Attributes:
      dtype: type of a token in the files.
      num_documents: number of documents; of sequences where the index does not know documents.
      num_bytes: size of index and tokens: what `verify` reads.
    """

    def __init__(self, index: MegatronIndex, parts: Sequence[Blob], sequence_tokens: int | None):
        """Use `MegatronTokens.open`."""
        self.name = index.blob.name
        self.index = index
        self.dtype = index.dtype
        self.num_documents = index.num_documents
        self.parts = tuple(parts)
        self.sequence_tokens = sequence_tokens
        self._tokens = JoinedBlobs(f"{self.name[:-4]}.bin", parts)
        self.num_tokens = self._tokens.size // index.dtype.itemsize
        self.num_bytes = index.blob.size + self._tokens.size
        self.fingerprint = _fingerprint(index.blob, self._tokens)

    @classmethod
    def open(cls, place: str | os.PathLike, storage: Storage = LOCAL) -> "MegatronTokens":
        """Opens a dataset and checks it: all of the index on this machine, its ends and a sample of it elsewhere.

        Args:
          place: the `.idx`, the `.bin` or one of its parts, their path without the suffix, or a folder with one
            `.idx`. A URL where files cannot be listed (http) has to be that of one of the parts where there are parts,
            and in a folder there the index has to be called document.idx.
          storage: how to open files.

        Returns:
          The dataset. Elsewhere, `sequence_tokens` goes by the sample; `verify` reads all.

        Raises:
          SpiralError: names the file that is missing, truncated or not what it should be.
        """
        place = str(place)
        index = MegatronIndex.open(storage.open(find_index(place, storage)))
        tokens, missing = find_tokens(index.blob.name, place, storage)
        parts = [storage.open(part) for part in tokens]
        size = sum(part.size for part in parts)
        if size != index.num_bytes:
            found = tokens[0] if len(tokens) == 1 else f"{tokens[0]} to {tokens[-1]}"
            absent = f" ({missing} does not exist)" if missing else ""
            says = f"{index.num_bytes}, which {index.blob.name} says"
            raise SpiralError(f"{found} has {size} bytes{absent}; allowed: {says}")
        if not size:
            raise SpiralError(f"{index.blob.name} has {index.num_sequences} sequences without a token; allowed: tokens")

        def entries(total: int) -> Iterable[Range]:
            here = isinstance(index.blob, LocalBlob)
            return chunks(total, _ENTRIES_AT_ONCE) if here else spread(total, 16, 2048)

        same = index.check_sequences(entries(index.num_sequences))
        index.check_boundaries(entries(index.num_boundaries))
        if same is None or index.num_sequences < 2 or same * index.num_sequences * index.dtype.itemsize != size:
            same = None
        return cls(index, parts, same)

    def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """Returns tokens start to stop - 1 of each range, int32, not tied to the file.

        Raises:
          IndexError: not inside the dataset.
          SpiralError: the files have ids that int32 does not hold.
        """
        tokens = self._tokens.read_arrays(ranges, self.dtype)
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
        part, file_byte = self._tokens.place(byte)
        kind = "document" if self.index.has_documents else "sequence"
        return f"{part.name}: {kind} {document}, token {offset} of it (byte {file_byte} of the file)"

    def verify(
        self, vocab_size: int | None = None, progress: Callable[[int], None] = lambda num_bytes: None
    ) -> tuple[int, int]:
        """Reads everything: the whole index and the range of all ids.

        Args:
          vocab_size: ids have to be below it; None to allow all that int32 holds.
          progress: called with a number of bytes each time that these have been read.

        Returns:
          The smallest and the largest id.

        Raises:
          SpiralError: names the file that is damaged, or document and offset of the first id outside the vocabulary.
        """

        def entries(total: int, num_bytes: int) -> Iterator[Range]:
            for start, stop in chunks(total, _ENTRIES_AT_ONCE):
                yield start, stop
                progress((stop - start) * num_bytes)

        same = self.index.check_sequences(entries(self.index.num_sequences, 12))
        self.index.check_boundaries(entries(self.index.num_boundaries, 8))
        if self.sequence_tokens is not None and same != self.sequence_tokens:
            raise SpiralError(
                f"{self.name} has sequences that differ in length; allowed: {self.sequence_tokens}, as in the sample"
            )
        allowed = _MAX_ID if vocab_size is None else vocab_size - 1
        smallest, largest = _MAX_ID, 0
        for start, stop in chunks(self.num_tokens, _BYTES_AT_ONCE // self.dtype.itemsize):
            (tokens_N,) = self._tokens.read_arrays([(start, stop)], self.dtype)
            low, high = self._check_ids(start, tokens_N, allowed)
            smallest, largest = min(smallest, low), max(largest, high)
            progress(tokens_N.nbytes)
        return smallest, largest

    def _check_ids(self, position: int, tokens_N: np.ndarray, allowed: int) -> tuple[int, int]:
        low, high = int(tokens_N.min()), int(tokens_N.max())
        if low < 0 or high > allowed:
            first = int(np.argmax((tokens_N < 0) | (tokens_N > allowed)))
            raise SpiralError(f"{self.locate(position + first)} is id {tokens_N[first]}; allowed: 0 to {allowed}")
        return low, high


def _fingerprint(index: Blob, tokens: Blob) -> str:
    """Counts, sizes and 64 blocks of 4 KiB of each file: cheap at any size, and the same wherever the files are."""
    digest = hashlib.sha256(f"{index.size} {tokens.size} ".encode())
    digest.update(index.read(0, HEADER_BYTES))
    for blob in (index, tokens):
        for content in blob.read_many(spread(blob.size, 64, 4096)):
            digest.update(content)
    return digest.hexdigest()
