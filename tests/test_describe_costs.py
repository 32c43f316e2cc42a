"""What the papers' main table would take on TPUs, by predictions."""

import csv
import json
from pathlib import Path

import pytest
from verbs import call

from spiral_jax import describe

ROOT = Path(__file__).parents[1]
POINT = json.loads((ROOT / "tpu/predictions/1.4b-v5p-4x4x4-spiral_b.json").read_text())


def test_chip_hours_of_the_main_table(capsys):
    assert call(describe, "--costs", "--json") == (0, "")
    rows = json.loads(capsys.readouterr().out)
    paper = list(csv.DictReader((ROOT / describe.MAIN_TABLE).open()))
    assert [(row["size"], row["family"]) for row in rows] == [(row["size"], row["family"]) for row in paper]
    by_name = {f"{row['size']} {row['family']}": row for row in rows}
    # A compiled point's own: its predicted seconds, 120,818 times, on 64 chips.
    own = by_name["1.4b spiral_b"]["v5p:4x4x4"]
    assert own["own_point"] and own["chip_hours"] == pytest.approx(
        POINT["prediction"]["step_seconds"] * 120_818 * 64 / 3600, rel=1e-6
    )
    assert sum(row[name]["own_point"] for row in rows for name in row if ":" in name) == len(
        list((ROOT / "tpu/predictions").glob("*.json"))
    )
    # A neighbour's MFU, of the same resolutions; at least the time at the peak.
    near = by_name["410m spiral_b_anchor"]["v6e:8x8"]
    assert not near["own_point"] and near["point"].startswith(("410m-v6e", "160m-v6e"))
    assert near["chip_hours"] > by_name["410m spiral_b_anchor"]["flops"] / 918e12 / 3600
    # Six FLOPs a parameter and token, and attention: what anybody would estimate.
    row = by_name["1.4b vanilla"]
    assert 1 < row["flops"] / (6 * 1.4149e9 * 120_818 * 2**21) < 1.2


def test_costs_need_a_checkout(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    status, errors = call(describe, "--costs")
    assert status == 2 and "main_table.csv does not exist; allowed: --costs in a checkout's folder" in errors


def test_the_page_has_what_the_command_prints(capsys):
    assert call(describe, "--costs") == (0, "")
    assert capsys.readouterr().out in (ROOT / "tpu" / "costs.md").read_text(encoding="utf-8")


def test_packages_that_fields_ask_for(capsys):
    """As the extras' own checks have them: what they import is what is named."""
    assert call(describe, "--config=experiments/quickstart.py", "--config.logging.wandb=mine", "--json") == (0, "")
    assert json.loads(capsys.readouterr().out)["extras"] == {"logging.wandb": "wandb", "summary.plot": "matplotlib"}
