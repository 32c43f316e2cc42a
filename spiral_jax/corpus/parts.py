"""The tokens of one piece, on disk until they are part of a store.

PARTS/<piece>.json                   what came out: counts, and what was left out; written last
PARTS/<piece>.train .validation      ids in the store's type, then uint64: where documents end among them
"""

import array
import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from etils import epath

from spiral_jax.corpus.pieces import Piece
from spiral_jax.corpus.texts import Invalid, Text, read_piece, split_of
from spiral_jax.data.atomic import write_text, written
from spiral_jax.data.config import DataConfig
from spiral_jax.data.json_files import read_json
from spiral_jax.data.store import OFFSET_DTYPE, token_dtype
from spiral_jax.data.store_writer import Counts, check_ids
from spiral_jax.data.tokenizers import Tokenizer
from spiral_jax.errors import SpiralError, Unreachable

SPLITS = ("train", "validation")
# How many records that were left out are named.
NAMED = 5
# Enough for the library to have something to do at a time, little enough to be no matter of memory: it keeps some
# hundred bytes per token.
_BATCH_BYTES = 2**21


@dataclasses.dataclass
class Part:
    """What a piece came to.

    Attributes:
      name: the piece's.
      whole_file: the text file that all of the piece is from, or "": the part is left out if any of the file is.
      counts: of each split.
      skipped: how many records were left out.
      first_skipped: the first of them.
      skipped_files: text files that were left out.
    """

    name: str
    whole_file: str
    counts: dict[str, Counts] = dataclasses.field(default_factory=dict)
    skipped: int = 0
    first_skipped: list[Invalid] = dataclasses.field(default_factory=list)
    skipped_files: list[Invalid] = dataclasses.field(default_factory=list)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Part":
        """From what `dataclasses.asdict` makes of a part."""
        counts = {split: Counts(**content["counts"][split]) for split in SPLITS}
        skipped = {name: [Invalid(*entry) for entry in content[name]] for name in ("first_skipped", "skipped_files")}
        return cls(**content | {"counts": counts} | skipped)

    @classmethod
    def or_none(cls, content: Any) -> "Part | None":
        """As `from_json`, or None of something else."""
        try:
            return cls.from_json(content)
        except (KeyError, TypeError, AttributeError):
            return None

    @classmethod
    def find(cls, name: str, folder: Path, dtype: np.dtype) -> "Part | None":
        """The part in a folder, if all of it is there; `dtype` is that of an id."""
        content = json_or_none(folder / f"{name}.json")
        part = cls.or_none(content) if isinstance(content, dict) and content.get("name") == name else None
        return part if part and all(part.is_there(split, folder, dtype) for split in SPLITS) else None

    def is_there(self, split: str, folder: Path, dtype: np.dtype) -> bool:
        """Whether the file of a split is in the folder, or has nothing to hold."""
        size = self.counts[split].tokens * dtype.itemsize + self.counts[split].documents * OFFSET_DTYPE.itemsize
        path = folder / f"{self.name}.{split}"
        return not size or (path.exists() and path.stat().st_size == size)


def json_or_none(path: Path | epath.Path) -> Any:
    """What is in a file of JSON, or None if there is no such file or it is damaged."""
    try:
        return read_json(path, max_bytes=2**31)  # ours, and as long as there are pieces
    except Unreachable:
        raise
    except SpiralError:
        return None


def encode_piece(
    piece: Piece, tokenizer: Tokenizer, config: DataConfig, folder: Path, check: Callable[[], None] = lambda: None
) -> Part:
    """Tokenises a piece into a part, which is in the folder, too.

    The configuration says how records are read and split, and what becomes of what is no text. `check` is called now
    and then, and raises to stop the work.

    Raises:
      SpiralError: the input is no text or cannot be read, or the disk cannot be written.
    """
    is_one_text = len(piece.sources) == 1 and piece.sources[0].format == "text"
    part = Part(piece.name, piece.sources[0].path if is_one_text else "")
    # A worker that outlives its parent for a moment must not write into a file of the next run, which removes these.
    scratch = {split: folder / f".{piece.name}.{split}.{os.getpid()}" for split in SPLITS}
    with written(folder / piece.name):
        with contextlib.ExitStack() as stack:
            files = {split: _TokenFile(stack.enter_context(open(scratch[split], "wb")), tokenizer) for split in SPLITS}
            for batch in _batches(piece, config, part):
                check()
                ids = tokenizer.encode_batch([text.text for _, text, _ in batch])
                for split, file in files.items():
                    file.append(
                        [(text, n, ids_N) for (s, text, n), ids_N in zip(batch, ids, strict=True) if s == split]
                    )
            part.counts = {split: file.finish() for split, file in files.items()}
        for split in SPLITS:
            os.replace(scratch[split], folder / f"{piece.name}.{split}")
        write_text(folder / f"{piece.name}.json", json.dumps(dataclasses.asdict(part)))
    return part


def _batches(piece: Piece, config: DataConfig, part: Part) -> Iterator[list[tuple[str, Text, int]]]:
    """Texts, each with its split and bytes, many at a time; what is left out is noted in the part."""
    batch: list[tuple[str, Text, int]] = []
    batch_bytes = 0
    for source, found in read_piece(piece, config.text_field, config.longest_record):
        if isinstance(found, Text):
            content = found.text.encode("utf-8")
            batch.append((split_of(content, source, config), found, len(content)))
            batch_bytes += len(content)
            if batch_bytes >= _BATCH_BYTES:
                yield batch
                batch, batch_bytes = [], 0
        elif config.invalid == "error":
            raise found.error()
        elif source.format == "text":
            part.skipped_files.append(found)
        else:
            part.skipped += 1
            part.first_skipped += [found] if part.skipped <= NAMED else []
    yield batch


class _TokenFile:
    """The tokens of one split of a piece, written as they come."""

    def __init__(self, file: BinaryIO, tokenizer: Tokenizer):
        self._file = file
        self._tokenizer = tokenizer
        self._counts = Counts()
        self._ends = array.array("Q")

    def append(self, encoded: Sequence[tuple[Text, int, np.ndarray]]) -> None:
        """Writes texts, each with its bytes in UTF-8 and its ids [N]."""
        separator = np.array([self._tokenizer.separator_id], np.int32)
        stretches, num_tokens, num_documents = [np.zeros(0, np.int32)], self._counts.tokens, len(self._ends)
        for text, _, ids_N in encoded:
            stretches += [ids_N, separator] if text.ends else [ids_N]
            num_tokens += len(ids_N) + text.ends
            if text.ends:
                self._ends.append(num_tokens)
        ids_N = np.concatenate(stretches)
        check_ids(ids_N, self._tokenizer, f"{self._file.name}: a document")
        self._file.write(ids_N.astype(token_dtype(self._tokenizer.vocab_size)).data)
        utf8_bytes = sum(num_bytes for _, num_bytes, _ in encoded)
        self._counts += Counts(len(ids_N), len(self._ends) - num_documents, utf8_bytes, int(ids_N.max(initial=-1)))

    def finish(self) -> Counts:
        """Writes where documents end, and returns once all of it is on disk."""
        self._file.write(np.array(self._ends, OFFSET_DTYPE).tobytes())
        self._file.flush()
        if self._counts.tokens:
            os.fsync(self._file.fileno())
        return self._counts
