"""Writes token stores (`data.store` has their format), whole or not at all."""

import contextlib
import dataclasses
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from spiral_jax.data.atomic import rename_whole
from spiral_jax.data.store import DOCUMENTS, MANIFEST, OFFSET_DTYPE, TOKENS, Manifest, TokenStore, token_dtype
from spiral_jax.data.tokenizers import Tokenizer
from spiral_jax.errors import SpiralError


@dataclasses.dataclass(frozen=True)
class Counts:
    """How much text there is, as tokens; counts of stretches of a corpus add up.

    Attributes:
      tokens: Tokens, separators included.
      documents: Documents that end there.
      utf8_bytes: Bytes of the text.
      max_token_id: Largest id, or -1.
    """

    tokens: int = 0
    documents: int = 0
    utf8_bytes: int = 0
    max_token_id: int = -1

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.tokens + other.tokens,
            self.documents + other.documents,
            self.utf8_bytes + other.utf8_bytes,
            max(self.max_token_id, other.max_token_id),
        )


class StoreWriter:
    """Writes a store; it appears under its name when it is complete, or not at all.

    with StoreWriter(folder, tokenizer) as writer:
        writer.add(tokenizer.encode(text), utf8_bytes=len(text.encode()))

    Leaving the block completes the store; leaving it by an exception removes what was written. One writer per folder
    at a time. A store that is already there is replaced at the end.
    """

    def __init__(
        self, folder: str | os.PathLike, tokenizer: Tokenizer, *, source: str = "", resume: Counts | None = None
    ):
        """Starts a store, or goes on with one.

        Args:
          folder: Where the store is to be; its parents are made.
          tokenizer: What makes the ids.
          source: Fingerprint of the input.
          resume: What `sync` had secured before the process died; whatever was written after it is dropped.

        Raises:
          SpiralError: The folder cannot be written, or holds less than `resume`.
        """
        self._folder = Path(folder)
        self._partial = self.partial_of(self._folder)
        self._tokenizer = tokenizer
        self._source = source
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._counts = resume or Counts()
        self._files = contextlib.ExitStack()
        with _errors_of_writing(self._folder):
            self._folder.parent.mkdir(parents=True, exist_ok=True)
            if resume is None:
                if self._partial.exists():  # a run that was killed
                    shutil.rmtree(self._partial)
                self._partial.mkdir()
            kept = {} if resume is None else _file_sizes(resume, self._dtype)
            self._tokens = self._files.enter_context(_HashedFile(self._partial / TOKENS, kept.get(TOKENS)))
            self._documents = self._files.enter_context(_HashedFile(self._partial / DOCUMENTS, kept.get(DOCUMENTS)))
            if resume is None:
                self._documents.write(np.zeros(1, OFFSET_DTYPE).tobytes())

    @staticmethod
    def partial_of(folder: Path) -> Path:
        """Where a store is while it is written."""
        return folder.with_name(f".{folder.name}.partial")

    @classmethod
    def has(cls, folder: Path, counts: Counts, dtype: np.dtype) -> bool:
        """Whether a writer that died left at least so much of a store."""
        partial, sizes = cls.partial_of(folder), _file_sizes(counts, dtype)
        return all((partial / n).exists() and (partial / n).stat().st_size >= size for n, size in sizes.items())

    @property
    def num_documents(self) -> int:
        """Documents added so far."""
        return self._counts.documents

    @property
    def num_tokens(self) -> int:
        """Tokens added so far, separators included."""
        return self._counts.tokens

    def add(self, tokens_N: np.ndarray, *, utf8_bytes: int) -> None:
        """Appends a document and a separator.

        Args:
          tokens_N: Ids of the document, integers [N], without a separator.
          utf8_bytes: Bytes of the document's text.

        Raises:
          SpiralError: The disk cannot be written, or an id is outside the vocabulary.
        """
        ids_N = np.append(np.asarray(tokens_N, np.int64), self._tokenizer.separator_id)
        check_ids(ids_N, self._tokenizer, f"{self._folder}: document {self.num_documents}")
        counts = Counts(len(ids_N), 1, utf8_bytes, int(ids_N.max()))
        self.extend(ids_N.astype(self._dtype), np.array([len(ids_N)], OFFSET_DTYPE), counts)

    def extend(self, tokens_N: np.ndarray, ends_M: np.ndarray, counts: Counts) -> None:
        """Appends a stretch of tokens, in which documents end or not.

        Args:
          tokens_N: Ids with separators, in the store's type [N].
          ends_M: Where documents end in them, behind their separators [M].
          counts: Of these tokens.

        Raises:
          SpiralError: The disk cannot be written.
        """
        with _errors_of_writing(self._folder):
            self._tokens.write(np.ascontiguousarray(tokens_N).data)
            self._documents.write((ends_M.astype(OFFSET_DTYPE) + OFFSET_DTYPE.type(self.num_tokens)).tobytes())
        self._counts += counts

    def sync(self) -> None:
        """Returns once everything that was appended is on disk.

        Raises:
          SpiralError: The disk cannot be written.
        """
        with _errors_of_writing(self._folder):
            self._tokens.sync()
            self._documents.sync()

    def close(self) -> None:
        """Leaves what was written for another writer to go on with."""
        with contextlib.suppress(OSError):  # what the caller gives up for is worth more than a second error
            self._files.close()

    def finish(self) -> TokenStore:
        """Completes the store and opens it.

        Raises:
          SpiralError: Nothing was added, or the disk cannot be written.
        """
        if not self.num_documents:
            self.abort()
            raise SpiralError(f"{self._folder}: no text to store; allowed: at least one document that is not empty")
        manifest = Manifest(
            dtype=self._dtype.str,
            num_tokens=self.num_tokens,
            num_documents=self.num_documents,
            utf8_bytes=self._counts.utf8_bytes,
            vocab_size=self._tokenizer.vocab_size,
            separator_id=self._tokenizer.separator_id,
            max_token_id=max(self._counts.max_token_id, self._tokenizer.separator_id),
            tokenizer_fingerprint=self._tokenizer.fingerprint,
            source=self._source,
            tokens_sha256=self._tokens.sha256,
            documents_sha256=self._documents.sha256,
        )
        with _errors_of_writing(self._folder):
            self._files.close()
            (self._partial / MANIFEST).unlink(missing_ok=True)  # of a writer that was killed right here
            with _HashedFile(self._partial / MANIFEST) as file:
                file.write(manifest.to_json().encode())
            rename_whole(self._partial, self._folder)
        return TokenStore.open(self._folder)

    def abort(self) -> None:
        """Removes what was written; a store that was there before stays."""
        self.close()
        shutil.rmtree(self._partial, ignore_errors=True)

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, exception_type, *exception) -> None:
        if exception_type is None:
            self.finish()
        else:
            self.abort()


def _file_sizes(counts: Counts, dtype: np.dtype) -> dict[str, int]:
    return {TOKENS: counts.tokens * dtype.itemsize, DOCUMENTS: (counts.documents + 1) * OFFSET_DTYPE.itemsize}


def check_ids(ids_N: np.ndarray, tokenizer: Tokenizer, name: str) -> None:
    """Checks that ids, at least one, are in the vocabulary: others would wrap around in the store's type.

    Args:
      ids_N: Integers [N].
      tokenizer: What made them.
      name: What to call them in the error.

    Raises:
      SpiralError: They are not.
    """
    smallest, largest = int(ids_N.min()), int(ids_N.max())
    if smallest < 0 or largest >= tokenizer.vocab_size:
        raise SpiralError(f"{name} has ids {smallest} to {largest}, allowed: 0 to {tokenizer.vocab_size - 1}")


class _HashedFile:
    """A file that knows the checksum of what was written, and is on disk once it is closed."""

    def __init__(self, path: Path, keep: int | None = None):
        """Makes a new file, or goes on behind the first `keep` bytes of one."""
        self._digest = hashlib.sha256()
        self._file = open(path, "xb" if keep is None else "r+b", buffering=2**20)
        left = keep or 0
        while left:
            block = self._file.read(min(left, 2**24))
            if not block:
                self._file.close()
                raise SpiralError(f"{path}: is shorter than the {keep} bytes that were written")
            self._digest.update(block)
            left -= len(block)
        if keep is not None:
            self._file.seek(keep)
            self._file.truncate()

    def write(self, content: bytes | memoryview) -> None:
        self._digest.update(content)
        self._file.write(content)

    def sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def __enter__(self) -> "_HashedFile":
        return self

    def __exit__(self, *exception) -> None:
        with self._file:
            self.sync()


@contextlib.contextmanager
def _errors_of_writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SpiralError(f"{folder}: the token store cannot be written ({error.strerror or error})") from error
