"""From text files to token stores: finds the files, splits them, trains or loads the tokenizer, writes the stores.

A cache folder holds one folder per set of inputs, named by its fingerprint:

    CACHE/<fingerprint>/train/ validation/ tokenizer_info.json [tokenizer.json]

Such a folder appears as a whole, so tokenizer and stores always belong together, and `data.store` can name it.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from spiral_jax.data.config import DataConfig
from spiral_jax.data.files import InvalidUtf8Error, TextDocument, find_documents, read_text, split_documents
from spiral_jax.data.store import StoreWriter, TokenStore, rename_whole
from spiral_jax.data.tokenizers import ByteTokenizer, HuggingFaceTokenizer, Tokenizer, load_tokenizer, train_bpe
from spiral_jax.errors import SpiralError

# Part of the fingerprint: raise it when the same input would give other tokens.
_RECIPE_VERSION = 1
# More text does not make a small vocabulary better in a way one can measure, only slower to train.
_BPE_SAMPLE_BYTES = 8_000_000
# Enough for all cores to have work, and little enough to be no matter of memory.
_BYTES_PER_ENCODE = 4_000_000
_SECONDS_PER_REPORT = 2.0

Report = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class PreparedData:
    """Stores ready to train on, and the tokenizer that wrote them. `validation` is None if nothing was held out."""

    train: TokenStore
    validation: TokenStore | None
    tokenizer: Tokenizer

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the training tokens: what a checkpoint records to notice that the data changed."""
        return self.train.manifest.tokens_sha256


def prepare_stores(config: DataConfig, cache_dir: str | os.PathLike, *, report: Report = print) -> PreparedData:
    """Makes the token stores of a config, or opens them if they are there already.

    The result depends on the files' names and content and on the config, not on the machine. Stores in the cache are
    used again while names, sizes and modification times of the files and the config stay what they were; otherwise
    new ones are made beside them.

    Args:
      config: Which text, which tokenizer.
      cache_dir: Where stores are kept; made if missing. Not used when `config.store` is set.
      report: Called with a line of progress now and then.

    Returns:
      The stores and their tokenizer.

    Raises:
      SpiralError: Missing files, empty or undecodable text, tokenizer or store that do not fit, unwritable cache.
    """
    if config.store:
        return open_prepared(Path(config.store).expanduser(), config)
    if not config.paths:
        raise SpiralError("data.paths: empty; allowed: files, folders or glob patterns (or set data.store)")
    train_documents, validation_documents = _choose_documents(config, report)
    # None: to be trained. Loaded before anything else so that a wrong file stops the run at once.
    tokenizer = None if config.tokenizer == "bpe" else _configured_tokenizer(config)
    source = _source_fingerprint(config, tokenizer, train_documents, validation_documents)
    cache = Path(cache_dir)
    folder = cache / source[:16]
    with _exclusive(cache, report):
        try:
            prepared = _reuse(folder, source, expect_validation=bool(validation_documents))
            if prepared is not None:
                report(f"data: using {folder}: {_describe(prepared)}")
                return prepared
        except SpiralError as error:
            report(f"data: preparing again, the cache is damaged: {error}")
        partial = cache / ".partial"
        try:
            shutil.rmtree(partial, ignore_errors=True)  # a run that was killed
            partial.mkdir()
            _build(partial, config, tokenizer, train_documents, validation_documents, source, report)
            rename_whole(partial, folder)
        except OSError as error:
            raise SpiralError(f"{folder}: cannot be written ({error.strerror or error})") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        prepared = open_prepared(folder)
    report(f"data: wrote {folder}: {_describe(prepared)}")
    return prepared


def _choose_documents(config: DataConfig, report: Report) -> tuple[list[TextDocument], list[TextDocument]]:
    documents = find_documents(config.paths, config.exclude)
    if config.validation_paths:
        validation = find_documents(config.validation_paths, config.exclude, field="data.validation_paths")
        held_out = {os.path.realpath(document.path) for document in validation}
        train = [document for document in documents if os.path.realpath(document.path) not in held_out]
        if not train:
            raise SpiralError(
                f"data.paths: all {len(documents)} files are in data.validation_paths, too; "
                "allowed: paths that leave at least one file to train on"
            )
        return train, validation
    train, validation = split_documents(documents, config.validation_fraction)
    if validation and len(train) == len(documents):
        report(
            f"data: {len(documents)} file(s) are too few to hold out whole files: "
            f"the last {config.validation_fraction:.1%} of each is held out for validation"
        )
    return train, validation


def _configured_tokenizer(config: DataConfig) -> Tokenizer:
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    path = Path(config.tokenizer).expanduser()
    if not path.is_file():
        raise SpiralError(
            f'data.tokenizer: no file {config.tokenizer}; allowed: "bytes", "bpe" or the path of a tokenizer.json'
        )
    return HuggingFaceTokenizer.from_file(path, separator=config.separator)


def _source_fingerprint(
    config: DataConfig,
    tokenizer: Tokenizer | None,
    train_documents: Sequence[TextDocument],
    validation_documents: Sequence[TextDocument],
) -> str:
    def listing(documents: Sequence[TextDocument]) -> list:
        return [[d.name, d.size, d.modified_ns, d.begin, d.end] for d in documents]

    source = {
        "recipe": _RECIPE_VERSION,
        "tokenizer": tokenizer.fingerprint if tokenizer else ["bpe", config.bpe_vocab_size, _BPE_SAMPLE_BYTES],
        "invalid_utf8": config.invalid_utf8,
        "train": listing(train_documents),
        "validation": listing(validation_documents),
    }
    return hashlib.sha256(json.dumps(source).encode()).hexdigest()


@contextlib.contextmanager
def _exclusive(cache: Path, report: Report) -> Iterator[None]:
    """Keeps processes that share a cache from writing the same store; the system drops the lock of a killed one."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = open(cache / ".lock", "w")
    except OSError as error:
        raise SpiralError(f"{cache}: cannot be written ({error.strerror})") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f"data: waiting for another process that prepares data in {cache}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _reuse(folder: Path, source: str, *, expect_validation: bool) -> PreparedData | None:
    if not folder.is_dir():
        return None
    prepared = open_prepared(folder)
    stores = [prepared.train] + ([prepared.validation] if prepared.validation else [])
    if any(store.manifest.source != source for store in stores) or expect_validation != bool(prepared.validation):
        return None
    return prepared


def open_prepared(folder: Path, config: DataConfig | None = None) -> PreparedData:
    """Opens a folder with train/, perhaps validation/, and a tokenizer; a file named in the config goes first."""
    if not folder.is_dir():
        raise SpiralError(f"data.store: no folder {folder}; allowed: a folder with a train/ token store")
    train = TokenStore.open(folder / "train")
    validation = TokenStore.open(folder / "validation") if (folder / "validation").exists() else None
    if config is not None and config.tokenizer not in ("bytes", "bpe"):
        tokenizer = _configured_tokenizer(config)
    elif config is not None and train.manifest.tokenizer_fingerprint == ByteTokenizer.fingerprint:
        tokenizer = ByteTokenizer()
    else:
        try:
            tokenizer = load_tokenizer(folder)
        except SpiralError as error:
            raise SpiralError(f"{error}; allowed: a tokenizer in the store, or data.tokenizer=FILE") from error
    train.check_tokenizer(tokenizer)
    if validation is not None:
        validation.check_tokenizer(tokenizer)
    return PreparedData(train, validation, tokenizer)


def _build(
    folder: Path,
    config: DataConfig,
    tokenizer: Tokenizer | None,
    train_documents: Sequence[TextDocument],
    validation_documents: Sequence[TextDocument],
    source: str,
    report: Report,
) -> None:
    if tokenizer is None:
        tokenizer = _train_tokenizer(config, train_documents, report)
    tokenizer.save(folder)
    total_bytes = sum(_expected_bytes(document) for document in [*train_documents, *validation_documents])
    progress = _Progress("tokenising", total_bytes, report)
    num_skipped = 0
    for split, documents in (("train", train_documents), ("validation", validation_documents)):
        # Files that are not UTF-8 are left out, and with them perhaps a whole split.
        with contextlib.ExitStack() as unfinished:
            writer = StoreWriter(folder / split, tokenizer, source=source)
            unfinished.callback(writer.abort)
            num_skipped += _write_documents(writer, documents, tokenizer, config, progress)
            if writer.num_documents:
                writer.finish()
                unfinished.pop_all()
            elif split == "train" or config.validation_paths:
                field = "data.paths" if split == "train" else "data.validation_paths"
                skipped = f" ({num_skipped} skipped as not UTF-8)" if num_skipped else ""
                raise SpiralError(f"{field}: the {len(documents)} file(s) hold no text{skipped}; allowed: UTF-8 text")
    if num_skipped:
        report(f"data: skipped {num_skipped} file(s) that are not UTF-8")


def _train_tokenizer(config: DataConfig, documents: Sequence[TextDocument], report: Report) -> Tokenizer:
    # In the order of a hash, so that a sample is not just the first folder. Collected before the library gets them,
    # because an error in a text has to reach the user as it is.
    texts, sample_bytes = [], 0
    for document in sorted(documents, key=lambda d: hashlib.sha256(d.name.encode("utf-8", "surrogateescape")).digest()):
        if sample_bytes >= _BPE_SAMPLE_BYTES:
            break
        text = _read_or_skip(document, config)
        if text:
            texts.append(text[: _BPE_SAMPLE_BYTES - sample_bytes])
            sample_bytes += len(texts[-1].encode("utf-8"))
    report(f"data: training a BPE of {config.bpe_vocab_size} entries on {_megabytes(sample_bytes)}")
    return train_bpe(texts, config.bpe_vocab_size)


def _write_documents(
    writer: StoreWriter,
    documents: Sequence[TextDocument],
    tokenizer: Tokenizer,
    config: DataConfig,
    progress: "_Progress",
) -> int:
    """Tokenises documents into a store and returns how many were skipped."""
    num_skipped = 0
    texts: list[str] = []
    pending_bytes = 0.0
    for position, document in enumerate(documents):
        text = _read_or_skip(document, config)
        if text is None:
            num_skipped += 1
        elif text:
            texts.append(text)
        pending_bytes += _expected_bytes(document)
        if pending_bytes >= _BYTES_PER_ENCODE or position == len(documents) - 1:
            for tokens_N, encoded in zip(tokenizer.encode_batch(texts), texts, strict=True):
                writer.add(tokens_N, utf8_bytes=len(encoded.encode("utf-8")))
            progress.advance(pending_bytes)
            texts, pending_bytes = [], 0.0
    return num_skipped


def _read_or_skip(document: TextDocument, config: DataConfig) -> str | None:
    try:
        return read_text(document)
    except InvalidUtf8Error:
        if config.invalid_utf8 == "skip":
            return None
        raise


def _expected_bytes(document: TextDocument) -> float:
    return document.size * (document.end - document.begin)


def _describe(prepared: PreparedData) -> str:
    def numbers(store: TokenStore) -> str:
        ratio = store.utf8_bytes / store.num_tokens
        return f"{store.num_documents:,} documents, {store.num_tokens:,} tokens, {ratio:.2f} bytes per token"

    validation = numbers(prepared.validation) if prepared.validation else "none"
    return f"train {numbers(prepared.train)}; validation {validation}"


def _megabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:.1f} MB"


class _Progress:
    """Reports how far a long job is and how long it will still take, every few seconds."""

    def __init__(self, what: str, total_bytes: float, report: Report):
        self._what = what
        self._total = total_bytes
        self._report = report
        self._done = 0.0
        self._begin = self._last = time.monotonic()

    def advance(self, num_bytes: float) -> None:
        self._done += num_bytes
        now = time.monotonic()
        if now - self._last >= _SECONDS_PER_REPORT and self._done:
            self._last = now
            rate = self._done / (now - self._begin)
            left = max(self._total - self._done, 0) / rate
            share = f"{_megabytes(self._done)} of {_megabytes(self._total)}"
            self._report(f"data: {self._what}: {share}, {_megabytes(rate)}/s, {left:.0f} s left")
