"""The token store: a folder with all tokens of a corpus in one flat file.

    tokens.bin      the documents one after the other, each followed by the separator; little-endian uint16 or uint32
    documents.bin   little-endian uint64: where each document starts, and the end of the last one
    manifest.json   what is in the two files, how they came about, and their checksums

`data.store_writer` writes it under another name and renames it when complete: a folder with the store's name is
whole.
"""

import dataclasses
import functools
import hashlib
import json
import os
import typing
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from spiral_jax.data.blob import Blob, chunks
from spiral_jax.data.checksums import BLOCK_BYTES, are_blocks, check_blocks, sampled
from spiral_jax.data.storage import LOCAL, Storage, join
from spiral_jax.data.tokenizers import Tokenizer
from spiral_jax.data.windows import TokenSource
from spiral_jax.errors import SpiralError, require

_FORMAT = "spiral_jax.token_store"
_VERSION = 1
TOKENS = "tokens.bin"
DOCUMENTS = "documents.bin"
MANIFEST = "manifest.json"
_PREFIXES = {TOKENS: "tokens", DOCUMENTS: "documents"}  # of the manifest's fields about a file
_MANIFEST_BYTES = 2**27  # enough for the checksums of 16 TiB
OFFSET_DTYPE = np.dtype("<u8")
_READ_AT_ONCE = 2**25  # bytes


def token_dtype(vocab_size: int) -> np.dtype:
    """Returns the smallest little-endian type that holds all ids of a vocabulary."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says of a store.

    Attributes:
      dtype: type of a token in `tokens.bin`, in NumPy's spelling: "<u2" or "<u4".
      num_tokens: number of tokens, separators included.
      num_documents: number of documents.
      utf8_bytes: bytes of the text before it was tokenised: the denominator of bits per byte.
      vocab_size: number of ids of the tokenizer.
      separator_id: id that follows each document.
      max_token_id: largest id in the store.
      tokenizer_fingerprint: `Tokenizer.fingerprint` of the tokenizer that wrote the store.
      source: fingerprint of the input, to know when the store can be used again; "" if unknown.
      tokens_sha256: checksum of `tokens.bin`.
      documents_sha256: checksum of `documents.bin`.
      tokens_blocks: `Checksums.blocks` of `tokens.bin`; "" in stores that were written before there were any.
      documents_blocks: those of `documents.bin`.
    """

    dtype: str
    num_tokens: int
    num_documents: int
    utf8_bytes: int
    vocab_size: int
    separator_id: int
    max_token_id: int
    tokenizer_fingerprint: str
    source: str
    tokens_sha256: str
    documents_sha256: str
    tokens_blocks: str = ""
    documents_blocks: str = ""

    @property
    def file_sizes(self) -> dict[str, int]:
        """Bytes of each data file."""
        return {
            TOKENS: self.num_tokens * np.dtype(self.dtype).itemsize,
            DOCUMENTS: (self.num_documents + 1) * OFFSET_DTYPE.itemsize,
        }

    @property
    def checksums(self) -> list[tuple[str, str, str]]:
        """Name, SHA-256 and `Checksums.blocks` of each data file."""
        return [
            (TOKENS, self.tokens_sha256, self.tokens_blocks),
            (DOCUMENTS, self.documents_sha256, self.documents_blocks),
        ]

    def to_json(self) -> str:
        """Returns the content of `manifest.json`."""
        files: dict[str, dict[str, int | str]] = {}
        for name, sha256, blocks in self.checksums:
            files[name] = {"bytes": self.file_sizes[name], "sha256": sha256}
            if blocks:
                files[name] |= {"block_bytes": BLOCK_BYTES, "crc32_of_blocks": blocks}
        apart = ("_sha256", "_blocks")
        fields = {key: value for key, value in dataclasses.asdict(self).items() if not key.endswith(apart)}
        return json.dumps({"format": _FORMAT, "version": _VERSION, **fields, "files": files}, indent=2) + "\n"

    @classmethod
    def parse(cls, text: bytes, path: str) -> "Manifest":
        """Reads and checks the content of a `manifest.json` that was found at `path`.

        Raises:
          SpiralError: not JSON, another format or version, or contradicting itself.
        """
        try:
            content = json.loads(text.decode("utf-8"))
        except (ValueError, RecursionError) as error:  # also UnicodeDecodeError
            raise SpiralError(f"{path} is damaged (no JSON: {error})") from error
        content = content if isinstance(content, dict) else {}
        require(content.get("format") == _FORMAT, f"{path}: format", content.get("format"), repr(_FORMAT))
        require(content.get("version") == _VERSION, f"{path}: version", content.get("version"), str(_VERSION))
        try:
            for name, prefix in _PREFIXES.items():
                file = content["files"][name]
                content[f"{prefix}_sha256"], content[f"{prefix}_blocks"] = (
                    file["sha256"],
                    file.get("crc32_of_blocks", ""),
                )
                if file.get("block_bytes", BLOCK_BYTES) != BLOCK_BYTES:
                    raise ValueError(f"{name} has blocks of {file['block_bytes']} bytes")
            kinds = typing.get_type_hints(cls)
            for name, kind in kinds.items():
                if type(content[name]) is not kind:
                    raise TypeError(f"{name} is {content[name]!r}; allowed: {kind.__name__}")
            manifest = cls(**{name: content[name] for name in kinds})
            if manifest.dtype != token_dtype(manifest.vocab_size).str:
                raise ValueError(f"dtype {manifest.dtype!r} does not go with vocab_size {manifest.vocab_size}")
            if not 0 <= max(manifest.max_token_id, manifest.separator_id) < manifest.vocab_size:
                raise ValueError(f"max_token_id {manifest.max_token_id}, vocab_size {manifest.vocab_size}")
            if not 1 <= manifest.num_documents <= manifest.num_tokens:
                raise ValueError(f"{manifest.num_documents} documents, {manifest.num_tokens} tokens")
            if manifest.utf8_bytes < 1:
                raise ValueError(f"{manifest.utf8_bytes} bytes of text")
            for name, size in manifest.file_sizes.items():
                blocks = content[f"{_PREFIXES[name]}_blocks"]
                if blocks and not are_blocks(blocks, size):
                    raise ValueError(f"{name} has other checksums of blocks than its size has")
                if content["files"][name]["bytes"] != size:
                    raise ValueError(f"{name} of {content['files'][name]['bytes']} bytes, the counts say {size}")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise SpiralError(f"{path} is damaged ({type(error).__name__}: {str(error)[:300]})") from error
        return manifest


class TokenStore(TokenSource):
    """A store opened for reading: memory-mapped where it is a folder of this machine, by range reads elsewhere.

    Attributes:
      manifest: what its `manifest.json` says.
      num_documents: number of documents.
      utf8_bytes: bytes of the text before it was tokenised.
    """

    def __init__(self, folder: str, manifest: Manifest, tokens: Blob, documents: Blob):
        """Use `TokenStore.open`."""
        self.folder = self.name = folder
        self.manifest = manifest
        self.num_tokens = manifest.num_tokens
        self.num_documents = manifest.num_documents
        self.utf8_bytes = manifest.utf8_bytes
        self.fingerprint = manifest.tokens_sha256
        self._tokens = tokens
        self._documents = documents
        self._dtype = np.dtype(manifest.dtype)

    @classmethod
    def open(cls, folder: str | os.PathLike, storage: Storage = LOCAL) -> "TokenStore":
        """Opens a store, a path or URL, and checks the sizes of its files and a sample of their content.

        Of each file the first and the last block are compared with their checksums, and some between that its own
        checksum chooses; `verify` compares all.

        Raises:
          SpiralError: names the file that is missing, truncated or not what it should be.
        """
        folder = str(folder)
        path = join(folder, MANIFEST)
        if not storage.exists(path):
            raise SpiralError(f"{path} does not exist; allowed: a folder with a complete token store")
        manifest = Manifest.parse(storage.read_file(path, _MANIFEST_BYTES), path)
        blobs = {}
        for name, size in manifest.file_sizes.items():
            blob = blobs[name] = storage.open(join(folder, name))
            if blob.size != size:
                raise SpiralError(f"{blob.name} has {blob.size} bytes; allowed: {size}, as {MANIFEST} says")
        for name, sha256, blocks in manifest.checksums:
            if blocks:
                check_blocks(blobs[name], blocks, sampled(blocks, sha256))
        return cls(folder, manifest, blobs[TOKENS], blobs[DOCUMENTS])

    @functools.cached_property
    def document_offsets_M(self) -> np.ndarray:
        """Where each document starts, and the end of the last one, uint64 [num_documents + 1]; mapped, or fetched."""
        return np.frombuffer(self._documents.read(0, self._documents.size), OFFSET_DTYPE)

    def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """Returns tokens start to stop - 1 of each range, int32, not tied to the file.

        Raises:
          IndexError: not inside the store.
        """
        return [tokens_N.astype(np.int32) for tokens_N in self._tokens.read_arrays(ranges, self._dtype)]

    def locate(self, position: int) -> str:
        document = int(np.searchsorted(self.document_offsets_M, position, "right")) - 1
        offset = position - int(self.document_offsets_M[document])
        byte = position * self._dtype.itemsize
        return f"{self._tokens.name}: document {document}, token {offset} of it (byte {byte} of the file)"

    def verify(self, progress: Callable[[int], None] = lambda num_bytes: None) -> None:
        """Reads everything: checksums, document boundaries, separators, range of the ids.

        Args:
          progress: called with a number of bytes each time that these have been read, of `manifest.file_sizes` in all.

        Raises:
          SpiralError: names the file that is damaged; file, document and offset of an id outside the vocabulary.
        """
        for _ in _verified(self._documents, self.manifest.documents_sha256, progress):
            pass
        offsets_M = self.document_offsets_M.astype(np.int64)
        if offsets_M[0] != 0 or offsets_M[-1] != self.num_tokens or np.any(np.diff(offsets_M) < 1):
            raise SpiralError(f"{self._documents.name} is damaged (offsets do not rise from 0 to {self.num_tokens})")
        largest, begin, ends_M, wrong = -1, 0, offsets_M[1:] - 1, ""
        for content in _verified(self._tokens, self.manifest.tokens_sha256, progress):
            tokens_N = np.frombuffer(content, self._dtype)
            largest = max(largest, int(tokens_N.max()))
            first, last = np.searchsorted(ends_M, [begin, begin + len(tokens_N)])
            separators_M = tokens_N[ends_M[first:last] - begin]
            if largest >= self.manifest.vocab_size and not wrong:
                position = int(np.argmax(tokens_N >= self.manifest.vocab_size))
                wrong = f"{self.locate(begin + position)} is id {tokens_N[position]}"
                wrong += f"; allowed: 0 to {self.manifest.vocab_size - 1}"
            if np.any(separators_M != self.manifest.separator_id) and not wrong:
                document = int(first + (separators_M != self.manifest.separator_id).argmax())
                wrong = f"{self._documents.name} is damaged (document {document} does not end with the separator)"
            begin += len(tokens_N)
        # The file is what was written; wrong content means that the writer was wrong.
        if wrong:
            raise SpiralError(wrong)
        allowed = f"{self.manifest.max_token_id}, as {MANIFEST} says"
        require(largest == self.manifest.max_token_id, f"{self._tokens.name}: largest id", largest, allowed)

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Checks that a tokenizer is the one that wrote the store.

        Raises:
          SpiralError: it is another one.
        """
        if tokenizer.fingerprint != self.manifest.tokenizer_fingerprint:
            raise SpiralError(
                f"data.tokenizer has fingerprint {tokenizer.fingerprint}; allowed: the tokenizer that wrote "
                f"{self.name}, with fingerprint {self.manifest.tokenizer_fingerprint}"
            )

    def check_vocab_size(self, vocab_size: int) -> None:
        """Checks that a model of this vocabulary has an embedding for every id.

        Raises:
          SpiralError: the model's vocabulary is too small.
        """
        needed, largest = self.manifest.vocab_size, self.manifest.max_token_id
        allowed = f"{needed} or more, the ids of the tokenizer of {self.name} (largest id used: {largest})"
        require(vocab_size >= needed, "model.vocab_size", vocab_size, allowed)


def _verified(blob: Blob, sha256: str, progress: Callable[[int], None]) -> Iterator[bytes | memoryview]:
    """Yields all content, then raises a SpiralError if its checksum is another one."""
    digest = hashlib.sha256()
    for start, stop in chunks(blob.size, _READ_AT_ONCE):
        content = blob.read(start, stop)
        digest.update(content)
        yield content
        progress(len(content))
    require(digest.hexdigest() == sha256, f"{blob.name}: SHA-256", digest.hexdigest(), f"{sha256}, as {MANIFEST} says")
