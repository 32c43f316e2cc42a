"""The papers' tables as data: rows are models that can be configured."""

import csv
import re
from pathlib import Path

import pytest

from experiments import pile
from spiral_jax.run.config import RunConfig

FOLDER = Path(__file__).parents[1] / "experiments" / "paper"


def rows(name: str) -> list[dict[str, str]]:
    with (FOLDER / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def test_main_table_is_complete():
    table = rows("main_table")
    assert len(table) == 22 and {row["size"] for row in table} == set(pile.SIZES)
    for row in table:
        assert all(float(row[name]) > 0 for name in row if name not in ("size", "family", "layers"))
    # What the paper claims: at every size Spiral-L is best on the Pile.
    for size in pile.SIZES:
        best = sorted((float(row["pile"]), row["family"]) for row in table if row["size"] == size)
        assert best[0][1] == "spiral_l"


@pytest.mark.parametrize("row", [row for row in rows("main_table") if row["family"] in pile.FAMILIES],
                         ids=lambda row: f"{row['size']}-{row['family']}")  # fmt: skip
def test_experiments_have_the_rows_layers(row):
    config = RunConfig.from_dict(pile.get_config(f"{row['size']},{row['family']}").to_dict())
    assert config.model.notation == row["layers"]


def test_ablation_changes_one_thing():
    table = rows("ablation")
    assert len(table) == 8 and table[0]["change"] == "main" and not table[0]["model_fields"]
    for row in table[1:]:
        config = pile.get_config("410m,spiral_b")
        for change in row["model_fields"].split("; "):
            name, value = change.split("=")
            config.model[name] = tuple(map(int, value.split())) if " " in value else value
        changed = RunConfig.from_dict(config.to_dict())
        assert changed.model != RunConfig.from_dict(pile.get_config("410m,spiral_b").to_dict()).model
        assert float(row["pile"]) > float(table[0]["pile"])


@pytest.mark.parametrize("row", rows("mesh_loops"), ids=lambda row: f"{row['size']}-{row['layers']}-{row['topology']}")
def test_loops_of_the_mesh_paper(row):
    prelude, core, resolutions, coda = re.fullmatch(r"(\d+)\+(\d+)x\{([1,]+)\}\+(\d+)", row["layers"]).groups()
    values = pile.get_config(f"{row['size']},{row['topology']}")
    values.model.prelude_layers, values.model.core_layers, values.model.coda_layers = map(int, (prelude, core, coda))
    values.model.chunks = tuple(map(int, resolutions.split(",")))
    if row["memory_slots"]:
        values.model.memory_slots = int(row["memory_slots"])
    assert RunConfig.from_dict(values.to_dict()).model.notation == row["layers"]
    assert 7 < float(row["pile"]) < 10
