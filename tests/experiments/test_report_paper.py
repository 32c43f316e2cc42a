"""The report beside the paper's own tables."""

import math
from pathlib import Path

import pytest
from study_records import write_records

from experiments import design
from experiments.design import Study
from experiments.report import paper, tables
from experiments.report.evidence import gather
from experiments.report.findings import findings
from experiments.statistics import Interval
from spiral_jax.evaluation.catalogue import PAPER


def test_the_papers_differences_are_of_models_that_are_matched_alike():
    def of(ours, theirs, matched="parameters"):
        return paper.differences({"family": ours}, {"family": theirs}, matched)

    assert list(of("spiral_l", "vanilla")) == ["160m", "410m", "1b", "1.4b"]
    assert of("mesh", "vanilla") == {}  # of which the loop has two thirds of the parameters
    assert list(of("mesh", "vanilla", "flops")) == ["160m", "410m", "1b", "1.4b"]
    assert of("spiral_l", "vanilla", "seconds") == {}


@pytest.fixture(scope="module")
def papers(tmp_path_factory) -> tuple[Study, Path]:
    """The full main table, run at 410M alone, with the paper's perplexities."""
    study = design.load("main_table", "full")
    table = paper.main_table()
    folder = tmp_path_factory.mktemp("full")
    rows = {one.name: table[one.factors["size"], one.factors["family"]] for one in study.arms}
    write_records(study, folder, lambda run: math.log(float(rows[run.arm.name]["pile"]))
                  if run.arm.factors["size"] == "410m" else math.nan)  # fmt: skip
    return study, folder


def test_table_1_beside_the_papers(papers):
    evidence = gather(*papers)
    table = tables.main_table(findings(evidence), evidence)
    found = {row["arm"]: row for row in table.rows}
    assert len(found) == 22
    ours = found["410m-spiral_l"]
    assert (ours["pile_paper"], ours["non_embedding_millions_paper"], ours["prefill_teraflop_paper"]) == (
        8.73,
        302.4,
        4.16,
    )
    assert ours["pile_difference"] == pytest.approx(0, abs=1e-9)
    assert abs(ours["non_embedding_millions_difference"]) < 0.05 and abs(ours["prefill_teraflop_difference"]) < 0.05
    assert math.isnan(ours["five_shot_ours"])  # no task was asked
    assert math.isnan(found["1b-mesh"]["pile_ours"]) and found["1b-mesh"]["pile_paper"] == 7.90
    assert [column.title for column in table.columns if column.key.startswith("five_shot")][:2] == [
        "5-shot, ours", "5-shot, paper",
    ]  # fmt: skip
    by_name = {finding.contrast.arm: finding for finding in findings(evidence)}
    interval = by_name["410m-spiral_l"].interval
    assert isinstance(interval, Interval)
    assert interval.mean == pytest.approx(math.log(8.73 / 9.07), abs=1e-3)
    assert by_name["410m-spiral_l"].label == "not resolved"  # one seed


def test_tasks_beside_the_papers():
    accuracies = {f"{task}/{metric}": 0.3 + i / 100 for i, (task, metric) in enumerate(PAPER.items())}
    others = {"wikitext/word_perplexity": 30.0, "lambada_openai/perplexity": 40.0}
    found = paper.of_tasks({"0": accuracies | others, "5": dict(list(accuracies.items())[:8])})
    assert found == {"wikitext": 30.0, "lambada_openai": 40.0, "zero_shot": pytest.approx(34.0)}  # 5: not all nine


def test_table_2_beside_the_papers(tmp_path):
    study = design.load("ablation", "full")
    table = paper.ablation()
    write_records(study, tmp_path, lambda run: math.log(float(table[run.arm.factors["change"]]["pile"])))
    evidence = gather(study, tmp_path)
    found = {row["change"]: row for row in tables.ablation(findings(evidence), evidence).rows}
    assert len(found) == 8 and found["main"]["difference"] == "main"
    for change, row in found.items():
        if change != "main":
            assert row["difference"] == pytest.approx(math.log(float(table[change]["pile"]) / 9.00), abs=1e-3)
            assert row["paper_difference"] == pytest.approx(math.log(float(table[change]["pile"]) / 9.00))
