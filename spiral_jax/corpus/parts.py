"""The tokens of one piece, on disk until they are part of a store.

    PARTS/<piece>.json                   what came out: counts, and what was left out; written last
    PARTS/<piece>.train .validation      ids in the store's type, then uint64: where documents end among them

A split without tokens has no file.
"""

import array
import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spiral_jax.corpus.pieces import Piece
from spiral_jax.corpus.sources import Source, uniform_hash
from spiral_jax.corpus.store_writer import Counts, check_ids
from spiral_jax.corpus.texts import Invalid, Text, read_piece
from spiral_jax.data.atomic import write_text
from spiral_jax.data.config import DataConfig
from spiral_jax.data.store import OFFSET_DTYPE, token_dtype
from spiral_jax.data.tokenizers import Tokenizer
from spiral_jax.errors import SpiralError

SPLITS = ("train", "validation")
# How many records that were left out are named.
NAMED = 5
# Enough for the library to have something to do at a time, little enough to be no matter of memory: it keeps some
# hundred bytes per token.
_BATCH_BYTES = 2**21


@dataclasses.dataclass(frozen=True)
class Part:
    """What a piece came to.

    Attributes:
      name: the piece's.
      counts: of each split.
      skipped: how many records were left out.
      first_skipped: the first of them.
      skipped_files: text files that were left out.
      whole_file: the text file that the piece is of, if it is of one: if another piece of that file is no text, the
        part is left out, too. Otherwise "".
    """

    name: str
    counts: dict[str, Counts]
    skipped: int
    first_skipped: tuple[Invalid, ...]
    skipped_files: tuple[Invalid, ...]
    whole_file: str

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Part":
        """From `to_json`."""
        counts = {split: Counts(**content["counts"][split]) for split in SPLITS}
        skipped = {field: tuple(Invalid(*entry) for entry in content[field]) for field in ("first_skipped", "skipped_files")}
        return cls(content["name"], counts, content["skipped"], **skipped, whole_file=content["whole_file"])

    def is_there(self, split: str, folder: Path, dtype: np.dtype) -> bool:
        """Whether the file of a split is in the folder of parts, or has nothing to hold."""
        size = self.counts[split].tokens * dtype.itemsize + self.counts[split].documents * OFFSET_DTYPE.itemsize
        path = folder / f"{self.name}.{split}"
        return not size or (path.exists() and path.stat().st_size == size)

    def read(self, split: str, folder: Path, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of a split, mapped, and where documents end among them."""
        path, counts = folder / f"{self.name}.{split}", self.counts[split]
        tokens_N = np.memmap(path, dtype, "r", shape=counts.tokens)
        return tokens_N, np.fromfile(path, OFFSET_DTYPE, counts.documents, offset=counts.tokens * dtype.itemsize)


def find_part(name: str, folder: Path, dtype: np.dtype) -> Part | None:
    """What a piece came to, if all of it is there.

    Args:
      name: the piece's.
      folder: where parts are.
      dtype: type of an id.
    """
    try:
        part = Part.from_json(json.loads((folder / f"{name}.json").read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    is_whole = part.name == name and all(part.is_there(split, folder, dtype) for split in SPLITS)
    return part if is_whole else None


def split_of(content: bytes, source: Source, config: DataConfig) -> str:
    """Where a document goes: equal records of a corpus are on one side."""
    if source.split != "hash":
        return source.split
    return "validation" if uniform_hash(content) < config.validation_fraction else "train"


def encode_piece(
    piece: Piece, tokenizer: Tokenizer, config: DataConfig, folder: Path, check: Callable[[], None] = lambda: None
) -> Part:
    """Tokenises a piece into a part.

    Args:
      piece: what to read.
      tokenizer: what makes the ids.
      config: how records are read and split, and what becomes of what is no text.
      folder: where parts are.
      check: called now and then; raises to stop the work.

    Returns:
      What came out. It is on disk, too.

    Raises:
      SpiralError: the input is no text or cannot be read, or the disk cannot be written.
    """
    skipped: list[Invalid] = []
    num_skipped, skipped_files = 0, []
    try:
        with contextlib.ExitStack() as stack:
            files = {}
            for split in SPLITS:
                files[split] = stack.enter_context(_SplitFile(folder / f"{piece.name}.{split}", tokenizer))
            pending: list[tuple[str, Text, int]] = []
            pending_bytes = 0

            def flush() -> None:
                check()
                ids = tokenizer.encode_batch([text.text for _, text, _ in pending])
                for split, file in files.items():
                    file.write([(text, size, n) for (s, text, size), n in zip(pending, ids, strict=True) if s == split])

            for source, found in read_piece(piece, config.text_field):
                if isinstance(found, Text):
                    content = found.text.encode("utf-8")
                    pending.append((split_of(content, source, config), found, len(content)))
                    pending_bytes += len(content)
                    if pending_bytes >= _BATCH_BYTES:
                        flush()
                        pending, pending_bytes = [], 0
                elif config.invalid == "error":
                    raise found.error()
                elif source.format == "text":
                    skipped_files.append(found)
                else:
                    num_skipped += 1
                    skipped += [found] if num_skipped <= NAMED else []
            flush()
            for file in files.values():
                file.finish()
            counts = {split: file.counts for split, file in files.items()}
        is_one = len(piece.sources) == 1 and piece.sources[0].format == "text"
        whole_file = piece.sources[0].path if is_one else ""
        part = Part(piece.name, counts, num_skipped, tuple(skipped), tuple(skipped_files), whole_file)
        write_text(folder / f"{piece.name}.json", json.dumps(part.to_json()))
        return part
    except OSError as error:
        raise SpiralError(f"{folder / piece.name} cannot be written ({error.strerror or error})") from error


class _SplitFile:
    """The tokens of one split of a piece, written as they come and named when they are complete."""

    def __init__(self, path: Path, tokenizer: Tokenizer):
        self.counts = Counts()
        self._ends = array.array("Q")
        self._path = path
        self._tokenizer = tokenizer
        # A worker that outlives its parent for a moment must not write into a file of the next run.
        self._scratch = path.with_name(f".{path.name}.{os.getpid()}")
        self._file = open(self._scratch, "wb")

    def write(self, encoded: Sequence[tuple[Text, int, np.ndarray]]) -> None:
        """Appends texts, each with its bytes in UTF-8 and its ids [N]."""
        separator = np.array([self._tokenizer.separator_id], np.int32)
        stretches, num_tokens, num_documents = [np.zeros(0, np.int32)], self.counts.tokens, len(self._ends)
        for text, _, ids_N in encoded:
            stretches += [ids_N, separator] if text.ends else [ids_N]
            num_tokens += len(ids_N) + text.ends
            if text.ends:
                self._ends.append(num_tokens)
        ids_N = np.concatenate(stretches)
        if len(ids_N):
            check_ids(ids_N, self._tokenizer, f"{self._path}: a document")
        self._file.write(ids_N.astype(token_dtype(self._tokenizer.vocab_size)).data)
        utf8_bytes = sum(size for _, size, _ in encoded)
        self.counts += Counts(
            len(ids_N), len(self._ends) - num_documents, utf8_bytes, int(ids_N.max(initial=-1))
        )

    def finish(self) -> None:
        """Writes where documents end and gives the file its name; nothing to hold needs no file."""
        if not self.counts.tokens:
            return
        self._file.write(np.array(self._ends, OFFSET_DTYPE).tobytes())
        self._file.flush()
        os.fsync(self._file.fileno())
        os.replace(self._scratch, self._path)

    def __enter__(self) -> "_SplitFile":
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(OSError):  # a full disk does not take what is buffered, either
            self._file.close()
        self._scratch.unlink(missing_ok=True)
