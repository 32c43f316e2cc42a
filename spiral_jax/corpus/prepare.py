"""From text to token stores, in steps that survive being killed at any moment.

    FOLDER/train/ validation/ tokenizer_info.json [tokenizer.json] prepared.json

Such a folder appears as a whole, so tokenizer and stores always belong together, and `data.stores` can name it. The
cache of a run has one per set of inputs, named by its fingerprint. Until it has its name, there is beside it

    .FOLDER.partial/job.json        fingerprint of what is being made
                   /tokenizer/      the tokenizer; there once it is complete
                   /parts/          what pieces came to (`corpus.parts`)
                   /parts.json      how many there are; there once all of them are
                   /whole/          what will be the folder: parts are moved into its stores one by one, in order
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from spiral_jax.corpus.parts import NAMED, SPLITS, Part, json_or_none
from spiral_jax.corpus.pieces import Piece, cut_into_pieces
from spiral_jax.corpus.result import MARK, RESULT, copy_to_bucket, describe, is_made, read_result
from spiral_jax.corpus.sources import Source, check_unchanged, find_sources, hold_out
from spiral_jax.corpus.texts import SAMPLE_BYTES, NotText, sample_texts, train_with_progress
from spiral_jax.corpus.workers import encode_pieces
from spiral_jax.data.atomic import AnyPath, partial_of, rename_whole, whole_folder, write_text
from spiral_jax.data.bucket import is_bucket
from spiral_jax.data.config import DataConfig
from spiral_jax.data.exclusive import Check, exclusive
from spiral_jax.data.json_files import write_json
from spiral_jax.data.prepared import PreparedData, configured_tokenizer, open_folder
from spiral_jax.data.staging import stand_in
from spiral_jax.data.storage import reachable_path
from spiral_jax.data.store import MANIFEST, OFFSET_DTYPE, token_dtype
from spiral_jax.data.store_writer import Counts, StoreWriter
from spiral_jax.data.tokenizers import Tokenizer, has_tokenizer, load_tokenizer
from spiral_jax.errors import SpiralError, Unreachable
from spiral_jax.progress import Progress, Report

# Part of the fingerprint: raise it when the same input would give other tokens.
_RECIPE_VERSION = 3


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that decides the tokens.

    Attributes:
      config: how text is read and split, and the tokenizer if it is to be trained.
      sources: the input, in the order of the stores.
      tokenizer: what makes the ids; None for a BPE to be trained on the sources.
    """

    config: DataConfig
    sources: Sequence[Source]
    tokenizer: Tokenizer | None

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all of it, the files by their names, sizes and times."""
        bpe = ["bpe", self.config.bpe_vocab_size, SAMPLE_BYTES]
        decisive = {
            "recipe": _RECIPE_VERSION,
            "tokenizer": self.tokenizer.fingerprint if self.tokenizer else bpe,
            "text_field": self.config.text_field,
            "invalid": self.config.invalid,
            "validation_fraction": float(self.config.validation_fraction),
            "sources": [
                [source.name, source.size, source.modified_ns, source.begin, source.end, source.format, source.split]
                for source in self.sources
            ],
        }
        return hashlib.sha256(json.dumps(decisive).encode("ascii")).hexdigest()


def prepare_stores(config: DataConfig, cache_dir: str | os.PathLike, *, report: Report = print) -> PreparedData:
    """Makes the token stores of a config, or opens them if they are there already.

    The result depends on the files' names and content and on the config, not on the machine. Stores in the cache are
    used again while names, sizes and modification times of the files and the config stay what they were; otherwise
    new ones are made beside them. A call that was killed is continued by the next one.

    Args:
      config: which text, which tokenizer.
      cache_dir: where stores are kept, perhaps on a bucket; made if missing.
      report: called with a line of progress now and then.

    Raises:
      SpiralError: missing files, empty or undecodable text, tokenizer that does not fit, unwritable cache.
    """
    if is_bucket(cache_dir):
        place = epath.Path(cache_dir)
        recipe = _recipe(config, stand_in(place), report)
        place /= recipe.fingerprint[:16]
        _make_on_bucket(place, stand_in(place), recipe, report, mend=True)
        return open_folder(place, config)
    cache = Path(cache_dir)
    recipe = _recipe(config, cache, report)
    folder = cache / recipe.fingerprint[:16]
    with exclusive(cache, ".lock", report):
        for other in set(cache.glob(".*.partial")) - {partial_of(folder)}:
            shutil.rmtree(other, ignore_errors=True)  # of other inputs, and nobody works on them
        try:
            prepared = _open(folder, recipe.fingerprint)
        except SpiralError as error:
            report(f"data: preparing again, the cache is damaged: {error}")
            prepared = None
        if prepared is None:
            return _build(recipe, folder, report)
        report(f"data: using {folder}: {describe(folder)}")
        return prepared


def prepare_folder(
    config: DataConfig, output: str | os.PathLike, *, report: Report = print, check: Check = lambda: None
) -> None:
    """Makes the token stores of a config in a folder of their own, or says that they are there.

    Args:
      config: which text, which tokenizer.
      output: the folder, new or empty; or what an earlier call with the same input and config made. One on a bucket is
        made on this machine (`staging.stand_in`) and copied when whole.
      report: called with a line of progress now and then.
      check: called often; raises to stop, and the next call goes on from there.

    Raises:
      SpiralError: as `prepare_stores`, or the folder holds something else.
    """
    place = reachable_path("--output", output)
    folder = stand_in(place) if is_bucket(place) else Path(os.fspath(place))
    recipe = _recipe(config, folder, report)
    if is_bucket(place):
        _make_on_bucket(place, folder, recipe, report, check)
        return
    with exclusive(folder.parent, f".{folder.name}.lock", report, check):
        if is_made(place, recipe.fingerprint):
            _open(place, recipe.fingerprint)
            report(f"data: {place} is complete: {describe(place)}")
        else:
            _build(recipe, folder, report, check)


def _make_on_bucket(
    place: epath.Path, folder: Path, recipe: Recipe, report: Report, check: Check = lambda: None, *, mend: bool = False
) -> None:
    """Makes a folder of stores on a bucket, by way of one of this machine, if it is not there.

    `mend`: what is damaged there, or is something else, is replaced.
    """
    with exclusive(folder.parent, f".{folder.name}.lock", report, check):
        try:
            if is_made(place, recipe.fingerprint):
                _open(place, recipe.fingerprint)
                report(f"data: {place} is complete: {describe(place)}")
                return
        except SpiralError as error:
            if not mend or isinstance(error, Unreachable):
                raise
            report(f"data: preparing again, the cache is damaged: {error}")
        write_json(place / MARK, {"source": recipe.fingerprint})
        try:
            is_there = _open(folder, recipe.fingerprint) is not None  # by an earlier call that could not copy it
        except SpiralError:
            is_there = False
        if not is_there:
            _build(recipe, folder, report, check)
        copy_to_bucket(folder, place, report, check)


def _recipe(config: DataConfig, output: Path, report: Report) -> Recipe:
    inside = Path(os.path.realpath(output))  # what an earlier run has made, should the output be in a folder of inputs
    found = find_sources(config.paths, config.exclude, format=config.format)
    sources = [source for source in found if inside not in Path(os.path.realpath(source.path)).parents]
    if not sources:
        raise SpiralError(f"data.paths: all files are in {output}, where the result goes; allowed: other files")
    if config.validation_paths:
        field = "data.validation_paths"
        validation = find_sources(config.validation_paths, config.exclude, format=config.format, field=field)
        held_out = {os.path.realpath(source.path) for source in validation}
        train = [source for source in sources if os.path.realpath(source.path) not in held_out]
        if not train:
            raise SpiralError(
                f"data.paths: all {len(sources)} files are in {field}, too; allowed: one more to train on"
            )
        split = train + [dataclasses.replace(source, split="validation") for source in validation]
    else:
        split = hold_out(sources, config.validation_fraction)
        if len(split) > len(sources):
            report(
                f"data: {len(sources)} file(s) are too few to hold out whole files: "
                f"the last {config.validation_fraction:.1%} of each is held out for validation"
            )
    # Loaded before anything else so that a wrong file stops the run at once.
    return Recipe(config, split, None if config.tokenizer == "bpe" else configured_tokenizer(config))


def _open(folder: AnyPath, fingerprint: str) -> PreparedData | None:
    """Opens what an earlier run made; SpiralError if it is damaged."""
    if not folder.is_dir():
        return None
    result = read_result(folder)
    if result.get("source") != fingerprint:
        raise SpiralError(f"{folder / RESULT} is missing or damaged")
    prepared = open_folder(folder)
    if (prepared.validation is not None) != bool(result["splits"]["validation"]["documents"]):
        raise SpiralError(f"{folder}/validation is not what {RESULT} says")
    if not is_bucket(folder):
        shutil.rmtree(partial_of(folder), ignore_errors=True)  # of a run that was killed when all was done
    return prepared


def _build(recipe: Recipe, folder: Path, report: Report, check: Check = lambda: None) -> PreparedData:
    """Makes a folder of stores: what is made does not depend on the number of workers or on being stopped.

    It goes on where an earlier call with the same fingerprint was stopped; what is in the folder is replaced at the
    end. One call per folder at a time.

    Raises:
      SpiralError: input that is no text, cannot be read or changed while it was read, or an unwritable disk.
    """
    partial = partial_of(folder)
    try:
        _claim(partial, recipe.fingerprint)
        tokenizer = _tokenizer(partial, recipe, report, check)
        parts = _finished_parts(partial, recipe, tokenizer, report, check)
        result = _summarise(parts, recipe.fingerprint)
        kinds = {"record(s)": result["skipped_records"], "file(s)": result["skipped_files"]}
        for split in SPLITS if recipe.config.validation_paths else SPLITS[:1]:
            if not result["splits"][split]["documents"]:
                shutil.rmtree(partial, ignore_errors=True)
                field = {"train": "data.paths", "validation": "data.validation_paths"}[split]
                skipped = f" ({sum(kinds.values())} skipped as invalid)" if any(kinds.values()) else ""
                raise SpiralError(f"{field}: no text for {split}{skipped}; allowed: at least one document with text")
        _merge(partial, recipe, tokenizer, parts, check)
        tokenizer.save(partial / "whole")
        write_json(partial / "whole" / RESULT, result)
        rename_whole(partial / "whole", folder)
    except OSError as error:
        raise SpiralError(f"{error.filename or folder} cannot be written ({error.strerror or error})") from error
    except SpiralError as error:
        is_begun = any((partial / "parts").glob("*.json")) or (partial / "parts.json").exists()
        if isinstance(error, NotText) or not is_begun:
            shutil.rmtree(partial, ignore_errors=True)  # there is nothing that could be gone on with
        raise
    shutil.rmtree(partial, ignore_errors=True)
    if recipe.config.validation_fraction and not result["splits"]["validation"]["documents"]:
        report("data: no document was held out for validation; a larger data.validation_fraction holds out more")
    if any(kinds.values()):
        counted = " and ".join(f"{number} {kind}" for kind, number in kinds.items() if number)
        report(f"data: skipped {counted} that hold no text, among them:")
        for line in result["first_skipped"]:
            report(f"data:   {line}")
    report(f"data: wrote {folder}: {describe(folder)}")
    return open_folder(folder)


def _claim(partial: Path, fingerprint: str) -> None:
    """Makes the partial folder ours: goes on with it, or starts anew if it is of other input or damaged."""
    is_ours = json_or_none(partial / "job.json") == {"fingerprint": fingerprint}
    if not is_ours and partial.exists():
        shutil.rmtree(partial)
    (partial / "parts").mkdir(parents=True, exist_ok=True)
    for leftover in (partial / "parts").glob(".*"):  # of workers that were killed
        leftover.unlink()
    if not is_ours:
        write_text(partial / "job.json", json.dumps({"fingerprint": fingerprint}))


def _tokenizer(partial: Path, recipe: Recipe, report: Report, check: Check) -> Tokenizer:
    place = partial / "tokenizer"
    if has_tokenizer(place):
        return load_tokenizer(place)
    tokenizer = recipe.tokenizer
    if tokenizer is None:
        texts, size = sample_texts(recipe.sources, recipe.config), recipe.config.bpe_vocab_size
        sample_bytes = sum(len(text.encode("utf-8")) for text in texts)
        report(f"data: training a BPE of {size} entries on {sample_bytes / 1e6:.1f} MB")
        tokenizer = train_with_progress(texts, size, report, check)
    with whole_folder(place) as folder:
        tokenizer.save(folder)
    return tokenizer


def _finished_parts(partial: Path, recipe: Recipe, tokenizer: Tokenizer, report: Report, check: Check) -> list[Part]:
    """All parts in order, each in the folder of parts or in a store."""
    folder, listed, dtype = partial / "parts", partial / "parts.json", token_dtype(tokenizer.vocab_size)
    if content := json_or_none(listed):
        found = [Part.or_none(entry) for entry in content] if isinstance(content, list) else [None]
        parts = [part for part in found if part]
        is_whole = len(parts) == len(found)
        if is_whole and all(_num_merged(partial, parts, split, dtype) is not None for split in SPLITS):
            report("data: all text is tokenised, going on to put it together")
            return parts
        report(f"data: starting anew, {partial} is damaged")
        listed.unlink()
        shutil.rmtree(partial / "whole", ignore_errors=True)
    kept = {path.stem: part for path in folder.glob("*.json") if (part := Part.find(path.stem, folder, dtype))}
    if kept:
        report(f"data: going on with {len(kept)} finished parts of an earlier run")
    total = sum(source.input_bytes for source in recipe.sources)
    progress = Progress("data: tokenising", total, unit="MB", scale=1e6, report=report)
    names: list[str] = []

    def remaining() -> Iterator[Piece]:
        for piece in cut_into_pieces(recipe.sources, recipe.config.text_field, recipe.config.longest_record):
            check()
            names.append(piece.name)
            if piece.name in kept:
                progress.skip(piece.input_bytes)
            else:
                yield piece

    with contextlib.closing(encode_pieces(remaining(), partial / "tokenizer", folder, recipe.config, check)) as done:
        for piece, part in done:
            kept[piece.name] = part
            progress.advance(piece.input_bytes)
    for source in recipe.sources:
        check_unchanged(source)
    parts = [kept[name] for name in names]
    write_text(listed, json.dumps([dataclasses.asdict(part) for part in parts]))
    return parts


def _used(parts: Sequence[Part], split: str) -> list[Part]:
    """What has tokens of a split, without parts of text files that are left out."""
    left_out = {invalid.path for part in parts for invalid in part.skipped_files}
    return [part for part in parts if part.counts[split].tokens and part.whole_file not in left_out]


def _total(parts: Sequence[Part], split: str) -> Counts:
    return sum((part.counts[split] for part in parts), Counts())


def _num_merged(partial: Path, parts: Sequence[Part], split: str, dtype: np.dtype) -> int | None:
    """How many parts of a split are in its store already; None if something is missing."""
    store, used = partial / "whole" / split, _used(parts, split)
    if (store / MANIFEST).exists():
        return len(used)
    there = [part.is_there(split, partial / "parts", dtype) for part in used]
    merged = there.index(True) if True in there else len(there)
    can_go_on = not merged or StoreWriter.can_resume(store, _total(used[:merged], split), dtype)
    return merged if can_go_on and all(there[merged:]) else None


def _merge(partial: Path, recipe: Recipe, tokenizer: Tokenizer, parts: Sequence[Part], check: Check) -> None:
    """Moves the parts into the stores, in order; each is deleted once it is safely in."""
    dtype = token_dtype(tokenizer.vocab_size)
    (partial / "whole").mkdir(exist_ok=True)
    for split in SPLITS:
        store, used = partial / "whole" / split, _used(parts, split)
        if not used or (store / MANIFEST).exists():
            continue
        merged = _num_merged(partial, parts, split, dtype)
        if merged is None:
            raise SpiralError(f"{partial} was changed while it was needed; allowed: run it again to go on")
        kept = _total(used[:merged], split) if merged else None
        with contextlib.closing(StoreWriter(store, tokenizer, source=recipe.fingerprint, resume=kept)) as writer:
            for part in used[merged:]:
                check()
                counts, path = part.counts[split], partial / "parts" / f"{part.name}.{split}"
                tokens_N = np.memmap(path, dtype, "r", shape=counts.tokens)
                ends_M = np.fromfile(path, OFFSET_DTYPE, counts.documents, offset=tokens_N.nbytes)
                writer.extend(tokens_N, ends_M, counts)
                writer.sync()
                del tokens_N  # the space is free once nobody has it mapped
                path.unlink()
            writer.finish()


def _summarise(parts: Sequence[Part], fingerprint: str) -> dict[str, Any]:
    """What came of it, for people and for the next run."""
    files = {invalid.path: invalid for part in parts for invalid in reversed(part.skipped_files)}
    records = [invalid for part in parts for invalid in part.first_skipped]
    return {
        "format": "spiral_jax.prepared",
        "version": 1,
        "source": fingerprint,
        "splits": {split: dataclasses.asdict(_total(_used(parts, split), split)) for split in SPLITS},
        "skipped_records": sum(part.skipped for part in parts),
        "skipped_files": len(files),
        "first_skipped": [invalid.describe() for invalid in [*files.values(), *records][:NAMED]],
    }
