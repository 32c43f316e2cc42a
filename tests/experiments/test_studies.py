"""Every study builds: configurations, shapes, matched arms; the full ones have the papers' numbers."""

import csv
import dataclasses
import functools
import json
import re
from pathlib import Path

import jax
import pytest
from cases import slow

from experiments import matching, quickstart, study
from experiments.design import STUDIES, Arm, Contrast, Study, load
from experiments.elsewhere import job_name
from experiments.record import RESULTS
from experiments.report.evidence import gather
from spiral_jax.errors import SpiralError
from spiral_jax.model.config import ModelConfig
from spiral_jax.model.spiralformer import abstract_params
from tpu.several import read_entries

NAMES = sorted(path.stem for path in STUDIES.glob("*.py"))
OTHERS = [name for name in NAMES if name != "main_table"]
PAPER = Path(study.__file__).parent / "paper"
read = functools.cache(load)


@functools.cache
def counted(model: ModelConfig) -> int:
    """Parameters by shapes alone."""
    return sum(x.size for x in jax.tree.leaves(abstract_params(model)))


@pytest.fixture(autouse=True, scope="module")
def _no_search():
    """For the Python sources of the machine, which takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quickstart, "python_sources", lambda: (("somewhere",), ()))
        yield


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("edition", ["small", "full"])
def test_every_run_is_allowed_and_matched(name, edition):
    found = read(name, edition)
    assert matching.check(found)
    names = [run.name for run in found.runs()]
    assert len(set(names)) == len(names) and all(run.arm.config for run in found.runs())
    for slice in found.slices:
        assert matching.predicted_seconds(found.arms[0].config, slice) > 0
    jobs = [job_name(found, run) for run in found.runs()]
    assert len(set(jobs)) == len(jobs) and max(map(len, jobs)) <= 28


# Half a second a model: what is not the main table waits for `make test-slow`.
@pytest.mark.parametrize("name", ["main_table", *(slow(n) for n in OTHERS)])
def test_shapes_of_every_full_run_are_as_counted(name):
    for run in read(name, "full").runs():
        assert counted(run.arm.config.model) == run.arm.config.model.total_parameters


def test_the_main_table_has_the_papers_numbers():
    found = read("main_table", "full")
    rows = list(csv.DictReader((PAPER / "main_table.csv").open()))
    assert len(rows) == len(found.runs()) == 22
    for row, run in zip(rows, found.runs(), strict=True):
        model = run.arm.config.model
        assert run.arm.name == f"{row['size']}-{row['family']}" and model.notation == row["layers"]
        assert f"{model.non_embedding_parameters / 1e6:.1f}" == row["non_embedding_millions"]
        assert model.prefill_flops(4096) / 1e12 == pytest.approx(float(row["prefill_teraflop"]), rel=0.012)


def test_plan_prints_a_row_a_run_and_sums(capsys, monkeypatch):
    hours = {run.name: 1000.0 + number for number, run in enumerate(read("main_table", "full").runs())}
    waiting = iter(hours.values())  # closed forms take a quarter of a minute for all
    monkeypatch.setattr(matching, "predicted_chip_hours", lambda config, slice: next(waiting))
    assert study.main(["plan", "main_table", "--edition=full"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if line.startswith(tuple(hours))]
    assert {row[0]: float(row[-1].replace(",", "")) for row in rows} == hours and len(rows) == 22
    (total,) = (line.split() for line in lines if line.startswith("all "))
    assert float(total[-1].replace(",", "")) == sum(hours.values())
    assert int(total[2].replace(",", "")) == 22 * 120_818 * 512 * 4096


def test_budgets_are_spent():
    """Of studies that are matched in FLOPs: what a run takes is its budget, to half a step."""
    for name in ("recurrence_ratio", "scaling"):
        for edition in ("small", "full"):
            for arm in read(name, edition).arms:
                config = arm.config
                step = matching.train_flops(config) / config.train.steps
                assert abs(matching.train_flops(config) - arm.factors["budget"]) <= step / 2


def test_seconds_are_matched_on_a_slice():
    base = read("main_table", "full")
    vanilla, spiral = (base.arm(f"160m-{family}") for family in ("vanilla", "spiral_l"))
    wanted = matching.predicted_seconds(vanilla.config, "v5e:4x4")
    values = spiral.values.copy_and_resolve_references()
    values.train.steps = matching.steps_for_seconds(spiral.config, "v5e:4x4", wanted)
    assert values.train.steps > vanilla.config.train.steps  # Spiral-L's steps are the shorter ones
    contrast = Contrast("longer", "160m-vanilla", matched="seconds", slice="v5e:4x4")
    found = Study("s", "full", "?", (vanilla, Arm("longer", values)), contrast)
    assert "predicted seconds on v5e:4x4" in matching.check(found)[0]
    with pytest.raises(SpiralError, match=r"differ by -\d+\.\d+%; allowed: up to 1\.00%"):
        matching.check(dataclasses.replace(found, arms=(vanilla, dataclasses.replace(spiral, name="longer"))))


def test_arms_that_do_not_match_are_refused():
    base = read("main_table", "full")
    unfair = dataclasses.replace(base, primary=Contrast("410m-spiral_b", "410m-vanilla"))
    with pytest.raises(
        SpiralError, match=r"^410m-spiral_b against 410m-vanilla: non-embedding parameters .* differ by"
    ):
        matching.check(unfair)


def test_the_pages_example_is_a_study(tmp_path):
    page = (PAPER.parents[1] / "docs" / "studies.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "mine.py").write_text(code)
    found = load(str(tmp_path / "mine.py"), "small")
    assert "predicted seconds on v5e:1x1" in matching.check(found)[0]
    assert found.runs()[0].name == "residual-lr0.004" and len(found.runs()) == 12
    for name in NAMES:
        assert f"| `{name}` |" in page


def test_launch_hands_over_what_no_gate_holds_back(tmp_path, monkeypatch, capsys):
    given = []
    monkeypatch.setattr("tpu.several.main", lambda arguments: given.extend(arguments) or 0)
    flags = ["launch", "main_table", "--edition=full", f"--work={tmp_path}", f"--results={tmp_path}/results",
             "--bucket=gs://mine/", "--zone=us-east5-a"]  # fmt: skip
    assert study.main([*flags, "--config.data.stores=('gs://mine/pile',)"]) == 0
    jobs = json.loads((tmp_path / "main_table" / "full" / "jobs.json").read_text())
    assert jobs == [{"name": "m-160m-vanilla-seed0-93dfe1", "flags": [
        "--accelerator=v5p:4x4x4", "--config=experiments/arm.py:main_table,full,160m-vanilla", "--config.seed=0",
        "--config.optimizer.peak_learning_rate=0.0006"]}]  # fmt: skip
    path = tmp_path / "main_table" / "full" / "jobs.json"
    assert given == [f"--jobs={path}", "--bucket=gs://mine", "--zone=us-east5-a",
                     "--config.data.stores=('gs://mine/pile',)"]  # fmt: skip
    assert "160m-mesh-seed0: not launched, as the gate 160m-vanilla-seed0 has no record" in capsys.readouterr().out
    assert study.main(flags) == 2 and "data.stores is ()" in capsys.readouterr().err
    entries = read_entries(str(path), ["--zone=us-east5-a", "--bucket=gs://mine"])  # as the launcher takes them
    assert entries[0].job.config == "experiments/arm.py:main_table,full,160m-vanilla"


@pytest.mark.parametrize("folder", sorted(RESULTS.glob("*/*/records")), ids=lambda folder: folder.parts[-3])
def test_committed_records_are_of_their_study_as_it_is_declared(folder):
    evidence = gather(load(folder.parts[-3], folder.parts[-2]), folder)
    assert evidence.records and not evidence.left_out
    assert all(path.stat().st_size < 1e6 for path in folder.parent.rglob("*") if path.is_file())


@pytest.mark.parametrize("arguments, expected", [
    (["plan", "nothing"], "the study is 'nothing'; allowed: ablation, "),
    (["plan", "ablation", "--edition=huge"], "--edition is 'huge'; allowed: small, full"),
    (["plan", "ablation", "--only=main-seed9"], "--only is 'main-seed9'; allowed: names of runs, as main-seed1, "),
    (["plan", "ablation", "--onyl=x"], "--onyl=x is no flag of plan"),
    (["plan", "ablation", "--slice=v9:1"], "--slice is 'v9:1'; allowed: "),
    (["plain", "ablation"], "argument VERB: invalid choice: 'plain'"),
    (["run", "main_table", "--edition=full"], "data.stores is (); allowed: --config.data.stores="),
    (["run", "ablation", "--tasks_data=x"], "--tasks_data is 'x'; allowed: none, as this study asks no tasks"),
    (["run", "main_table", "--edition=full", "--bucket=mine"], "--bucket is 'mine'; allowed: gs://BUCKET or "),
    (["run", "ablation", "--config.model.d_model=8"], "--config.model.d_model changes what comes of the runs"),
])  # fmt: skip
def test_mistakes_are_one_line(capsys, arguments, expected):
    assert study.main(arguments) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: {expected}") and errors.count("\n") == 1


def test_a_bucket_that_cannot_be_used_is_one_line(capsys, monkeypatch):
    """Without credentials, for example: before any run is looked for there."""
    pytest.importorskip("gcsfs")
    from google.auth.exceptions import DefaultCredentialsError

    def no_client():
        raise DefaultCredentialsError("no credentials")

    monkeypatch.setattr("spiral_jax.data.bucket._client", no_client)
    assert study.main(["run", "main_table", "--edition=full", "--bucket=gs://mine"]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: --bucket is 'gs://mine/") and errors.count("\n") == 1
    assert "no credentials" in errors
