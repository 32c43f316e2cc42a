"""The paper's tables, for a report to set beside its own."""

import csv
import math
import statistics
from collections.abc import Mapping
from pathlib import Path

from experiments.record import Entry
from spiral_jax.evaluation.catalogue import PAPER

FOLDER = Path(__file__).parents[1] / "paper"
# Columns of its tables, as they are headed there.
COLUMNS = {"pile": "Pile", "wikitext": "Wiki", "lambada_openai": "LD-O", "lambada_standard": "LD-S",
           "zero_shot": "0-shot", "five_shot": "5-shot"}  # fmt: skip
_PERPLEXITIES = {"wikitext": "wikitext/word_perplexity", "lambada_openai": "lambada_openai/perplexity",
                 "lambada_standard": "lambada_standard/perplexity"}  # fmt: skip

PaperRow = dict[str, str]


def main_table() -> dict[tuple[Entry, Entry], PaperRow]:
    """Table 1 by size and family."""
    return {(row["size"], row["family"]): row for row in _rows("main_table")}


def ablation() -> dict[Entry, PaperRow]:
    """Table 2 by what was changed."""
    return {row["change"]: row for row in _rows("ablation")}


def row_of(factors: Mapping[str, Entry]) -> PaperRow:
    """The paper's row that an arm is; empty where it is none."""
    if "change" in factors:
        return ablation().get(factors["change"], {})
    return main_table().get((factors.get("size", ""), factors.get("family", "")), {})


def of_tasks(tasks: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Columns of the tables that the tasks of a record give: perplexities, and accuracies over all nine in per cent."""
    plain = tasks.get("0", {})
    found = {column: plain[name] for column, name in _PERPLEXITIES.items() if name in plain}
    for column, shots in (("zero_shot", "0"), ("five_shot", "5")):
        names = [f"{task}/{metric}" for task, metric in PAPER.items()]
        if tasks.get(shots, {}).keys() >= set(names):  # a mean over fewer is of something else
            found[column] = 100 * statistics.fmean(tasks[shots][name] for name in names)
    return found


def differences(ours: Mapping[str, Entry], theirs: Mapping[str, Entry]) -> dict[str, float]:
    """By size, how much less the paper's first model loses on the Pile than its second, in nats per token.

    Args:
      ours: factors of the first; a size that the paper has not is answered with all of the paper's sizes.
      theirs: of the second.
    """
    if "change" in ours:
        return _nats({"410m": row_of(ours)}, {"410m": row_of(theirs)})
    sizes = list(dict.fromkeys(str(size) for size, _ in main_table()))
    own = str(ours.get("size", ""))
    return _nats(*({size: row_of({**factors, "size": size}) for size in ([own] if own in sizes else sizes)}
                   for factors in (ours, theirs)))  # fmt: skip


def _nats(ours: dict[str, PaperRow], theirs: dict[str, PaperRow]) -> dict[str, float]:
    return {size: math.log(float(row["pile"]) / float(theirs[size]["pile"])) for size, row in ours.items()
            if row and theirs[size]}  # fmt: skip


def _rows(name: str) -> list[PaperRow]:
    with (FOLDER / f"{name}.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))
