"""A finished folder of stores: what it says of itself, whether it is what is wanted, how it comes onto a bucket."""

import dataclasses
import shutil
import threading
from pathlib import Path
from typing import Any

from etils import epath

from spiral_jax.corpus.parts import SPLITS, json_or_none
from spiral_jax.data.bucket import is_folder, refusals, upload
from spiral_jax.data.exclusive import Check
from spiral_jax.data.json_files import read_json_object
from spiral_jax.data.store_writer import Counts
from spiral_jax.errors import SpiralError
from spiral_jax.progress import Progress, Report

RESULT = "prepared.json"
# On a bucket while the folder is being made: what comes there then is not whole.
MARK = "preparing.json"


def read_result(folder: Path | epath.Path) -> dict[str, Any]:
    """What `prepared.json` says, or nothing if it is missing or damaged."""
    content = json_or_none(folder / RESULT)
    try:
        counts = [Counts(**content["splits"][split]) for split in SPLITS]
        numbers = [number for found in counts for number in dataclasses.astuple(found)]
        return content if all(isinstance(number, int) for number in numbers) else {}
    except (KeyError, TypeError, AttributeError):
        return {}


def is_made(place: epath.Path, fingerprint: str) -> bool:
    """Whether a folder is there, rather than new, empty, or on a bucket and still being made.

    Raises:
      SpiralError: it holds something else than what `fingerprint` stands for, or cannot be read.
    """
    with refusals(place, lambda why: f"{place} cannot be read ({why})"):
        there = is_folder(place)
        if not there and place.exists():
            raise SpiralError(f"{place} is a file; allowed: a new or an empty folder")
        names = {path.name for path in place.iterdir()} if there else set()
    if not names:
        return False
    says = next((name for name in (MARK, RESULT) if name in names), None)
    if says is None or read_json_object(place / says).get("source") != fingerprint:
        what = "stores of other input or options" if says else "other files"
        raise SpiralError(f"{place} holds {what}; allowed: a new or an empty folder")
    return says == RESULT


def describe(folder: Path | epath.Path) -> str:
    """The statistics of a folder of stores, in a line."""

    def numbers(counts: dict[str, int]) -> str:
        if not counts["documents"]:
            return "none"
        ratio = counts["utf8_bytes"] / counts["tokens"]
        return f"{counts['documents']:,} documents, {counts['tokens']:,} tokens, {ratio:.2f} bytes per token"

    return "; ".join(f"{split} {numbers(counts)}" for split, counts in read_result(folder)["splits"].items())


def copy_to_bucket(folder: Path, place: epath.Path, report: Report, check: Check) -> None:
    """Copies a finished folder to a bucket, from where MARK is then gone, and removes it here.

    Raises:
      SpiralError: the bucket refuses; what has been copied is not copied again by the next call.
    """
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    progress, lock = Progress(f"data: copying to {place}", total, unit="MB", scale=1e6, report=report), threading.Lock()

    def copied(size: int) -> None:
        with lock:
            check()
            progress.advance(size)

    with refusals(place, lambda why: f"{place} cannot be written ({why}); the same command goes on, with {folder}"):
        upload(folder, place, alone=True, copied=copied)
    shutil.rmtree(folder)
    report(f"data: copied to {place}")
