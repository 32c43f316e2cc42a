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

# Of its models, trained on equal tokens, what a contrast may be matched in, and how far apart equal ones may be.
_AMOUNTS = {"parameters": "non_embedding_millions", "flops": "prefill_teraflop"}
_APART = 0.03

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


def differences(ours: Mapping[str, Entry], theirs: Mapping[str, Entry], matched: str) -> dict[str, float]:
    """By size, how much less the paper's first model loses on the Pile than its second, in nats per token.

    Args:
      ours: factors of the first; a size that the paper has not is answered with all of the paper's sizes.
      theirs: of the second.
      matched: see `Contrast.matched`. The paper's two models have to have as much of the same; nothing else compares.
    """
    if "change" in ours:
        return _nats({"410m": row_of(ours)}, {"410m": row_of(theirs)})
    if "task" in ours or matched not in _AMOUNTS:
        return {}
    sizes = list(dict.fromkeys(str(size) for size, _ in main_table()))
    own = str(ours.get("size", ""))
    of = [own] if own in sizes else sizes
    rows = [{size: row_of({**factors, "size": size}) for size in of} for factors in (ours, theirs)]
    return _nats(rows[0], rows[1], _AMOUNTS[matched])


def _nats(ours: dict[str, PaperRow], theirs: dict[str, PaperRow], amount: str = "") -> dict[str, float]:
    found = {}
    for size, row in ours.items():
        other = theirs[size]
        if row and other and (not amount or math.isclose(float(row[amount]), float(other[amount]), rel_tol=_APART)):
            found[size] = math.log(float(row["pile"]) / float(other["pile"]))
    return found


def _rows(name: str) -> list[PaperRow]:
    with (FOLDER / f"{name}.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))
