"""The configuration of the data room."""

import dataclasses
from typing import Literal

from spiral_jax.errors import SpiralError

# Byte-level BPE starts from 256 bytes and one separator; fewer entries cannot hold every text.
_SMALLEST_BPE_VOCABULARY = 257


def _require(condition: bool, field: str, found: object, allowed: str) -> None:
    if not condition:
        raise SpiralError(f"data.{field}: found {found!r}, allowed: {allowed}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the text is, how it becomes tokens, and how the tokens are read.

    Attributes:
      paths: text files, folders (searched recursively) or glob patterns (`**` crosses folders); a file is a document.
        Needed unless `store` is set.
      exclude: `fnmatch` patterns; a file whose full path matches one of them is left out.
      validation_paths: like `paths`, for validation. A file that is in both is used for validation only.
      validation_fraction: share of the files held out for validation when `validation_paths` is empty, chosen by a
        hash of the file's name relative to its root, so that adding files moves no other file. Where that would take
        no file or all of them, the last part of each file is held out instead.
      invalid_utf8: what to do with a file that is not UTF-8: `error` stops, `skip` leaves it out and counts it.
      tokenizer: `bytes`, `bpe` (train a byte-level BPE on the training files), or the path of a Hugging Face
        `tokenizer.json`. With `store`, only a path counts, and must match; otherwise the store's own is used.
      bpe_vocab_size: entries of the tokenizer trained for `bpe`, the separator included.
      store: a folder with ready-made `train/` and `validation/` token stores, used instead of `paths`.
      separator: text of the separator token of a `tokenizer.json`; empty to look for `<|endoftext|>`, then `</s>`.
      read_threads: threads that read training windows.
      prefetch_batches: batches read ahead of the training step.
    """

    paths: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    validation_paths: tuple[str, ...] = ()
    validation_fraction: float = 0.05
    invalid_utf8: Literal["error", "skip"] = "error"
    tokenizer: str = "bytes"
    bpe_vocab_size: int = 4096
    store: str = ""
    separator: str = ""
    read_threads: int = 2
    prefetch_batches: int = 4

    def __post_init__(self):
        for field in ("paths", "exclude", "validation_paths"):
            value = getattr(self, field)
            is_tuple_of_text = isinstance(value, tuple) and all(isinstance(item, str) and item for item in value)
            _require(is_tuple_of_text, field, value, "a tuple of non-empty strings")
        fraction = self.validation_fraction
        is_fraction = (_is_int(fraction) or isinstance(fraction, float)) and 0 <= fraction < 1
        _require(is_fraction, "validation_fraction", fraction, "a number from 0 up to, but not including, 1")
        _require(self.invalid_utf8 in ("error", "skip"), "invalid_utf8", self.invalid_utf8, '"error" or "skip"')
        is_tokenizer = isinstance(self.tokenizer, str) and self.tokenizer != ""
        _require(is_tokenizer, "tokenizer", self.tokenizer, '"bytes", "bpe" or the path of a tokenizer.json')
        is_vocabulary = _is_int(self.bpe_vocab_size) and self.bpe_vocab_size >= _SMALLEST_BPE_VOCABULARY
        _require(is_vocabulary, "bpe_vocab_size", self.bpe_vocab_size, f"an integer >= {_SMALLEST_BPE_VOCABULARY}")
        _require(isinstance(self.store, str), "store", self.store, "the path of a folder, or an empty string")
        _require(isinstance(self.separator, str), "separator", self.separator, "the text of a token, or nothing")
        if self.separator and self.tokenizer in ("bytes", "bpe"):
            raise SpiralError(
                f"data.separator: found {self.separator!r}, allowed: only with data.tokenizer=<tokenizer.json>; "
                f'"{self.tokenizer}" has its own separator'
            )
        for field in ("read_threads", "prefetch_batches"):
            value = getattr(self, field)
            _require(_is_int(value) and value >= 1, field, value, "an integer >= 1")
