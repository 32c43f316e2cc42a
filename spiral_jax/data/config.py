"""The configuration of the data room."""

import dataclasses
import itertools
import math
from typing import Literal

from spiral_jax.errors import require

# Byte-level BPE starts from 256 bytes and one separator; fewer entries cannot hold every text.
_LEAST = {"bpe_vocab_size": 257, "read_threads": 1, "prefetch_batches": 1, "workers": 0, "longest_record": 1}
_MOST = {"bpe_vocab_size": 2**24, "read_threads": 4096, "prefetch_batches": 2**16, "workers": 4096,
         "longest_record": 2**31}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the data is, how text becomes tokens, and how the tokens are read.

    Attributes:
      paths: text to train on: files, folders (searched recursively) or glob patterns (`**` crosses folders). A text
        file is a document; of `.jsonl` and `.parquet` files each record is one. `.gz` and `.zst` are unpacked (extras
        `zstd`, `parquet`). Links to folders are followed. Needed unless `stores` or
        `examples` is set.
      exclude: `fnmatch` patterns; a file whose full path matches one of them is left out.
      format: what the files of `paths` are: `auto` goes by their names, and takes `.json`, packed or not, for JSON
        lines where the first line is an object on its own; `text`, `jsonl` or `parquet` for all of them.
      text_field: field of a jsonl record, or column of a parquet file, that holds the text.
      validation_paths: like `paths`, for validation. A file that is in both is used for validation only.
      validation_fraction: share of the documents held out for validation when `validation_paths` is empty, chosen by a
        hash, so that adding others moves none: of a text file's name relative to its root, of a record's text. Where
        that would take no file or all of them, the last part of each text file is held out instead.
      invalid: what to do with what is no text (not UTF-8, a broken line of jsonl, a record without the field):
        `error` stops, `skip` leaves it out and counts it.
      longest_record: most bytes that a line of jsonl, or a text in a parquet file, may have; a longer one stops the
        preparation. It bounds its memory, which for the longest record is some tens of times that.
      tokenizer: `bytes`, `bpe` (train a byte-level BPE on the training text), or the path of a Hugging Face
        `tokenizer.json`. With `stores`, only a path counts, and must match; otherwise the store's own is used.
      bpe_vocab_size: entries of the tokenizer trained for `bpe`, the separator included.
      separator: text of the separator token of a `tokenizer.json`; empty to look for `<|endoftext|>`, then `</s>`.
      workers: processes that tokenise; 0 for as many as there are cores. The result does not depend on it.
      stores: tokens to train on, used instead of `paths`: folders made by `python -m spiral_jax.prepare`, or Megatron
        datasets (the `.idx` file, or the folder with it, its `.bin` files and `tokenizer.json`); paths or fsspec URLs
        (`gs://...`; extra `remote`).
      weights: share of each store in the training windows, a row per stage, as in `((0.7, 0.3),)`; empty to take every
        window of every store once per epoch.
      stage_starts: the step each row of `weights` holds from; the first is 0.
      validation_store: token store to validate on, with `stores` only; empty for the `validation/` of the first of
        `stores` that has one.
      examples: a task or data set that brings its own targets and weights, used instead of `paths` and `stores`:
        `listops`, `cfg3b`, or the name of one of your own (docs/own_targets.md); empty for none.
      retry_seconds: how long a failing remote read is tried again before the run ends with status 43.
      cache_dir: folder to keep remote tokens in for the next epoch; empty for none.
      cache_gigabytes: bound of that folder, in units of 1e9 bytes. It fills up and then stays as it is.
      read_threads: threads that read training batches.
      prefetch_batches: batches read ahead of the training step.
    """

    paths: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    format: Literal["auto", "text", "jsonl", "parquet"] = "auto"
    text_field: str = "text"
    validation_paths: tuple[str, ...] = ()
    validation_fraction: float = 0.05
    invalid: Literal["error", "skip"] = "error"
    longest_record: int = 2**26
    tokenizer: str = "bytes"
    bpe_vocab_size: int = 4096
    separator: str = ""
    workers: int = 0
    stores: tuple[str, ...] = ()
    weights: tuple[tuple[float, ...], ...] = ()
    stage_starts: tuple[int, ...] = (0,)
    validation_store: str = ""
    examples: str = ""
    retry_seconds: float = 300.0
    cache_dir: str = ""
    cache_gigabytes: float = 0.0
    read_threads: int = 2
    prefetch_batches: int = 4

    def __post_init__(self):
        for field in ("paths", "exclude", "validation_paths", "stores"):
            value = getattr(self, field)
            is_tuple_of_text = isinstance(value, tuple) and all(isinstance(item, str) and item for item in value)
            self._require(field, is_tuple_of_text, "a tuple of non-empty strings")
        for field, empty_too, allowed in (
            ("text_field", False, "a name"),
            ("tokenizer", False, '"bytes", "bpe" or the path of a tokenizer.json'),
            ("separator", True, "the text of a token, or nothing"),
            ("validation_store", True, "a path, or an empty string"),
            ("examples", True, "a name, or an empty string"),
            ("cache_dir", True, "a path, or an empty string"),
        ):
            value = getattr(self, field)
            self._require(field, isinstance(value, str) and (empty_too or value != ""), allowed)
        for field, choices in (("format", ("auto", "text", "jsonl", "parquet")), ("invalid", ("error", "skip"))):
            self._require(field, getattr(self, field) in choices, ", ".join(choices))
        for field, least in _LEAST.items():
            is_allowed = self._is_number(field, int) and least <= getattr(self, field) <= _MOST[field]
            self._require(field, is_allowed, f"an integer, {least} to {_MOST[field]}")
        for field in ("retry_seconds", "cache_gigabytes"):
            is_enough = self._is_number(field, int, float) and 0 <= getattr(self, field) < math.inf
            self._require(field, is_enough, "a number, 0 or more")
        is_fraction = self._is_number("validation_fraction", int, float) and 0 <= self.validation_fraction < 1
        self._require("validation_fraction", is_fraction, "a number from 0 up to, but not including, 1")
        may_have_separator = self.tokenizer not in ("bytes", "bpe")
        allowed = f'only with data.tokenizer=<tokenizer.json>; "{self.tokenizer}" has its own separator'
        self._require("separator", may_have_separator or not self.separator, allowed)
        self._require("cache_gigabytes", not self.cache_gigabytes or self.cache_dir, "0, or data.cache_dir set as well")
        with_stores = bool(self.stores) or not self.validation_store
        self._require("validation_store", with_stores, "with data.stores only; data.validation_paths beside data.paths")
        alone = not self.examples or not (self.paths or self.stores or self.validation_paths)
        self._require("examples", alone, "without data.paths, data.stores and data.validation_paths")
        self._check_mixture()

    def _require(self, field: str, ok: object, allowed: str) -> None:
        require(bool(ok), f"data.{field}", getattr(self, field), allowed)

    def _is_number(self, field: str, *kinds: type) -> bool:
        return isinstance(getattr(self, field), kinds) and not isinstance(getattr(self, field), bool)

    def _check_mixture(self) -> None:
        starts = self.stage_starts
        if not self.weights:
            self._require("stage_starts", starts == (0,), "(0,), as data.weights is empty")
            return
        for row in self.weights:
            one_each, has_shares = len(row) == len(self.stores), all(w >= 0 for w in row) and 0 < sum(row) < math.inf
            require(one_each, "data.weights", row, f"a weight for each of {len(self.stores)} data.stores")
            require(has_shares, "data.weights", row, "weights >= 0, not all 0")
        rising = starts[:1] == (0,) and all(a < b for a, b in itertools.pairwise(starts))
        allowed = f"{len(self.weights)} rising steps, one per row of data.weights, the first 0"
        self._require("stage_starts", rising and len(starts) == len(self.weights), allowed)

    def stages_before(self, step: int) -> list[tuple[int, tuple[float, ...]]]:
        """Returns (first step, weights) of each stage that has begun before a step.

        Stores without a share at the end of a row do not count: one may be added for a later stage.
        """
        stages = []
        for start, row in zip(self.stage_starts, self.weights, strict=False):
            used = max(index for index, weight in enumerate(row) if weight) + 1
            stages += [(start, row[:used])] if start < step else []
        return stages
