"""Writes what follows from tpu/predictions into its README.md and into costs.md: `python -m tpu.table`."""

import argparse
import json
from pathlib import Path

from spiral_jax import describe
from spiral_jax.data import atomic

FOLDER = Path(__file__).parent
COLUMNS = (
    "point", "remat, core", "GiB of usable", "FLOP executed / model", "gathered, summed GiB", "seconds", "limit", "MFU",
    "tokens/s/chip",
)  # fmt: skip


def tables() -> dict[Path, str]:
    """The table of each page."""
    points = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in FOLDER.glob("predictions/*.json")}
    rows = [COLUMNS, ("---",) * len(COLUMNS), *(_row(name, points[name]) for name in sorted(points))]
    costs = describe.costs_as_text(describe.costs())
    return {
        FOLDER / "predictions" / "README.md": "".join(f"| {' | '.join(cells)} |\n" for cells in rows),
        FOLDER / "costs.md": "".join(line + "\n" for line in costs.splitlines() if line.startswith("|")),
    }


def replaced(page: str, table: str) -> str:
    """A page with the table that has the same first line, the rows below it as they are now."""
    before, head, rest = page.partition(table.partition("\n")[0] + "\n")
    if not head:
        raise ValueError("the page has no such table")
    _, _, after = rest.partition("\n\n")
    return before + table + "\n" + after


def _row(name: str, found: dict) -> tuple[str, ...]:
    step, held, sent, guess = (found[key] for key in ("step", "memory", "communication_per_device", "prediction"))
    return (
        name,
        f"{step['remat']}, {step['gather_core']}",
        f"{held['peak_bytes'] / 2**30:.1f} of {held['usable_bytes'] / 2**30:.2f}",
        f"{found['flops']['dense_executed_over_model']:.3f}",
        f"{sent['gathered_bytes'] / 2**30:.2f}, {sent['summed_bytes'] / 2**30:.2f}",
        f"{guess['step_seconds']:.3f}",
        guess["bound"],
        f"{guess['mfu']:.1%} ({guess['mfu_full_attention']:.1%})",
        f"{guess['tokens_per_second_per_chip']:,.0f}",
    )


def main() -> None:
    argparse.ArgumentParser("python -m tpu.table", description=__doc__).parse_args()
    for page, table in tables().items():
        atomic.write_text(page, replaced(page.read_text(encoding="utf-8"), table))


if __name__ == "__main__":
    main()
