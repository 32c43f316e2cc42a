"""The tokens of one work unit, on disk until they are part of a store.

    PARTS/<unit>.json                   what came out: counts, and what was left out; written last
    PARTS/<unit>.train .validation      ids in the store's type, then uint64: where documents end among them

A split without tokens has no file.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from spiral_jax.data.atomic import write_text
from spiral_jax.data.store import OFFSET_DTYPE, token_dtype
from spiral_jax.data.text.files import uniform_hash
from spiral_jax.data.text.records import read_span
from spiral_jax.data.text.spans import Invalid, Text
from spiral_jax.data.text.units import Unit
from spiral_jax.data.tokenizers import Tokenizer
from spiral_jax.data.writer import Counts, check_ids
from spiral_jax.errors import SpiralError

SPLITS = ("train", "validation")
# Enough for the library to have something to do at a time, little enough to be no matter of memory: it keeps some
# hundred bytes per token.
_BATCH_BYTES = 2**21
# How many records that were left out are named.
NAMED = 5


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How text becomes tokens, whichever unit it is in.

    Attributes:
      text_field: Field or column of records that holds the text.
      invalid: "error" or "skip": what to do with what is no text.
      validation_fraction: Share of the records of split "hash" that are held out.
    """

    text_field: str
    invalid: str
    validation_fraction: float


@dataclasses.dataclass(frozen=True)
class Summary:
    """What came out of a unit.

    Attributes:
      counts: Of each split.
      skipped: How many records were left out.
      first_skipped: The first of them.
      skipped_files: Text files left out.
      whole_file: Text file that the unit is a part of, or "" (see `Unit`).
    """

    counts: Mapping[str, Counts]
    skipped: int = 0
    first_skipped: tuple[Invalid, ...] = ()
    skipped_files: tuple[Invalid, ...] = ()
    whole_file: str = ""

    def to_json(self) -> dict:
        """As plain values."""
        return dataclasses.asdict(self) | {"counts": {key: dataclasses.asdict(c) for key, c in self.counts.items()}}

    @classmethod
    def from_json(cls, content: dict) -> "Summary":
        """From `to_json`."""
        return cls(
            {split: Counts(**content["counts"][split]) for split in SPLITS},
            content["skipped"],
            tuple(Invalid(**entry) for entry in content["first_skipped"]),
            tuple(Invalid(**entry) for entry in content["skipped_files"]),
            content["whole_file"],
        )


class InvalidInput(SpiralError):
    """Input that is no text, where that is an error."""

    def __init__(self, invalid: Invalid):
        super().__init__(invalid.describe() + '; allowed: UTF-8 text, or data.invalid="skip" to leave it out')
        self.invalid = invalid


def encode_unit(
    unit: Unit, tokenizer: Tokenizer, recipe: Recipe, folder: Path, check: Callable[[], None] = lambda: None
) -> Summary:
    """Tokenises a unit into a part.

    Args:
      unit: What to read.
      tokenizer: What makes the ids.
      recipe: How.
      folder: Where parts are.
      check: Called now and then; raises to stop the work.

    Returns:
      What came out. It is on disk, too.

    Raises:
      SpiralError: The input is no text or cannot be read, or the disk cannot be written.
    """
    skipped, first_skipped, skipped_files = 0, [], []
    writer = _PartWriter(unit.name, tokenizer, folder)
    try:
        for span in unit.spans:
            for found in read_span(span, unit.content, recipe.text_field):
                if isinstance(found, Text):
                    writer.add(split_of(found, span.split, recipe), found)
                    if writer.pending_bytes >= _BATCH_BYTES:
                        check()
                        writer.flush()
                elif recipe.invalid == "error":
                    raise InvalidInput(found)
                elif span.format == "text":
                    skipped_files.append(found)
                else:
                    skipped += 1
                    first_skipped += [found] if len(first_skipped) < NAMED else []
        counts = writer.finish()
        summary = Summary(counts, skipped, tuple(first_skipped), tuple(skipped_files), unit.whole_file)
        write_text(folder / f"{unit.name}.json", json.dumps(summary.to_json()))
        return summary
    except OSError as error:
        raise SpiralError(f"{folder / unit.name}: cannot be written ({error.strerror or error})") from error
    finally:
        writer.close()


def finished_part(name: str, folder: Path, dtype: np.dtype) -> Summary | None:
    """What came out of a unit, if all of it is there.

    Args:
      name: The unit's.
      folder: Where parts are.
      dtype: Type of an id.
    """
    try:
        summary = Summary.from_json(json.loads((folder / f"{name}.json").read_text()))
        is_whole = all(has_part(name, split, counts, folder, dtype) for split, counts in summary.counts.items())
        return summary if is_whole else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def has_part(name: str, split: str, counts: Counts, folder: Path, dtype: np.dtype) -> bool:
    """Whether the file of a split is there, or has nothing to hold."""
    size = counts.tokens * dtype.itemsize + counts.documents * OFFSET_DTYPE.itemsize
    path = folder / f"{name}.{split}"
    return not size or (path.exists() and path.stat().st_size == size)


def read_part(name: str, split: str, counts: Counts, folder: Path, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of a split, mapped, and where documents end among them."""
    path = folder / f"{name}.{split}"
    tokens_N = np.memmap(path, dtype, "r", shape=counts.tokens) if counts.tokens else np.zeros(0, dtype)
    ends_M = np.fromfile(path, OFFSET_DTYPE, counts.documents, offset=counts.tokens * dtype.itemsize)
    return tokens_N, ends_M


def split_of(text: Text, split: str, recipe: Recipe) -> str:
    if split != "hash":
        return split
    # By the text, so that equal documents are on one side.
    return "validation" if uniform_hash(text.text.encode("utf-8")) < recipe.validation_fraction else "train"


class _PartWriter:
    """Tokenises texts in batches and writes them, each split into a file of its own."""

    def __init__(self, name: str, tokenizer: Tokenizer, folder: Path):
        self._name = name
        self._tokenizer = tokenizer
        self._folder = folder
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._files: dict[str, BinaryIO] = {}
        self._counts = {split: Counts() for split in SPLITS}
        self._ends: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
        self._pending: list[tuple[str, Text, int]] = []
        self.pending_bytes = 0

    def add(self, split: str, text: Text) -> None:
        num_bytes = len(text.text.encode("utf-8"))
        self._pending.append((split, text, num_bytes))
        self.pending_bytes += num_bytes

    def flush(self) -> None:
        ids = self._tokenizer.encode_batch([text.text for _, text, _ in self._pending])
        separator = np.array([self._tokenizer.separator_id], np.int32)
        for split in SPLITS:
            chosen = [n for n, (where, _, _) in enumerate(self._pending) if where == split]
            if not chosen:
                continue
            stretches, lengths = [], []
            for n in chosen:
                ends = self._pending[n][1].ends
                stretches += [ids[n], separator] if ends else [ids[n]]
                lengths.append(len(ids[n]) + ends)
            ids_N = np.concatenate(stretches)
            ends_M = np.cumsum(lengths, dtype=np.uint64)[[self._pending[n][1].ends for n in chosen]]
            self._write(split, ids_N, ends_M, sum(self._pending[n][2] for n in chosen))
        self._pending, self.pending_bytes = [], 0

    def finish(self) -> dict[str, Counts]:
        """Writes the rest and gives the files their names."""
        self.flush()
        for split, file in self._files.items():
            file.write(np.concatenate(self._ends[split]).astype(OFFSET_DTYPE).tobytes())
            file.flush()
            os.fsync(file.fileno())
            file.close()
            os.replace(file.name, self._folder / f"{self._name}.{split}")
        return self._counts

    def close(self) -> None:
        """Removes what has not been given its name."""
        for file in self._files.values():
            with contextlib.suppress(OSError):  # a full disk does not take what is buffered, either
                file.close()
            Path(file.name).unlink(missing_ok=True)

    def _write(self, split: str, ids_N: np.ndarray, ends_M: np.ndarray, utf8_bytes: int) -> None:
        if len(ids_N):
            check_ids(ids_N, self._tokenizer, f"{self._folder / self._name}: a document")
        if split not in self._files:
            # A worker that outlives its parent for a moment must not write into a file of the next run.
            path = self._folder / f".{self._name}.{split}.{os.getpid()}"
            self._files[split] = open(path, "wb")
        self._files[split].write(ids_N.astype(self._dtype).data)
        self._ends[split].append(ends_M + np.uint64(self._counts[split].tokens))
        largest = int(ids_N.max()) if len(ids_N) else -1
        self._counts[split] += Counts(len(ids_N), len(ends_M), utf8_bytes, largest)
