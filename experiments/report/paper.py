"""The paper's tables, for a report to set beside its own."""

import csv
import math
from pathlib import Path

from experiments.record import Entry

FOLDER = Path(__file__).parents[1] / "paper"
TEXTS = {"pile": "Pile", "wikitext": "Wiki", "lambada_openai": "LD-O", "lambada_standard": "LD-S"}
TASKS = {"zero_shot": "0-shot", "five_shot": "5-shot"}

PaperRow = dict[str, str]


def main_table() -> dict[tuple[Entry, Entry], PaperRow]:
    """Table 1 by size and family."""
    return {(row["size"], row["family"]): row for row in _rows("main_table")}


def ablation() -> dict[Entry, PaperRow]:
    """Table 2 by what was changed."""
    return {row["change"]: row for row in _rows("ablation")}


def row_of(factors: dict[str, Entry]) -> PaperRow:
    """The paper's row that an arm is; empty where it is none."""
    if "change" in factors:
        return ablation().get(factors["change"], {})
    return main_table().get((factors.get("size", ""), factors.get("family", "")), {})


def differences(ours: dict[str, Entry], theirs: dict[str, Entry]) -> dict[str, float]:
    """By size, how much less the paper's first model loses on the Pile than its second, in nats per token.

    Args:
      ours: factors of the first; a size that the paper has not is answered with all of the paper's sizes.
      theirs: of the second.
    """
    if "change" in ours:
        rows = ablation()
        pair = rows.get(ours["change"]), rows.get(theirs.get("change", ""))
        return {"410m": _nats(*pair)} if pair[0] and pair[1] else {}
    table, sizes = main_table(), []
    for size, _ in table:
        if size not in sizes:
            sizes.append(size)
    pairs = {size: [table.get((size, factors.get("family", ""))) for factors in (ours, theirs)] for size in sizes}
    found = {str(size): _nats(*pair) for size, pair in pairs.items() if all(pair)}
    size = str(ours.get("size", ""))
    return {size: found[size]} if size in found else found


def _nats(ours: PaperRow, theirs: PaperRow) -> float:
    return math.log(float(ours["pile"]) / float(theirs["pile"]))


def _rows(name: str) -> list[PaperRow]:
    with (FOLDER / f"{name}.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))
