"""The token store: a folder with all tokens of a corpus in one flat file.

    tokens.bin      the documents one after the other, each followed by the separator; little-endian uint16 or uint32
    documents.bin   little-endian uint64: where each document starts, and the end of the last one
    manifest.json   what is in the two files, how they came about, and their checksums

A store is written under another name and renamed when it is complete, so a folder with the store's name is whole.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from spiral_jax.data.tokenizers import Tokenizer
from spiral_jax.errors import SpiralError

_FORMAT = "spiral_jax.token_store"
_VERSION = 1
_TOKENS = "tokens.bin"
_DOCUMENTS = "documents.bin"
_MANIFEST = "manifest.json"
_OFFSET_DTYPE = np.dtype("<u8")


def token_dtype(vocab_size: int) -> np.dtype:
    """Returns the smallest little-endian type that holds all ids of a vocabulary."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says of a store.

    Attributes:
      dtype: Type of a token in `tokens.bin`, in NumPy's spelling: "<u2" or "<u4".
      num_tokens: Number of tokens, separators included.
      num_documents: Number of documents.
      utf8_bytes: Bytes of the text before it was tokenised: the denominator of bits per byte.
      vocab_size: Number of ids of the tokenizer.
      separator_id: Id that follows each document.
      max_token_id: Largest id in the store.
      tokenizer_fingerprint: `Tokenizer.fingerprint` of the tokenizer that wrote the store.
      source: Fingerprint of the input, to know when the store can be used again; "" if unknown.
      tokens_sha256: Checksum of `tokens.bin`.
      documents_sha256: Checksum of `documents.bin`.
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

    @property
    def file_sizes(self) -> dict[str, int]:
        """Bytes of each data file."""
        return {
            _TOKENS: self.num_tokens * np.dtype(self.dtype).itemsize,
            _DOCUMENTS: (self.num_documents + 1) * _OFFSET_DTYPE.itemsize,
        }

    def to_json(self) -> str:
        """Returns the content of `manifest.json`."""
        files = {
            _TOKENS: {"bytes": self.file_sizes[_TOKENS], "sha256": self.tokens_sha256},
            _DOCUMENTS: {"bytes": self.file_sizes[_DOCUMENTS], "sha256": self.documents_sha256},
        }
        fields = {key: value for key, value in dataclasses.asdict(self).items() if not key.endswith("_sha256")}
        return json.dumps({"format": _FORMAT, "version": _VERSION, **fields, "files": files}, indent=2) + "\n"

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Reads and checks a `manifest.json`.

        Args:
          path: The file.

        Returns:
          The manifest.

        Raises:
          SpiralError: Missing, not JSON, another format or version, or contradicting itself.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise SpiralError(f"{path}: does not exist; allowed: a folder with a complete token store") from error
        except OSError as error:
            raise SpiralError(f"{path}: cannot be read ({error.strerror})") from error
        except ValueError as error:  # also UnicodeDecodeError
            raise SpiralError(f"{path}: is not JSON ({error})") from error
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            found = content.get("format") if isinstance(content, dict) else type(content).__name__
            raise SpiralError(f"{path}: format {found!r}, allowed: {_FORMAT!r}")
        if content.get("version") != _VERSION:
            raise SpiralError(f"{path}: version {content.get('version')!r}, allowed: {_VERSION}")
        try:
            content["tokens_sha256"] = content["files"][_TOKENS]["sha256"]
            content["documents_sha256"] = content["files"][_DOCUMENTS]["sha256"]
            for field in dataclasses.fields(cls):
                if type(content[field.name]) is not field.type:
                    raise TypeError(f"{field.name} is {content[field.name]!r}, allowed: {field.type.__name__}")
            manifest = cls(**{field.name: content[field.name] for field in dataclasses.fields(cls)})
            if manifest.dtype != token_dtype(manifest.vocab_size).str:
                raise ValueError(f"dtype {manifest.dtype!r} does not go with vocab_size {manifest.vocab_size}")
            if not 0 <= max(manifest.max_token_id, manifest.separator_id) < manifest.vocab_size:
                raise ValueError(f"max_token_id {manifest.max_token_id}, vocab_size {manifest.vocab_size}")
            if not 1 <= manifest.num_documents <= manifest.num_tokens:
                raise ValueError(f"{manifest.num_documents} documents, {manifest.num_tokens} tokens")
            for name, size in manifest.file_sizes.items():
                if content["files"][name]["bytes"] != size:
                    raise ValueError(f"{name} of {content['files'][name]['bytes']} bytes, the counts say {size}")
        except (ValueError, TypeError, KeyError) as error:
            raise SpiralError(f"{path}: is damaged ({type(error).__name__}: {error})") from error
        return manifest


class TokenStore:
    """A store opened for reading, memory-mapped. Reads are safe from many threads."""

    def __init__(self, folder: Path, manifest: Manifest, tokens_N: np.ndarray, document_offsets_M: np.ndarray):
        """Use `TokenStore.open`."""
        self.folder = folder
        self.manifest = manifest
        self.tokens_N = tokens_N
        self.document_offsets_M = document_offsets_M

    @classmethod
    def open(cls, folder: str | os.PathLike) -> "TokenStore":
        """Opens a store and checks that its files have the sizes that its manifest gives (checksums: `verify`).

        Args:
          folder: The store.

        Returns:
          The store, with `tokens_N` [num_tokens] and `document_offsets_M` [num_documents + 1] mapped read-only.

        Raises:
          SpiralError: Names the file that is missing, truncated or not what it should be.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise SpiralError(f"{folder}: does not exist; allowed: a folder with a token store")
        manifest = Manifest.read(folder / _MANIFEST)
        for name, size in manifest.file_sizes.items():
            path = folder / name
            if not path.is_file():
                raise SpiralError(f"{path}: does not exist, but {_MANIFEST} lists it")
            if path.stat().st_size != size:
                raise SpiralError(f"{path}: has {path.stat().st_size} bytes, {_MANIFEST} says {size}")
        try:
            # As plain arrays: slices of np.memmap are slow to make and drag the type along.
            tokens_N = np.asarray(np.memmap(folder / _TOKENS, dtype=manifest.dtype, mode="r"))
            document_offsets_M = np.asarray(np.memmap(folder / _DOCUMENTS, dtype=_OFFSET_DTYPE, mode="r"))
        except OSError as error:
            raise SpiralError(f"{folder}: cannot be read ({error.strerror})") from error
        return cls(folder, manifest, tokens_N, document_offsets_M)

    @property
    def name(self) -> str:
        """What to call the store in messages: its folder."""
        return str(self.folder)

    @property
    def num_tokens(self) -> int:
        """Number of tokens, separators included."""
        return self.manifest.num_tokens

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return self.manifest.num_documents

    @property
    def utf8_bytes(self) -> int:
        """Bytes of the text before it was tokenised."""
        return self.manifest.utf8_bytes

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns tokens start to stop - 1, int32 [stop - start], not tied to the mapped file.

        Raises:
          IndexError: Not inside the store.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start}:{stop} of {self.name}, which has {self.num_tokens}")
        return self.tokens_N[start:stop].astype(np.int32)

    def verify(self) -> None:
        """Reads everything: checksums, document boundaries, range of the ids.

        Raises:
          SpiralError: Names the file that is damaged.
        """
        expected = {_TOKENS: self.manifest.tokens_sha256, _DOCUMENTS: self.manifest.documents_sha256}
        for name, digest in expected.items():
            path = self.folder / name
            with open(path, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != digest:
                raise SpiralError(f"{path}: SHA-256 is {found}, {_MANIFEST} says {digest}")
        # From here on the files are what was written; wrong content means that the writer was wrong.
        offsets_M = self.document_offsets_M.astype(np.int64)
        if offsets_M[0] != 0 or offsets_M[-1] != self.num_tokens or np.any(np.diff(offsets_M) < 1):
            raise SpiralError(f"{self.folder / _DOCUMENTS}: offsets do not rise from 0 to {self.num_tokens}")
        if np.any(self.tokens_N[offsets_M[1:] - 1] != self.manifest.separator_id):
            raise SpiralError(f"{self.folder / _DOCUMENTS}: a document does not end with the separator")
        block = 2**24
        largest = max(int(self.tokens_N[i : i + block].max()) for i in range(0, self.num_tokens, block))
        if largest != self.manifest.max_token_id:
            raise SpiralError(
                f"{self.folder / _TOKENS}: largest id is {largest}, {_MANIFEST} says {self.manifest.max_token_id}"
            )

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Checks that a tokenizer is the one that wrote the store.

        Raises:
          SpiralError: It is another one.
        """
        if tokenizer.fingerprint != self.manifest.tokenizer_fingerprint:
            raise SpiralError(
                f"data.tokenizer: fingerprint {tokenizer.fingerprint}, but {self.name} was written with "
                f"{self.manifest.tokenizer_fingerprint}; allowed: the tokenizer that wrote the store"
            )

    def check_vocab_size(self, vocab_size: int) -> None:
        """Checks that a model has an embedding for every id.

        Args:
          vocab_size: The model's.

        Raises:
          SpiralError: The model's vocabulary is too small.
        """
        if vocab_size < self.manifest.vocab_size:
            raise SpiralError(
                f"model.vocab_size: found {vocab_size}, but the tokenizer of {self.name} has "
                f"{self.manifest.vocab_size} ids (largest id used: {self.manifest.max_token_id}); "
                f"allowed: at least {self.manifest.vocab_size}"
            )


class StoreWriter:
    """Writes a store document by document; it appears under its name when it is complete, or not at all.

    with StoreWriter(folder, tokenizer) as writer:
        writer.add(tokenizer.encode(text), utf8_bytes=len(text.encode()))

    Leaving the block completes the store; leaving it by an exception removes what was written. One writer per folder
    at a time. A store that is already there is replaced at the end.
    """

    def __init__(self, folder: str | os.PathLike, tokenizer: Tokenizer, *, source: str = ""):
        """Starts a store.

        Args:
          folder: Where the store is to be; its parents are made.
          tokenizer: What makes the ids.
          source: Fingerprint of the input.

        Raises:
          SpiralError: The folder cannot be written.
        """
        self._folder = Path(folder)
        self._partial = self._folder.with_name(f".{self._folder.name}.partial")
        self._tokenizer = tokenizer
        self._source = source
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._num_tokens = self._num_documents = self._utf8_bytes = 0
        self._max_token_id = tokenizer.separator_id
        self._files = contextlib.ExitStack()
        with _errors_of_writing(self._folder):
            self._folder.parent.mkdir(parents=True, exist_ok=True)
            if self._partial.exists():  # a run that was killed
                shutil.rmtree(self._partial)
            self._partial.mkdir()
            self._tokens = self._files.enter_context(_HashedFile(self._partial / _TOKENS))
            self._documents = self._files.enter_context(_HashedFile(self._partial / _DOCUMENTS))
            self._documents.write(np.zeros(1, _OFFSET_DTYPE).tobytes())

    @property
    def num_documents(self) -> int:
        """Documents added so far."""
        return self._num_documents

    @property
    def num_tokens(self) -> int:
        """Tokens added so far, separators included."""
        return self._num_tokens

    def add(self, tokens_N: np.ndarray, *, utf8_bytes: int) -> None:
        """Appends a document and a separator.

        Args:
          tokens_N: Ids of the document, integers [N], without a separator.
          utf8_bytes: Bytes of the document's text.

        Raises:
          SpiralError: The disk cannot be written, or an id is outside the vocabulary.
        """
        ids_N = np.append(np.asarray(tokens_N, np.int64), self._tokenizer.separator_id)
        smallest, largest = int(ids_N.min()), int(ids_N.max())
        if smallest < 0 or largest >= self._tokenizer.vocab_size:  # would wrap around below
            raise SpiralError(
                f"{self._folder}: document {self._num_documents} has ids {smallest} to {largest}, "
                f"allowed: 0 to {self._tokenizer.vocab_size - 1}"
            )
        self._num_tokens += len(ids_N)
        self._num_documents += 1
        self._utf8_bytes += utf8_bytes
        self._max_token_id = max(self._max_token_id, largest)
        with _errors_of_writing(self._folder):
            self._tokens.write(ids_N.astype(self._dtype).tobytes())
            self._documents.write(np.array([self._num_tokens], _OFFSET_DTYPE).tobytes())

    def finish(self) -> TokenStore:
        """Completes the store and opens it.

        Raises:
          SpiralError: Nothing was added, or the disk cannot be written.
        """
        if not self._num_documents:
            self.abort()
            raise SpiralError(f"{self._folder}: no text to store; allowed: at least one document that is not empty")
        manifest = Manifest(
            dtype=self._dtype.str,
            num_tokens=self._num_tokens,
            num_documents=self._num_documents,
            utf8_bytes=self._utf8_bytes,
            vocab_size=self._tokenizer.vocab_size,
            separator_id=self._tokenizer.separator_id,
            max_token_id=self._max_token_id,
            tokenizer_fingerprint=self._tokenizer.fingerprint,
            source=self._source,
            tokens_sha256=self._tokens.sha256,
            documents_sha256=self._documents.sha256,
        )
        with _errors_of_writing(self._folder):
            self._files.close()
            with _HashedFile(self._partial / _MANIFEST) as file:
                file.write(manifest.to_json().encode())
            rename_whole(self._partial, self._folder)
        return TokenStore.open(self._folder)

    def abort(self) -> None:
        """Removes what was written; a store that was there before stays."""
        # Flushing what is buffered may fail again, and that is not worth a second error.
        with contextlib.suppress(OSError):
            self._files.close()
        shutil.rmtree(self._partial, ignore_errors=True)

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, exception_type, *exception) -> None:
        if exception_type is None:
            self.finish()
        else:
            self.abort()


def rename_whole(partial: Path, folder: Path) -> None:
    """Gives a complete folder its final name so that the name survives a power cut; replaces what was there.

    Args:
      partial: The complete folder, its files already on disk.
      folder: Its final name, on the same file system.

    Raises:
      OSError: The file system refuses.
    """
    _sync_folder(partial)
    replaced = folder.with_name(f".{folder.name}.replaced")
    if folder.exists():
        # A folder with content cannot be renamed over. Between the two renames there is no store, never half of one.
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(folder, replaced)
    os.rename(partial, folder)
    shutil.rmtree(replaced, ignore_errors=True)
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _HashedFile:
    """A new file that knows the checksum of what was written, and is on disk once it is closed."""

    def __init__(self, path: Path):
        self._file = open(path, "xb", buffering=2**20)
        self._digest = hashlib.sha256()

    def write(self, content: bytes) -> None:
        self._digest.update(content)
        self._file.write(content)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def __enter__(self) -> "_HashedFile":
        return self

    def __exit__(self, *exception) -> None:
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())


@contextlib.contextmanager
def _errors_of_writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SpiralError(f"{folder}: the token store cannot be written ({error.strerror or error})") from error
