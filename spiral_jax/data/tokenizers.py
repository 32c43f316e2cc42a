"""Tokenizers: text to token ids and back, with a separator between documents."""

import abc
import hashlib
import json
import os
from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers
from etils import epath

from spiral_jax.data import atomic
from spiral_jax.data.plain_text import decoded
from spiral_jax.data.storage import LOCAL, Storage, join
from spiral_jax.errors import SpiralError, require

END_OF_TEXT = "<|endoftext|>"

_FORMAT = "spiral_jax.tokenizer"
_VERSION = 1
_INFO_FILE = "tokenizer_info.json"
_HUGGING_FACE_FILE = "tokenizer.json"
# The parts of a tokenizer.json that decide which ids a text gets. The others (decoder, post-processor, padding,
# truncation) decide what is shown or added, and we add nothing.
_PARTS_THAT_DECIDE_IDS = ("normalizer", "pre_tokenizer", "model", "added_tokens")

# Bytes of a word that a BPE is trained on; what is longer is cut. The library's work grows with the square of a word's
# length, and a word is as long as a run of letters: a genome, a picture in base64, minified code.
_LONGEST_WORD = 256


class Tokenizer(abc.ABC):
    """Turns text into ids and back. Nothing is added to a text: no separator, no special token.

    Attributes:
      vocab_size: number of ids, the separator included; all ids are below it.
      separator_id: id that follows each document. No text encodes to it where the tokenizer can avoid it.
      fingerprint: SHA-256 (hex) of what determines the ids.
    """

    vocab_size: int
    separator_id: int
    fingerprint: str

    @abc.abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Returns the ids of a text, int32 [N]."""

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids of each text, int32 [N] each; faster than one by one."""

    @abc.abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text of ids [N]; separators show as text, ids that mean nothing are left out."""

    @abc.abstractmethod
    def token_id(self, text: str) -> int | None:
        """Returns the id of the token with this text (the separator's is what it shows as); None if there is none."""

    @abc.abstractmethod
    def save(self, folder: str | os.PathLike) -> None:
        """Writes what `load_tokenizer` needs into an existing folder."""


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes are ids 0 to 255, the separator is 256."""

    vocab_size = 257
    separator_id = 256
    fingerprint = hashlib.sha256(b"utf-8 bytes 0-255, separator 256").hexdigest()

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(_utf8(text), np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        # A model's vocabulary may be padded beyond 257: such ids stand for no byte.
        pieces = [bytes([i]) if i < 256 else END_OF_TEXT.encode() for i in map(int, ids) if 0 <= i <= 256]
        return b"".join(pieces).decode("utf-8", "replace")

    def token_id(self, text: str) -> int | None:
        content = _utf8(text)
        return content[0] if len(content) == 1 else self.separator_id if text == END_OF_TEXT else None

    def save(self, folder: str | os.PathLike) -> None:
        _write_info(epath.Path(folder), {"kind": "bytes", "fingerprint": self.fingerprint})


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer in the Hugging Face `tokenizer.json` format.

    A text that contains the separator's spelling is split into ordinary tokens, never into the separator.
    """

    def __init__(self, json_text: str, *, separator: str = "", name: str = _HUGGING_FACE_FILE):
        """Builds the tokenizer.

        Args:
          json_text: content of a `tokenizer.json`.
          separator: text of the separator token; "" looks for <|endoftext|>, then </s>.
          name: what to call the tokenizer in errors: its path.

        Raises:
          SpiralError: not a tokenizer.json, or no separator token in it.
        """
        try:
            spec = json.loads(json_text)
            if not isinstance(spec, dict):
                raise ValueError("not a JSON object")
            self._tokenizer = tokenizers.Tokenizer.from_str(json_text)
        except Exception as error:  # the library raises bare Exception
            reason = " ".join(str(error).split())
            raise SpiralError(f"{name} is damaged ({reason}); allowed: a Hugging Face tokenizer.json") from error
        candidates = [separator] if separator else [END_OF_TEXT, "</s>"]
        ids = {text: found for text in candidates if (found := self._tokenizer.token_to_id(text)) is not None}
        if not ids:
            raise SpiralError(f"{name} has no token {' or '.join(candidates)}; allowed: data.separator=TOKEN, its own")
        separator, self.separator_id = next(iter(ids.items()))
        for token in spec.get("added_tokens") or []:  # which the library has read: they are what they should be
            if token["content"] == separator and not token["special"]:
                token["special"] = True  # what `encode_special_tokens` spares
                self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))
        self._tokenizer.encode_special_tokens = True  # "<|endoftext|>" in a text is text
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._json_text = json_text
        self._separator = separator
        # Not the number of entries: ids may have gaps.
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        decisive = {part: spec.get(part) for part in _PARTS_THAT_DECIDE_IDS} | {"separator": separator}
        self.fingerprint = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()

    @classmethod
    def from_file(cls, path: str | os.PathLike, *, separator: str = "") -> "HuggingFaceTokenizer":
        """Reads a `tokenizer.json`; `separator` as in `__init__`.

        Raises:
          SpiralError: the file is missing or is not a tokenizer.json, or has no separator token.
        """
        return cls(_read_file(path), separator=separator, name=str(path))

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        try:
            encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError:
            for text in texts:
                _utf8(text)  # names the character
            raise
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def token_id(self, text: str) -> int | None:
        found = self._tokenizer.token_to_id(text)
        if found is not None:
            return found
        # A token's entry in the vocabulary need not be its text: byte-level ones write a space as another character.
        ids = self.encode(text)
        return int(ids[0]) if len(ids) == 1 and self.decode(ids) == text else None

    def save(self, folder: str | os.PathLike) -> None:
        atomic.write_text(epath.Path(folder) / _HUGGING_FACE_FILE, self._json_text)
        info = {"kind": "huggingface", "separator": self._separator, "fingerprint": self.fingerprint}
        _write_info(epath.Path(folder), info)


def train_bpe(texts: Iterable[str], vocab_size: int) -> HuggingFaceTokenizer:
    """Trains a byte-level BPE; the same texts give the same tokenizer. Every text survives encode and decode exactly.

    Args:
      texts: what to train on.
      vocab_size: number of entries wanted, the separator (id 0) and the 256 bytes included. Little text gives fewer.
    """
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    words = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    cut = tokenizers.pre_tokenizers.Split(tokenizers.Regex(rf"[\s\S]{{1,{_LONGEST_WORD}}}"), "isolated")
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([words, cut])
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        # Bytes that the training texts lack have to be there, too; the library's own order is random.
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.pre_tokenizer = words
    return HuggingFaceTokenizer(bpe.to_str(), separator=END_OF_TEXT, name="the trained BPE")


def has_tokenizer(folder: str | os.PathLike, storage: Storage = LOCAL) -> bool:
    """Whether a folder (or URL) has something for `load_tokenizer`."""
    return any(storage.exists(join(folder, name)) for name in (_INFO_FILE, _HUGGING_FACE_FILE))


def load_tokenizer(folder: str | os.PathLike, storage: Storage = LOCAL, *, separator: str = "") -> Tokenizer:
    """Loads what `Tokenizer.save` wrote, or the `tokenizer.json` of a plain Hugging Face folder.

    Args:
      folder: where the tokenizer's files are, a path or URL.
      storage: how to open files.
      separator: of a plain `tokenizer.json`, text of the separator token; "" looks for <|endoftext|>, then </s>.

    Raises:
      SpiralError: the files are missing, damaged, or were changed since they were saved.
    """
    info_path, json_path = join(folder, _INFO_FILE), join(folder, _HUGGING_FACE_FILE)

    def hugging_face(separator: str) -> HuggingFaceTokenizer:
        return HuggingFaceTokenizer(_read_file(json_path, storage), separator=separator, name=json_path)

    if not storage.exists(info_path) and storage.exists(json_path):
        return hugging_face(separator)
    try:
        info = json.loads(_read_file(info_path, storage))
        if (info["format"], info["version"]) != (_FORMAT, _VERSION):
            raise ValueError(f"{info['format']} version {info['version']}")
        kind, saved_fingerprint = info["kind"], info["fingerprint"]
        separator = info["separator"] if kind == "huggingface" else ""
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise SpiralError(f"{info_path} is damaged ({error}); allowed: {_FORMAT}, version {_VERSION}") from error
    require(kind in ("bytes", "huggingface"), f"{info_path}: kind", kind, "bytes, huggingface")
    tokenizer = ByteTokenizer() if kind == "bytes" else hugging_face(separator)
    allowed = f"{saved_fingerprint!r}, as saved: its files were changed"
    require(tokenizer.fingerprint == saved_fingerprint, f"{folder}: fingerprint", tokenizer.fingerprint, allowed)
    return tokenizer


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        found = text[error.start]
        raise SpiralError(f"text: character {error.start} is {found!r}; allowed: text that has a UTF-8 form") from error


def _read_file(place: str | os.PathLike, storage: Storage = LOCAL) -> str:
    try:
        return decoded(storage.read_file(place))
    except UnicodeDecodeError as error:
        raise SpiralError(f"{place} is damaged (byte {error.start} is not UTF-8); allowed: a tokenizer file") from error


def _write_info(folder: epath.Path, info: dict) -> None:
    atomic.write_text(
        folder / _INFO_FILE, json.dumps({"format": _FORMAT, "version": _VERSION, **info}, indent=2) + "\n"
    )
