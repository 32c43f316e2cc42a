"""Writes token stores (`data.store` has their format), whole or not at all."""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from spiral_jax.data.atomic import partial_of, rename_whole, write_text
from spiral_jax.data.checksums import BLOCK_BYTES, Checksums
from spiral_jax.data.store import DOCUMENTS, MANIFEST, OFFSET_DTYPE, TOKENS, Manifest, TokenStore, token_dtype
from spiral_jax.data.tokenizers import Tokenizer
from spiral_jax.errors import SpiralError


@dataclasses.dataclass(frozen=True)
class Counts:
    """How much text there is, as tokens; counts of stretches of a corpus add up.

    Attributes:
      tokens: tokens, separators included.
      documents: documents that end there.
      utf8_bytes: bytes of the text.
      max_token_id: largest id, or -1.
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
    at a time. A store that is already there is replaced at the end. Methods raise SpiralError if the disk cannot be
    written.
    """

    def __init__(
        self, folder: str | os.PathLike, tokenizer: Tokenizer, *, source: str = "", resume: Counts | None = None
    ):
        """Starts a store, or goes on with one.

        Args:
          folder: where the store is to be; its parents are made.
          tokenizer: what makes the ids.
          source: fingerprint of the input.
          resume: what `sync` had secured before the process died, as `can_resume` confirms; what was written after it
            is dropped.
        """
        self._folder, self._partial = Path(folder), partial_of(Path(folder))
        self._tokenizer = tokenizer
        self._source = source
        self._dtype = token_dtype(tokenizer.vocab_size)
        self.counts = resume or Counts()
        self._files, self._checksums = {}, {}
        with _errors_of_writing(self._folder):
            if resume is None:
                shutil.rmtree(self._partial, ignore_errors=True)  # of a run that was killed
                self._partial.mkdir(parents=True)
            for name, size in _file_sizes(self.counts, self._dtype).items():
                self._files[name] = open(self._partial / name, "ab", buffering=2**20)
                self._files[name].truncate(size)  # of a new store, too: the first document starts at 0
                self._checksums[name] = Checksums()
                with open(self._partial / name, "rb") as kept:
                    while content := kept.read(BLOCK_BYTES):
                        self._checksums[name].update(content)

    @staticmethod
    def can_resume(folder: Path, counts: Counts, dtype: np.dtype) -> bool:
        """Whether a writer that died left at least so much of a store."""
        files = {partial_of(folder) / name: size for name, size in _file_sizes(counts, dtype).items()}
        return all(path.exists() and path.stat().st_size >= size for path, size in files.items())

    def add(self, tokens_N: np.ndarray, *, utf8_bytes: int) -> None:
        """Appends a document and a separator.

        Args:
          tokens_N: ids of the document, integers [N], without a separator.
          utf8_bytes: bytes of the document's text.

        Raises:
          SpiralError: an id is outside the vocabulary.
        """
        ids_N = np.append(np.asarray(tokens_N, np.int64), self._tokenizer.separator_id)
        check_ids(ids_N, self._tokenizer, f"{self._folder}: document {self.counts.documents}")
        counts = Counts(len(ids_N), 1, utf8_bytes, int(ids_N.max()))
        self.extend(ids_N.astype(self._dtype), np.array([len(ids_N)], OFFSET_DTYPE), counts)

    def extend(self, tokens_N: np.ndarray, ends_M: np.ndarray, counts: Counts) -> None:
        """Appends a stretch of tokens, in which documents end or not.

        Args:
          tokens_N: ids with separators, in the store's type [N].
          ends_M: where documents end in them, behind their separators [M].
          counts: of these tokens.
        """
        with _errors_of_writing(self._folder):
            self._write(TOKENS, np.ascontiguousarray(tokens_N).data)
            self._write(DOCUMENTS, (ends_M.astype(OFFSET_DTYPE) + np.uint64(self.counts.tokens)).tobytes())
        self.counts += counts

    def _write(self, name: str, content: bytes | memoryview) -> None:
        self._files[name].write(content)
        self._checksums[name].update(content)

    def sync(self) -> None:
        """Returns once everything that was appended is on disk."""
        with _errors_of_writing(self._folder):
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())

    def close(self) -> None:
        """Leaves what was written for another writer to go on with."""
        for file in self._files.values():
            with contextlib.suppress(OSError):  # what the caller gives up for is worth more than a second error
                file.close()

    def finish(self) -> TokenStore:
        """Completes the store and opens it; SpiralError if nothing was added."""
        if not self.counts.documents:
            self.abort()
            raise SpiralError(f"{self._folder}: no text to store; allowed: at least one document that is not empty")
        self.sync()
        self.close()
        with _errors_of_writing(self._folder):
            manifest = Manifest(
                dtype=self._dtype.str,
                num_tokens=self.counts.tokens,
                num_documents=self.counts.documents,
                utf8_bytes=self.counts.utf8_bytes,
                vocab_size=self._tokenizer.vocab_size,
                separator_id=self._tokenizer.separator_id,
                max_token_id=max(self.counts.max_token_id, self._tokenizer.separator_id),
                tokenizer_fingerprint=self._tokenizer.fingerprint,
                source=self._source,
                tokens_sha256=self._checksums[TOKENS].sha256,
                documents_sha256=self._checksums[DOCUMENTS].sha256,
                tokens_blocks=self._checksums[TOKENS].blocks,
                documents_blocks=self._checksums[DOCUMENTS].blocks,
            )
            write_text(self._partial / MANIFEST, manifest.to_json())
            rename_whole(self._partial, self._folder)
        return TokenStore.open(self._folder)

    def abort(self) -> None:
        """Removes what was written; a store that was there before stays."""
        self.close()
        shutil.rmtree(self._partial, ignore_errors=True)

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, exception_type: type | None, *exception: object) -> None:
        if exception_type is None:
            self.finish()
        else:
            self.abort()


def _file_sizes(counts: Counts, dtype: np.dtype) -> dict[str, int]:
    return {TOKENS: counts.tokens * dtype.itemsize, DOCUMENTS: (counts.documents + 1) * OFFSET_DTYPE.itemsize}


def check_ids(ids_N: np.ndarray, tokenizer: Tokenizer, name: str) -> None:
    """Raises SpiralError, which calls them `name`, if ids [N] are outside the vocabulary: they would wrap around."""
    smallest, largest = int(ids_N.min(initial=0)), int(ids_N.max(initial=0))
    if smallest < 0 or largest >= tokenizer.vocab_size:
        raise SpiralError(f"{name} has ids {smallest} to {largest}; allowed: 0 to {tokenizer.vocab_size - 1}")


@contextlib.contextmanager
def _errors_of_writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SpiralError(f"{folder}: the token store cannot be written ({error.strerror or error})") from error
