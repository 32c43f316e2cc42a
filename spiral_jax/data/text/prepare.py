"""From text to token stores: what to read, which tokenizer, where the result goes. `data.text.build` does the work.

    FOLDER/train/ validation/ tokenizer_info.json [tokenizer.json] prepared.json

Such a folder appears as a whole, so tokenizer and stores always belong together, and `data.stores` can name it. The
cache of a run has one per set of inputs, named by its fingerprint.
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
from spiral_jax.data.prepared import PreparedData, configured_tokenizer, open_folder
from spiral_jax.data.storage import local_path
from spiral_jax.data.text.build import RESULT, Build, build, partial_of
from spiral_jax.data.text.files import TextDocument, find_documents, hold_out, split_documents
from spiral_jax.data.text.parts import Recipe
from spiral_jax.data.text.pool import num_workers
from spiral_jax.data.text.sample import SAMPLE_BYTES, sample_texts
from spiral_jax.data.text.units import Source
from spiral_jax.data.tokenizers import Tokenizer, train_bpe
from spiral_jax.errors import SpiralError
from spiral_jax.progress import Report

# Part of the fingerprint: raise it when the same input would give other tokens.
_RECIPE_VERSION = 2
_SECONDS_BETWEEN_TRIES = 0.1

Check = Callable[[], None]


def prepare_stores(config: DataConfig, cache_dir: str | os.PathLike, *, report: Report = print) -> PreparedData:
    """Makes the token stores of a config, or opens them if they are there already.

    The result depends on the files' names and content and on the config, not on the machine. Stores in the cache are
    used again while names, sizes and modification times of the files and the config stay what they were; otherwise
    new ones are made beside them. A call that was killed is continued by the next one.

    Args:
      config: Which text, which tokenizer.
      cache_dir: Where stores are kept; made if missing.
      report: Called with a line of progress now and then.

    Returns:
      The stores and their tokenizer.

    Raises:
      SpiralError: Missing files, empty or undecodable text, tokenizer that does not fit, unwritable cache.
    """
    cache = Path(cache_dir)
    job = _plan(config, cache, report, lambda: None)
    folder = cache / job.fingerprint[:16]
    with _exclusive(cache, ".lock", job):
        for other in set(cache.glob(".*.partial")) - {partial_of(folder)}:
            shutil.rmtree(other, ignore_errors=True)  # of other inputs, and nobody works on them
        try:
            prepared = _finished(folder, job.fingerprint)
        except SpiralError as error:
            report(f"data: preparing again, the cache is damaged: {error}")
            prepared = None
        if prepared is not None:
            report(f"data: using {folder}: {describe(folder)}")
            return prepared
        build(job, folder)
        prepared = open_folder(folder)
    _report_result(folder, config, report)
    return prepared


def prepare_folder(
    config: DataConfig, output: str | os.PathLike, *, report: Report = print, check: Check = lambda: None
) -> None:
    """Makes the token stores of a config in a folder of their own, or says that they are there.

    Args:
      config: Which text, which tokenizer.
      output: The folder, new or empty; or what an earlier call with the same input and config made.
      report: Called with a line of progress now and then.
      check: Called often; raises to stop, and the next call goes on from there.

    Raises:
      SpiralError: As `prepare_stores`, or the folder holds something else.
    """
    folder = local_path("--output", output)
    job = _plan(config, folder, report, check)
    with _exclusive(folder.parent, f".{folder.name}.lock", job):
        if folder.is_dir() and any(folder.iterdir()):
            if _source(folder) != job.fingerprint:
                what = "stores of other input or options" if (folder / RESULT).exists() else "other files"
                raise SpiralError(f"{folder}: holds {what}; allowed: a new or an empty folder")
            if _finished(folder, job.fingerprint):
                report(f"data: {folder} is complete: {describe(folder)}")
                return
        elif folder.exists() and not folder.is_dir():
            raise SpiralError(f"{folder}: is a file; allowed: a new or an empty folder")
        build(job, folder)
    _report_result(folder, config, report)


def describe(folder: Path) -> str:
    """The statistics of a folder of stores, in a line."""
    result = json.loads((folder / RESULT).read_text())

    def numbers(counts: dict) -> str:
        if not counts["documents"]:
            return "none"
        ratio = counts["utf8_bytes"] / counts["tokens"]
        return f"{counts['documents']:,} documents, {counts['tokens']:,} tokens, {ratio:.2f} bytes per token"

    return "; ".join(f"{split} {numbers(counts)}" for split, counts in result["splits"].items())


def _plan(config: DataConfig, output: Path, report: Report, check: Check) -> Build:
    if not config.paths:
        raise SpiralError("data.paths: empty; allowed: files, folders or glob patterns (or set data.stores)")
    sources = _sources(config, output, report)
    # None: to be trained. Loaded before anything else so that a wrong file stops the run at once.
    tokenizer = None if config.tokenizer == "bpe" else configured_tokenizer(config)
    recipe = Recipe(config.text_field, config.invalid, float(config.validation_fraction))

    def make_tokenizer() -> Tokenizer:
        if tokenizer is not None:
            return tokenizer
        texts = sample_texts(sources, recipe)
        sample_bytes = sum(len(text.encode("utf-8")) for text in texts)
        report(f"data: training a BPE of {config.bpe_vocab_size} entries on {sample_bytes / 1e6:.1f} MB")
        return train_bpe(texts, config.bpe_vocab_size)

    listing = [
        [d.name, d.size, d.modified_ns, d.begin, d.end, source.format, source.split]
        for d, source in ((source.document, source) for source in sources)
    ]
    decisive = {
        "recipe": _RECIPE_VERSION,
        "tokenizer": tokenizer.fingerprint if tokenizer else ["bpe", config.bpe_vocab_size, SAMPLE_BYTES],
        **dataclasses.asdict(recipe),
        "sources": listing,
    }
    return Build(
        sources=sources,
        recipe=recipe,
        fingerprint=hashlib.sha256(json.dumps(decisive).encode()).hexdigest(),
        make_tokenizer=make_tokenizer,
        needed={"train": "data.paths"} | ({"validation": "data.validation_paths"} if config.validation_paths else {}),
        workers=num_workers(config.workers),
        report=report,
        check=check,
    )


def _sources(config: DataConfig, output: Path, report: Report) -> list[Source]:
    """Training sources, those whose records are split by hash among them, then validation sources."""
    documents = _outside(output, find_documents(config.paths, config.exclude))
    if not documents:
        raise SpiralError(f"data.paths: all files are in {output}, where the result goes; allowed: other files")

    def sources(chosen: Sequence[TextDocument], split: str) -> list[Source]:
        return [Source.of(document, config.format, split) for document in chosen]

    if config.validation_paths:
        validation = find_documents(config.validation_paths, config.exclude, field="data.validation_paths")
        held_out = {os.path.realpath(document.path) for document in validation}
        train = [document for document in documents if os.path.realpath(document.path) not in held_out]
        if not train:
            raise SpiralError(
                f"data.paths: all {len(documents)} files are in data.validation_paths, too; "
                "allowed: paths that leave at least one file to train on"
            )
        return sources(train, "train") + sources(validation, "validation")
    if not config.validation_fraction:
        return sources(documents, "train")
    texts = [document for document in documents if Source.of(document, config.format, "train").format == "text"]
    if len(texts) < len(documents):
        # In the order of the names, texts and records together.
        _, held_out = hold_out(texts, config.validation_fraction)
        splits = {document: "train" for document in texts} | {document: "validation" for document in held_out}
        found = [Source.of(document, config.format, splits.get(document, "hash")) for document in documents]
        return sorted(found, key=lambda source: source.split == "validation")
    train, validation = split_documents(documents, config.validation_fraction)
    if len(train) == len(documents):
        report(
            f"data: {len(documents)} file(s) are too few to hold out whole files: "
            f"the last {config.validation_fraction:.1%} of each is held out for validation"
        )
    return sources(train, "train") + sources(validation, "validation")


def _outside(output: Path, documents: Sequence[TextDocument]) -> list[TextDocument]:
    """Leaves out what an earlier run has made, should the output be in a folder of inputs."""
    inside = Path(os.path.realpath(output))
    return [document for document in documents if inside not in Path(os.path.realpath(document.path)).parents]


@contextlib.contextmanager
def _exclusive(folder: Path, name: str, job: Build) -> Iterator[None]:
    """Keeps processes from making the same stores at a time; the system drops the lock of a killed one."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / name, "w")
    except OSError as error:
        raise SpiralError(f"{folder}: cannot be written ({error.strerror})") from error
    with lock:
        is_waiting = False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not is_waiting:
                    job.report(f"data: waiting for another process that prepares data in {folder}")
                is_waiting = True
                job.check()
                time.sleep(_SECONDS_BETWEEN_TRIES)
        yield


def _source(folder: Path) -> str:
    """The fingerprint of what a folder was made from, "" if it says none."""
    try:
        return str(json.loads((folder / RESULT).read_text())["source"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _finished(folder: Path, fingerprint: str) -> PreparedData | None:
    """Opens what an earlier run made; SpiralError if it is damaged."""
    if not folder.is_dir():
        return None
    if _source(folder) != fingerprint:
        raise SpiralError(f"{folder / RESULT}: is missing or damaged")
    prepared = open_folder(folder)
    result = json.loads((folder / RESULT).read_text())
    if (prepared.validation is not None) != bool(result["splits"]["validation"]["documents"]):
        raise SpiralError(f"{folder}: validation/ is not what {RESULT} says")
    shutil.rmtree(partial_of(folder), ignore_errors=True)  # of a run that was killed when all was done
    return prepared


def _report_result(folder: Path, config: DataConfig, report: Report) -> None:
    result = json.loads((folder / RESULT).read_text())
    if config.validation_fraction and not result["splits"]["validation"]["documents"]:
        report("data: no document was held out for validation; a larger data.validation_fraction holds out more")
    num_skipped = result["skipped_records"] + result["skipped_files"]
    if num_skipped:
        kinds = {"record(s)": result["skipped_records"], "file(s)": result["skipped_files"]}
        counted = " and ".join(f"{number} {kind}" for kind, number in kinds.items() if number)
        report(f"data: skipped {counted} that hold no text, among them:")
        for line in result["first_skipped"]:
            report(f"data:   {line}")
    report(f"data: wrote {folder}: {describe(folder)}")
