"""The engine: from sources to a folder of token stores, in steps that survive being killed at any moment.

    .<name>.partial/job.json        fingerprint of what is being made
                   /tokenizer/      the tokenizer; there once it is complete
                   /parts/          what units came to (`data.text.parts`)
                   /units.json      all units in order and their counts; there once all parts are
                   /whole/          what will be the folder: parts are moved in one by one, in order

It is removed once the folder has its name.
"""

import contextlib
import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from spiral_jax.data.atomic import write_text
from spiral_jax.data.store import MANIFEST, token_dtype
from spiral_jax.data.text.parts import NAMED, SPLITS, Recipe, Summary, finished_part, has_part, read_part
from spiral_jax.data.text.pool import Job, run_units
from spiral_jax.data.text.units import Source, Unit, cut_into_units
from spiral_jax.data.tokenizers import Tokenizer, has_tokenizer, load_tokenizer
from spiral_jax.data.writer import Counts, StoreWriter, rename_whole
from spiral_jax.errors import SpiralError
from spiral_jax.progress import Progress, Report

RESULT = "prepared.json"


class Finished(NamedTuple):
    """A unit that became a part."""

    name: str
    summary: Summary


@dataclasses.dataclass(frozen=True)
class Build:
    """What is to be made.

    Attributes:
      sources: The input, in the order of the stores.
      recipe: How text becomes tokens.
      fingerprint: Of all that decides what comes out.
      make_tokenizer: Loads or trains the tokenizer.
      needed: Splits that must have a document, and the field that is to blame if they have none.
      workers: Number of processes.
      report: Called with a line of progress now and then.
      check: Called often; raises to stop the work, which the next run continues.
    """

    sources: Sequence[Source]
    recipe: Recipe
    fingerprint: str
    make_tokenizer: Callable[[], Tokenizer]
    needed: Mapping[str, str]
    workers: int
    report: Report = print
    check: Callable[[], None] = lambda: None


def partial_of(folder: Path) -> Path:
    """Where a folder is made."""
    return folder.with_name(f".{folder.name}.partial")


def build(job: Build, folder: Path) -> None:
    """Makes a folder of stores: train/, validation/ if there is any, the tokenizer, and RESULT.

    It goes on where an earlier call with the same fingerprint was stopped, and appears under its name when it is
    complete. What is made does not depend on the number of workers or on being stopped. One call per folder at a time.

    Args:
      job: What to make.
      folder: Where; what is there is replaced at the end.

    Raises:
      SpiralError: Input that is no text, cannot be read or changed while it was read, or an unwritable disk.
    """
    partial = partial_of(folder)
    try:
        _claim(partial, job)
        tokenizer = _tokenizer(partial, job)
        finished = _finished_units(partial, job, tokenizer)
        _check_needed(partial, job, finished)
        _merge(partial, job, tokenizer, finished)
        whole = partial / "whole"
        tokenizer.save(whole)
        write_text(whole / RESULT, json.dumps(_result(job, finished), indent=2) + "\n")
        for path in filter(Path.is_file, whole.iterdir()):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        rename_whole(whole, folder)
    except OSError as error:
        raise SpiralError(f"{error.filename or folder}: cannot be written ({error.strerror or error})") from error
    shutil.rmtree(partial, ignore_errors=True)


def _claim(partial: Path, job: Build) -> None:
    """Makes the partial folder this job's: goes on with it, or starts anew if it is another job's or damaged."""
    try:
        is_ours = json.loads((partial / "job.json").read_text())["fingerprint"] == job.fingerprint
    except (OSError, ValueError, KeyError, TypeError):
        is_ours = False
    if not is_ours and partial.exists():
        shutil.rmtree(partial)
    (partial / "parts").mkdir(parents=True, exist_ok=True)
    for leftover in (partial / "parts").glob(".*"):  # of workers that were killed
        leftover.unlink()
    if not is_ours:
        write_text(partial / "job.json", json.dumps({"fingerprint": job.fingerprint}))


def _tokenizer(partial: Path, job: Build) -> Tokenizer:
    place = partial / "tokenizer"
    if has_tokenizer(place):
        return load_tokenizer(place)
    unnamed = partial / ".tokenizer"
    shutil.rmtree(unnamed, ignore_errors=True)
    unnamed.mkdir()
    tokenizer = job.make_tokenizer()
    tokenizer.save(unnamed)
    rename_whole(unnamed, place)
    return tokenizer


def _finished_units(partial: Path, job: Build, tokenizer: Tokenizer) -> list[Finished]:
    """All units in order, once all of them are parts."""
    try:
        listed = json.loads((partial / "units.json").read_text())
        finished = [Finished(name, Summary.from_json(summary)) for name, summary in listed]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass
    else:
        if _can_merge(partial, finished, tokenizer):
            job.report("data: all text is tokenised, going on to put it together")
            return finished
        job.report(f"data: starting anew, {partial} is damaged")
        (partial / "units.json").unlink()
        shutil.rmtree(partial / "whole", ignore_errors=True)
    finished = _run(partial, job, tokenizer)
    for source in job.sources:
        source.check_unchanged()
    write_text(partial / "units.json", json.dumps([[name, summary.to_json()] for name, summary in finished]))
    return finished


def _run(partial: Path, job: Build, tokenizer: Tokenizer) -> list[Finished]:
    parts, dtype = partial / "parts", token_dtype(tokenizer.vocab_size)
    total = sum(source.input_bytes for source in job.sources)
    progress = Progress("data: tokenising", total, unit="MB", scale=1e6, report=job.report)
    names, summaries = [], {}

    kept = sum(finished_part(path.stem, parts, dtype) is not None for path in parts.glob("*.json"))
    if kept:
        job.report(f"data: going on with {kept} finished parts of an earlier run")

    def remaining() -> Iterator[Unit]:
        for unit in cut_into_units(job.sources, job.recipe.text_field):
            job.check()
            names.append(unit.name)
            if summary := finished_part(unit.name, parts, dtype):
                summaries[unit.name] = summary
                progress.skip(unit.input_bytes)
            else:
                yield unit

    work = Job(partial / "tokenizer", parts, job.recipe)
    with contextlib.closing(run_units(work, remaining(), job.workers, job.check)) as done:
        for unit in done:
            summaries[unit.name] = finished_part(unit.name, parts, dtype)
            if summaries[unit.name] is None:
                raise SpiralError(f"{parts / unit.name}: was removed while it was needed; run it again to go on")
            progress.advance(unit.input_bytes)
    return [Finished(name, summaries[name]) for name in names]


def _used(finished: Sequence[Finished], split: str) -> list[tuple[str, Counts]]:
    """The parts of a split in order, without those of text files that are left out."""
    left_out = {invalid.path for unit in finished for invalid in unit.summary.skipped_files}
    used = [(unit.name, unit.summary.counts[split]) for unit in finished if unit.summary.whole_file not in left_out]
    return [(name, counts) for name, counts in used if counts.tokens]


def _writer_stage(partial: Path, finished: Sequence[Finished], split: str, dtype) -> int | None:
    """How many parts of a split are in its store already, None if parts are missing."""
    used = _used(finished, split)
    there = [has_part(name, split, counts, partial / "parts", dtype) for name, counts in used]
    merged = there.index(True) if True in there else len(there)
    return merged if all(there[merged:]) else None


def _can_merge(partial: Path, finished: Sequence[Finished], tokenizer: Tokenizer) -> bool:
    """Whether every part is there, or in a store."""
    dtype = token_dtype(tokenizer.vocab_size)
    for split in SPLITS:
        store = partial / "whole" / split
        if (store / MANIFEST).exists():
            continue
        merged = _writer_stage(partial, finished, split, dtype)
        if merged is None:
            return False
        if merged and not StoreWriter.has(store, _total(_used(finished, split)[:merged]), dtype):
            return False
    return True


def _check_needed(partial: Path, job: Build, finished: Sequence[Finished]) -> None:
    for split, field in job.needed.items():
        if not _total(_used(finished, split)).documents:
            shutil.rmtree(partial, ignore_errors=True)
            result = _result(job, finished)
            skipped = result["skipped_records"] + result["skipped_files"]
            raise SpiralError(
                f"{field}: no text for {split}{f' ({skipped} skipped as invalid)' if skipped else ''}; "
                "allowed: at least one document that is not empty"
            )


def _merge(partial: Path, job: Build, tokenizer: Tokenizer, finished: Sequence[Finished]) -> None:
    """Moves the parts into the stores, in order; each is deleted once it is safely in."""
    dtype = token_dtype(tokenizer.vocab_size)
    (partial / "whole").mkdir(exist_ok=True)
    for split in SPLITS:
        store, used = partial / "whole" / split, _used(finished, split)
        if not used or (store / MANIFEST).exists():
            continue
        merged = _writer_stage(partial, finished, split, dtype)
        kept = _total(used[:merged]) if merged else None
        writer = StoreWriter(store, tokenizer, source=job.fingerprint, resume=kept)
        try:
            for name, counts in used[merged:]:
                job.check()
                tokens_N, ends_M = read_part(name, split, counts, partial / "parts", dtype)
                writer.extend(tokens_N, ends_M, counts)
                writer.sync()
                del tokens_N  # mapped: the space is free once nobody has it
                (partial / "parts" / f"{name}.{split}").unlink()
            writer.finish()
        finally:
            writer.close()


def _total(used: Sequence[tuple[str, Counts]]) -> Counts:
    return functools.reduce(lambda total, part: total + part[1], used, Counts())


def _result(job: Build, finished: Sequence[Finished]) -> dict:
    """What came of it, for people and for the next run."""
    records = [invalid for unit in finished for invalid in unit.summary.first_skipped]
    files = {invalid.path: invalid for unit in finished for invalid in reversed(unit.summary.skipped_files)}
    return {
        "format": "spiral_jax.prepared",
        "version": 1,
        "source": job.fingerprint,
        "splits": {split: dataclasses.asdict(_total(_used(finished, split))) for split in SPLITS},
        "skipped_records": sum(unit.summary.skipped for unit in finished),
        "skipped_files": len(files),
        "first_skipped": [invalid.describe() for invalid in [*files.values(), *records][:NAMED]],
    }
