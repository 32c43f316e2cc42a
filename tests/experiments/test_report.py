"""The report of a study, from records whose losses are known."""

import csv
import dataclasses
import html.parser
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from study_records import noise, record_of, write_records

from experiments import design, record
from experiments.design import Arm, Contrast, Gate, Run, Study
from experiments.record import Code, Seconds
from experiments.report import figures, tables
from experiments.report.document import Figure
from experiments.report.evidence import gather
from experiments.report.findings import AtLeast, Finding, Missing, OnTheCurve, findings, gain
from experiments.report.write import write_report
from spiral_jax.errors import SpiralError
from spiral_jax.run.config import default_config

RATES = (1e-3, 2e-3, 4e-3)
NATS = {"vanilla": 4.40, "mesh": 4.41, "spiral_l": 4.28}


def arm(family: str, steps: int = 40, **factors) -> Arm:
    values = default_config()
    values.model.vocab_size, values.model.d_model, values.model.num_heads = 64, 16, 2
    layers, chunks = {"vanilla": ((4, 0, 0), ()), "mesh": ((1, 2, 1), (1, 1)), "spiral_l": ((1, 2, 1), (4, 2))}[family]
    values.model.prelude_layers, values.model.core_layers, values.model.coda_layers = layers
    values.model.chunks, values.model.topology = chunks, "mesh" if chunks else "base"
    values.train.batch_size, values.train.sequence_length, values.train.steps = 2, 32, steps
    return Arm("-".join([family, *map(str, factors.values())]), values, {"family": family, **factors})


@pytest.fixture(scope="module")
def study() -> Study:
    return Study(
        name="trial",
        edition="small",
        question="Is `spiral_l` <better>?",
        arms=tuple(map(arm, NATS)),
        primary=Contrast("spiral_l", "vanilla"),
        others=(Contrast("mesh", "vanilla"), Contrast("spiral_l", "mesh")),
        learning_rates=RATES,
        gates=(Gate("vanilla-lr0.001", 4.6, "a trial"),),
    )


def truth(run: Run) -> float:
    """2e-3 is best for all but spiral_l, which has 4e-3, the edge; mesh differs from vanilla by luck alone."""
    best = 4e-3 if run.arm.name == "spiral_l" else 2e-3
    tuned = 0.0 if run.stage == "seed" else 0.1 * abs(math.log2(run.learning_rate / best))
    return NATS[run.arm.name] + tuned + 0.02 * noise(run)


@pytest.fixture(scope="module")
def written(study, tmp_path_factory) -> Path:
    """Folder of all records."""
    folder = tmp_path_factory.mktemp("trial") / "records"
    write_records(study, folder, truth)
    return folder


@pytest.fixture
def folder(written, tmp_path) -> Path:
    """A copy to damage."""
    copy = tmp_path / "records"
    copy.mkdir()
    for path in written.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


@pytest.fixture(scope="module")
def report(study, written) -> Path:
    return write_report(study, written).parent


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_contrasts_are_those_of_the_losses(report, written):
    """Not of the documents' as they are kept, in float16."""
    table = {(row["arm"], row["against"]): row for row in rows(report / "contrasts.csv")}
    means = []
    for seed in (1, 2, 3):
        ours, theirs = (
            json.loads((written / f"{name}-seed{seed}.json").read_text())["evaluation"]["validation"]
            for name in ("spiral_l", "vanilla")
        )
        means.append(ours["nats"] - theirs["nats"])
    row = table["spiral_l", "vanilla"]
    low, high = stats.t.interval(0.95, 2, np.mean(means), stats.sem(means))
    assert [float(row[name]) for name in ("mean", "low", "high")] == pytest.approx(
        [np.mean(means), low, high], rel=1e-9
    )
    assert [float(row[f"seed_{seed}"]) for seed in (1, 2, 3)] == pytest.approx(means, rel=1e-9)
    assert -0.2 < float(row["low"]) < float(row["high"]) < 0 and row["label"] == "replicated (primary)"
    assert table["mesh", "vanilla"]["label"] == "not resolved"
    assert table["spiral_l", "mesh"]["label"] == "exploratory"
    assert "spiral_l is the highest tried" in row["remarks"]
    # The paper's differences at its four sizes, as none of these models is one of them.
    assert row["paper"] == f"{math.log(7.64 / 7.96):+.3f} to {math.log(10.94 / 11.31):+.3f}"


def test_what_the_page_says(report):
    text = (report / "README.md").read_text(encoding="utf-8")
    assert "`spiral_l`: the best learning rate is the highest of 0.001, 0.002, 0.004" in text
    assert "`vanilla-lr0.001`: at most 4.6000 nats (a trial): 4." in text and ", passed" in text
    assert "`mesh` against `vanilla`" in text.split("## Negative and open results")[1].split("##")[0]
    assert "missing: recurrence-ratio curve" in text and "missing: accuracy by depth" in text
    for name in (path.stem for path in report.parent.glob("records/*.json")):
        assert f"python -m experiments.study run trial --edition=small --only={name}" in text
    # Every picture and table that is named is there, and nothing else.
    named = {f"{name}.png" for name in ("contrasts", "loss_curves", "learning_rates", "loss_flops", "pareto")}
    named |= {f"{name}.csv" for name in ("contrasts", "matchings", "main_table", "learning_rates", "runs")}
    assert {path.name for path in report.iterdir()} == named | {"README.md", "index.html"}
    assert all(name in text for name in named)


class Reader(html.parser.HTMLParser):
    """Balances tags and keeps what a browser would fetch."""

    EMPTY = ("meta", "img", "br")

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.fetched += [value for name, value in attrs if name in ("src", "href") and value]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_html_page_needs_nothing_else(report):
    content = (report / "index.html").read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(content)
    assert not reader.open and len(reader.fetched) == 5
    assert all(value.startswith("data:image/png;base64,") for value in reader.fetched)
    assert "url(" not in content and "@import" not in content and "<script" not in content
    assert "Is <code>spiral_l</code> &lt;better&gt;?" in content
    assert all(path.stat().st_size < 1_000_000 for path in report.iterdir())


def test_the_same_records_give_the_same_bytes(report, study, written):
    before = {path.name: path.read_bytes() for path in report.iterdir()}
    (report / "stale.png").write_bytes(b"of an earlier report")
    write_report(study, written)
    assert {path.name: path.read_bytes() for path in report.iterdir()} == before


def changed(folder: Path, name: str, **fields) -> None:
    record.write(dataclasses.replace(record.read(folder / f"{name}.json"), **fields), folder)


def test_strangers_are_named_and_not_averaged(study, folder):
    (folder / "spiral_l-seed1.json").write_text('{"format": 1, "study"')
    values = json.loads((folder / "spiral_l-seed2.json").read_text())
    values["evaluation"]["validation"]["nats"] = "low"
    (folder / "spiral_l-seed2.json").write_text(json.dumps(values))
    worse = {
        "validation": dataclasses.replace(record.read(folder / "mesh-seed1.json").evaluation["validation"], nats=99.0)
    }
    changed(folder, "mesh-seed1", code=Code("b" * 40, "", "0ther"), evaluation=worse)
    changed(folder, "mesh-seed2", data={"train": "0ther", "validation": "va11d"}, evaluation=worse)
    config = record.read(folder / "vanilla-seed1.json").config | {"train.steps": 41}
    changed(folder, "vanilla-seed1", config=config, evaluation=worse)
    record.write(dataclasses.replace(record.read(folder / "vanilla-seed2.json"), run="vanilla-seed9"), folder)
    changed(folder, "vanilla-seed3", study="another", evaluation=worse)
    evidence = gather(study, folder)
    said = "\n".join(evidence.left_out)
    for line in (
        "spiral_l-seed1.json is not JSON",
        "spiral_l-seed2.json: evaluation.validation.nats is 'low'; allowed:",
        "mesh-seed1: was run with other code (0ther, not c0de as",
        "mesh-seed2: was run with other data (train 0ther, validation va11d, not train 7ra1n, validation va11d as",
        "vanilla-seed1: was run with another configuration (",
        "train.steps was 41 and is 40",
        "vanilla-seed9: is no run of this study as it is declared now",
        "vanilla-seed3: is of another small, not of trial small",
    ):
        assert line in said
    assert len(evidence.left_out) == 7
    assert {name: list(found.runs) for name, found in evidence.arms.items()} == {
        "vanilla": [2], "mesh": [3], "spiral_l": [3],
    }  # fmt: skip
    assert all(nats < 5 for found in evidence.arms.values() for nats in found.nats())


def test_a_study_of_two_tasks(tmp_path):
    """Whose runs share a configuration hash: each task has data, depths, curves and fronts of its own."""
    study = design.load("hierarchy", "small")
    depths = {"listops": {"1": (40, 40), "8": (10, 40)}, "cfg3b": {"3": (20, 40)}}
    write_records(
        study,
        tmp_path,
        lambda run: {"vanilla": 4.0, "mesh": 3.9, "spiral_l": 3.8}[run.arm.factors["family"]] + 0.01 * noise(run),
        lambda run: {
            "data": {run.arm.factors["task"]: "made on the fly"},
            "by_depth": {run.arm.factors["task"]: depths[run.arm.factors["task"]]} if run.stage == "seed" else {},
        },
    )
    evidence = gather(study, tmp_path)
    assert not evidence.left_out and len(evidence.records) == len(study.runs())
    found = findings(evidence)
    assert {finding.label for finding in found} == {"exploratory"}  # the study says so, the primary one included
    assert {row["arm"] for row in tables.matchings(found, evidence).rows} >= {"listops spiral_l", "cfg3b spiral_l"}
    assert all(row["paper"] == "-" for row in tables.contrasts(found, evidence).rows)
    for row in tables.depths(evidence).rows:
        others = {"1", "8"} if row["task"] == "cfg3b" else {"3"}
        assert {key for key in ("1", "3", "8") if row[key] == "-"} == others
    for row in tables.main_table(found, evidence).rows:
        above = row["nats"] - 0.428133 if row["arm"].startswith("cfg3b") else "-"
        assert row["above_floor"] == (above if above == "-" else pytest.approx(above))
    assert len({figures.series(arm) for arm in evidence.arms.values()}) == 6
    assert isinstance(figures.pareto_fronts(evidence, figures.Colours(evidence)), Figure)


def test_what_is_missing_is_shown(study, folder):
    for seed in (1, 2, 3):
        (folder / f"vanilla-seed{seed}.json").unlink()
    changed(folder, "mesh-seed2", status="diverged", reason="loss is nan at step 7", evaluation={}, data={})
    page = write_report(study, folder).with_name("README.md").read_text(encoding="utf-8")
    assert "Runs: 14 of 18 finished" in page
    assert "`mesh-seed2` diverged: loss is nan at step 7" in page
    assert "- `vanilla-seed3`: `python -m experiments.study run trial --edition=small --only=vanilla-seed3`" in page
    assert "missing: no finished run of vanilla" in page
    row = next(row for row in rows(folder.parent / "report" / "main_table.csv") if row["arm"] == "vanilla")
    assert (row["seeds"], row["nats"]) == ("0 of 3", "")


def test_seeds_that_diverged_leave_a_choice(study, tmp_path):
    """Three pairs of four are left: were the fourth lost otherwise, the contrast would count as replicated."""
    four = dataclasses.replace(study, seeds=(1, 2, 3, 4))
    write_records(four, tmp_path, truth)
    for status, label in (("failed", "replicated"), ("diverged", "exploratory")):
        changed(tmp_path, "spiral_l-seed4", status=status, reason="lost", evaluation={}, data={})
        primary = findings(gather(four, tmp_path))[0]
        assert primary.label == label and list(primary.of_seeds) == [1, 2, 3]
    assert "spiral_l diverged with seed 4: the others are a choice" in primary.remarks


def test_a_run_that_lost_its_curve(study, folder):
    changed(folder, "mesh-seed2", curve=())
    assert b"PNG" in write_report(study, folder).with_name("loss_curves.png").read_bytes()


def test_a_report_of_nothing(study, tmp_path):
    page = write_report(study, tmp_path / "records", "my/trial.py").with_name("README.md").read_text(encoding="utf-8")
    assert "`python -m experiments.study run my/trial.py --edition=small --only=mesh-seed2`" in page
    assert "Runs: 0 of 18 finished" in page and "missing: no finished run of spiral_l and vanilla" in page


def test_exploratory_studies_replicate_nothing(study, written):
    found = findings(gather(dataclasses.replace(study, exploratory=True), written))
    assert [finding.label for finding in found] == ["exploratory", "not resolved", "exploratory"]


def test_documents_that_differ_are_no_pair(study, folder):
    evaluation = record.read(folder / "vanilla-seed1.json").evaluation["validation"]
    other = dataclasses.replace(evaluation, tokens=tuple(n + 1 for n in evaluation.tokens))
    changed(folder, "vanilla-seed1", evaluation={"validation": other})
    primary = findings(gather(study, folder))[0]
    assert list(primary.of_seeds) == [2, 3] and primary.label != "replicated"
    assert "seed 1 was evaluated on other documents" in primary.remarks


def test_without_matplotlib_there_is_a_line(study, written, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SpiralError, match=r"need matplotlib: pip install 'spiral_jax\[plot\]'"):
        write_report(study, written)


SMALL = dict(name="trial", edition="small", question="?", seeds=(1, 2, 3), slices=("v5e:1x1",))


def budgets(*, steps: dict[str, tuple[int, ...]], primary: Contrast, others: tuple[Contrast, ...] = ()) -> Study:
    arms = tuple(arm(family, n, length=n) for family, several in steps.items() for n in several)
    return Study(**SMALL, arms=arms, primary=primary, others=others)


def gains(study: Study, folder: Path, truth) -> dict[str, object]:
    write_records(study, folder, truth)
    evidence = gather(study, folder)
    found = findings(evidence)
    return {of: gain(of, found, evidence) for of in tables.MATCHINGS}


def test_gain_of_pairs_and_bounds(tmp_path):
    """A pair for each cost that there is one for; the better arm took fewer FLOPs, but more seconds here."""
    study = budgets(steps={"spiral_l": (40,), "vanilla": (40,)}, primary=Contrast("spiral_l-40", "vanilla-40"))
    found = gains(study, tmp_path, lambda run: 4.0 if run.arm.factors["family"] == "spiral_l" else 4.1)
    assert isinstance(found["parameters"], Finding) and found["parameters"].primary
    assert isinstance(found["flops"], AtLeast) and found["flops"].ratio < 0.97
    assert isinstance(found["measured"], Missing)
    # Were it worse, its FLOPs would say nothing, and its seconds that it is at least so much worse.
    found = gains(study, tmp_path, lambda run: 4.2 if run.arm.factors["family"] == "spiral_l" else 4.1)
    assert isinstance(found["flops"], Missing) and isinstance(found["measured"], AtLeast)


def test_fewer_parameters_are_no_bound(tmp_path):
    """With as many FLOPs a larger model takes fewer tokens: nothing says that it would not be worse."""
    contrast = Contrast("spiral_l-40", "vanilla-35", matched="flops")
    study = budgets(steps={"spiral_l": (40,), "vanilla": (35,)}, primary=contrast)
    write_records(study, tmp_path, lambda run: 4.0 if run.arm.factors["family"] == "spiral_l" else 4.1)
    evidence = gather(study, tmp_path)
    found = findings(evidence)
    fewer = [dataclasses.replace(one, ratios=one.ratios | {"parameters": 0.67}) for one in found]
    assert isinstance(gain("parameters", fewer, evidence), Missing)


def test_gain_by_another_arm_or_the_curve(tmp_path):
    matched = budgets(
        steps={"spiral_l": (40,), "vanilla": (20, 30, 35, 40, 80)},
        primary=Contrast("spiral_l-40", "vanilla-40"),
        others=(Contrast("spiral_l-40", "vanilla-35", matched="flops"),),
    )
    flops = {one.name: matching_flops(one) for one in matched.arms}

    def law(run: Run) -> float:
        return 4.0 * (flops[run.arm.name] / flops["vanilla-40"]) ** -0.1 + (0.05 if "spiral" in run.arm.name else 0.0)

    found = gains(matched, tmp_path / "matched", law)
    assert isinstance(found["flops"], Finding) and found["flops"].contrast.against == "vanilla-35"
    alone = dataclasses.replace(matched, others=())
    found = gains(alone, tmp_path / "alone", law)
    assert isinstance(found["flops"], OnTheCurve)
    assert found["flops"].nats == pytest.approx(0.05, abs=1e-6) and found["flops"].seeds == 3


def matching_flops(one: Arm) -> float:
    train = one.config.train
    return one.config.model.train_flops_per_token(train.sequence_length) * train.steps * train.tokens_per_step


def test_measured_seconds_that_are_equal_are_a_pair(tmp_path):
    study = budgets(steps={"spiral_l": (40,), "vanilla": (40,)}, primary=Contrast("spiral_l-40", "vanilla-40"))
    write_records(study, tmp_path, lambda run: 4.0, lambda run: {"seconds": Seconds(60.0, {})})
    evidence = gather(study, tmp_path)
    found = gain("measured", findings(evidence), evidence)
    assert isinstance(found, Finding)
    assert tables._gain(found, "measured").endswith("), not resolved")
    assert isinstance(gain("predicted", findings(evidence), evidence), Missing)


def test_ratio_and_budget(tmp_path):
    arms = [arm("spiral_l", steps, ratio=ratio, budget=budget)
            for budget, steps in ((1e9, 20), (2e9, 40)) for ratio in (0.0, 0.5)]  # fmt: skip
    study = Study(**SMALL, arms=tuple(arms), primary=Contrast(arms[3].name, arms[2].name, matched="flops"))
    write_records(study, tmp_path, lambda run: 4.0 - 0.1 * run.arm.factors["ratio"])
    evidence = gather(study, tmp_path)
    assert isinstance(figures.recurrence_ratio(evidence), Figure)
    assert [figures.series(one) for one in evidence.arms.values()] == ["ratio 0", "ratio 0.5"] * 2


def test_accuracy_by_depth(study, folder):
    by_depth = {"listops": {"2": (30, 40), "10": (10, 40)}}
    for name in ("vanilla", "spiral_l"):
        for seed in (1, 2, 3):
            changed(folder, f"{name}-seed{seed}", by_depth=by_depth if seed < 3 else {"listops": {"2": (40, 40)}})
    evidence = gather(study, folder)
    row = tables.depths(evidence).rows[0]
    assert row["2"] == pytest.approx(100 * (0.75 + 0.75 + 1) / 3) and row["10"] == 25.0
    assert row["2_spread"] == pytest.approx(100 * np.std([0.75, 0.75, 1], ddof=1)) and row["10_spread"] == 0
    assert [column.key for column in tables.depths(evidence).columns] == ["arm", "task", "seeds", "2", "10"]
    for draw in (figures.accuracy_by_depth, figures.accuracy_against_parameters):
        assert isinstance(draw(evidence, figures.Colours(evidence)), Figure)


def test_records_are_of_the_declared_form(study):
    """What the tests above are made of is what a runner writes."""
    run = study.runs()[0]
    assert design.difference(record_of(study, run, 4.0), run) == ""
