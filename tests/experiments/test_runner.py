"""The runner of studies, with children that train nothing."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cases import slow

from experiments import recording, study
from experiments import runner as runner_module
from experiments.design import Gate, load
from experiments.record import Code, folder_of, read, read_all, write
from experiments.runner import Places, Runner
from spiral_jax.errors import SpiralError

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TINY = str(HERE / "tiny.py")
SAME = ("code", "machine", "versions", "seconds", "command")  # what two runs of one thing need not share


@pytest.fixture(autouse=True)
def _fake(monkeypatch):
    """Of checkpoints, which the children do not write, and of a second's work."""
    monkeypatch.setattr(runner_module, "code_of_tree", lambda: Code("c", "", "p"))
    monkeypatch.setattr(recording, "data_hashes", lambda workdir: {"train": "a", "validation": "b"})
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(HERE)]))


def runner_of(folder: Path, monkeypatch, arms: str = "plain,other", **changes):
    monkeypatch.setenv("TINY_ARMS", arms)
    declared = dataclasses.replace(load(TINY, "small"), **changes)
    lines: list[str] = []
    places = Places(folder / "work", folder_of(declared.name, declared.edition, folder / "results"), TINY)
    runner = Runner(declared, places, lines.append, train="fake_run", evaluate="fake_run")
    return runner, lines, [run.name for run in declared.runs()]


def contents(folder: Path) -> dict[str, dict]:
    """Records without what may differ from run to run."""
    records, damaged = read_all(folder)
    assert not damaged
    return {r.run: {n: v for n, v in dataclasses.asdict(r).items() if n not in SAME} for r in records}


def test_trials_decide_the_learning_rate_and_finished_runs_are_skipped(tmp_path, monkeypatch):
    runner, _, names = runner_of(tmp_path, monkeypatch)
    assert names == ["plain-lr0.002", "other-lr0.002", "plain-lr0.004", "other-lr0.004",
                     "plain-seed1", "other-seed1", "plain-seed2", "other-seed2"]  # fmt: skip
    assert runner.run(names) == 0
    records = runner.records()
    assert list(records) == sorted(names)
    one = records["plain-seed2"]
    assert (one.learning_rate, one.seed, one.stage, one.status) == (0.004, 2, "seed", "finished")
    nats = 5 + 5 / 100 + 2 / 1000 - 1
    assert one.evaluation["validation"].nats == pytest.approx(nats + 1 / 40)
    assert one.evaluation["validation"].documents == pytest.approx((nats, nats + 1 / 30), abs=2e-3)
    assert one.curve[-1] == (10, 2560, round(nats, 5)) and one.tokens == 2560
    assert one.seconds.train == 5.0 and one.seconds.predicted["v5e:1x1"] > 0
    assert "--only=plain-seed2" in one.command and one.code.package and one.config["model.d_model"] == 16
    assert not list((tmp_path / "work").glob("plain*"))
    stamps = {path: path.stat().st_mtime_ns for path in runner.places.records.iterdir()}
    assert runner.run(names) == 0  # nothing is left to do
    assert {path: path.stat().st_mtime_ns for path in runner.places.records.iterdir()} == stamps


def test_runs_that_count_are_asked_the_tasks(tmp_path, monkeypatch):
    runner, _, names = runner_of(tmp_path, monkeypatch, arms="plain", shots=(0, 5))
    assert runner.run(names[:3]) == 0
    records = runner.records()
    assert records["plain-lr0.002"].tasks == {}
    assert records["plain-seed1"].tasks == {
        "0": {"piqa/acc_norm": 0.5, "wikitext/word_perplexity": 30.0}, "5": {"piqa/acc_norm": 0.55},
    }  # fmt: skip


def test_a_trial_whose_loss_is_no_number_diverged(tmp_path, monkeypatch):
    """It trained to its end, and the seeds take the other rate."""
    runner, _, names = runner_of(tmp_path, monkeypatch, arms="infinite")
    assert runner.run(names) == 0
    records = runner.records()
    assert records["infinite-lr0.004"].status == "diverged" and "not finite" in records["infinite-lr0.004"].reason
    assert records["infinite-seed1"].learning_rate == 0.002


def test_a_tree_that_changes_while_a_run_runs(tmp_path, monkeypatch):
    runner, _, names = runner_of(tmp_path, monkeypatch, arms="plain")
    hashes = iter("pq")
    monkeypatch.setattr(runner_module, "code_of_tree", lambda: Code("c", "", next(hashes)))
    assert runner.run(names[:1]) == 1
    assert runner.records()[names[0]].reason == "the package's files were changed while it ran"


def test_status_says_what_is_there(tmp_path, monkeypatch, capsys):
    runner, _, names = runner_of(tmp_path, monkeypatch)
    assert runner.run(names[:4]) == 0
    assert study.status(runner.study, runner, names) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("plain-lr0.002  4.") and lines[4] == "plain-seed1    not begun"
    assert lines[8] == "learning rate of plain: 0.004, at the edge of those tried"
    assert lines[10] == "4 of 8 runs are over; 20s of training"


def test_one_that_fails_and_one_that_diverges_stop_no_others(tmp_path, monkeypatch):
    runner, lines, names = runner_of(tmp_path, monkeypatch, "plain,failing,diverging")
    assert runner.run(names) == 1
    records = runner.records()
    assert records["failing-lr0.002"].status == "failed"
    assert records["failing-lr0.002"].reason == "error: model.d_model is 7; allowed: another"
    assert records["diverging-lr0.004"].status == "diverged" and records["diverging-lr0.004"].curve[-1][0] == 2
    assert records["diverging-seed1"].learning_rate == 0.002  # the one that did not
    assert records["plain-seed2"].status == "finished"
    end = "\n".join(lines[lines.index("tiny small: 7 of 12 runs finished") :])
    assert "failing-lr0.002: failed ('error: model.d_model is 7; allowed: another')" in end
    assert "diverging-lr0.004: diverged ('diverged: no number any more')" in end
    assert "failing-seed1: the trials of failing have no result" in end


def test_what_failed_is_tried_again(tmp_path, monkeypatch):
    runner, _, _ = runner_of(tmp_path, monkeypatch, "plain,failing")
    assert runner.run(["failing-lr0.002"]) == 1
    stamp = (runner.places.records / "failing-lr0.002.json").stat().st_mtime_ns
    assert runner.run(["failing-lr0.002"]) == 1
    assert (runner.places.records / "failing-lr0.002.json").stat().st_mtime_ns > stamp


def test_a_run_that_is_killed_goes_on(tmp_path, monkeypatch):
    runner, lines, names = runner_of(tmp_path, monkeypatch, "plain,killed")
    assert runner.run(names) == 0
    assert "killed-lr0.002: was killed, and goes on" in lines
    assert [row[0] for row in runner.records()["killed-seed1"].curve] == list(range(1, 11))


SCRIPT = """
import sys
from pathlib import Path
from experiments import recording, runner
from experiments.child import Stopped
from experiments.design import load
from experiments.record import Code
from experiments.runner import Places, Runner
runner.code_of_tree = lambda: Code("c", "", "p")
recording.data_hashes = lambda workdir: {"train": "a", "validation": "b"}
study, folder = load(sys.argv[1], "small"), Path(sys.argv[2])
places = Places(folder / "work", folder / "results/tiny/small/records", sys.argv[1])
try:
    sys.exit(Runner(study, places, train="fake_run", evaluate="fake_run").run([run.name for run in study.runs()]))
except Stopped as stopped:
    sys.exit(128 + stopped.number)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, slow(signal.SIGTERM)])
def test_a_runner_that_is_ended_takes_its_child_along_and_goes_on(tmp_path, monkeypatch, number):
    """Whatever ends it: the next one ends with what an uninterrupted one has."""
    monkeypatch.setenv("TINY_ARMS", "plain,waiting")
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, TINY, str(tmp_path)], cwd=ROOT)
    work = tmp_path / "work"
    waiting = wait_until(lambda: list(work.glob("waiting-lr0.002/run/waits-*")))
    child = int(waiting[0].name.partition("-")[2])
    process.send_signal(number)
    assert process.wait(60) == (-number if number == signal.SIGKILL else 128 + number)
    wait_until(lambda: not is_alive(child))
    records = tmp_path / "results/tiny/small/records"
    assert [path.stem for path in records.iterdir()] == ["plain-lr0.002"]
    (work / "go").touch()
    runner, _, names = runner_of(tmp_path, monkeypatch, "plain,waiting")
    assert runner.run(names) == 0
    whole, _, _ = runner_of(tmp_path / "whole", monkeypatch, "plain,waiting")
    (tmp_path / "whole" / "work").mkdir(parents=True)
    (tmp_path / "whole" / "work" / "go").touch()
    assert whole.run(names) == 0
    assert contents(runner.places.records) == contents(whole.places.records)


def test_a_gate_holds_back_what_comes_after_it(tmp_path, monkeypatch):
    gate = Gate("other-lr0.004", 4.0, "a trial ended there")
    runner, lines, names = runner_of(tmp_path, monkeypatch, gates=(gate,))
    assert names[0] == "other-lr0.004"
    assert runner.run(names) == 42
    assert list(runner.records()) == ["other-lr0.004"]
    assert any("the gate other-lr0.004 ended at 4.0750 nats; allowed: up to 4 (a trial ended there)" in line
               for line in lines)  # fmt: skip
    runner, _, names = runner_of(tmp_path, monkeypatch, gates=(dataclasses.replace(gate, most_nats=4.5),))
    assert runner.run(names) == 0


def test_a_record_of_another_declaration_is_refused_before_anything_runs(tmp_path, monkeypatch):
    runner, _, names = runner_of(tmp_path, monkeypatch)
    assert runner.run(names[:1]) == 0
    record = runner.records()[names[0]]
    write(dataclasses.replace(record, config=record.config | {"model.d_model": 32}), runner.places.records)
    with pytest.raises(SpiralError, match=rf"{names[0]}\.json: model\.d_model was 32 and is 16; allowed: "):
        runner.run(names)
    (runner.places.records / f"{names[0]}.json").write_text("{")
    with pytest.raises(SpiralError, match=rf"{names[0]}\.json is not JSON"):
        runner.run(names)


def test_a_run_on_other_data_fails(tmp_path, monkeypatch):
    runner, _, names = runner_of(tmp_path, monkeypatch)
    assert runner.run(names[:1]) == 0
    monkeypatch.setattr(recording, "data_hashes", lambda workdir: {"train": "c"})
    assert runner.run(names[:2]) == 1
    expected = "other-lr0.002: its train data is 'c'; allowed: a, as of plain-lr0.002"
    assert read(runner.places.records / "other-lr0.002.json").reason == expected


def test_runs_on_different_tasks_may_read_different_data(record):
    one, other = (dataclasses.replace(record, run=run, data={"train": run}) for run in "ab")
    with pytest.raises(SpiralError, match=r"^a: its train data is 'a'; allowed: b, as of b$"):
        recording.check_comparable(one, [other])
    recording.check_comparable(one, [dataclasses.replace(other, config_hash="of another task")])


def test_a_run_of_other_code_is_begun_anew(tmp_path, monkeypatch):
    runner, lines, names = runner_of(tmp_path, monkeypatch)
    folder = tmp_path / "work" / names[0]
    (folder / "run").mkdir(parents=True)
    (folder / "begun.json").write_text(json.dumps({"package": "another", "config": {}}))
    (folder / "run" / "metrics.jsonl").write_text('{"step": 9, "tokens": 1, "loss": 1.0}\n')
    assert runner.run(names[:1]) == 0
    assert any("is of other code or another configuration" in line for line in lines)
    assert len(runner.records()[names[0]].curve) == 10


def test_two_runners_do_not_share_a_folder(tmp_path, monkeypatch):
    first, _, names = runner_of(tmp_path, monkeypatch)
    second, _, _ = runner_of(tmp_path, monkeypatch)
    with first._alone(), pytest.raises(SpiralError, match="in use by another runner"):
        second.run(names)


def test_the_code_of_a_run():
    """What training imports, and nothing else of the package."""
    files = {path.relative_to(ROOT / "spiral_jax").as_posix() for path in recording.package_files()}
    assert {"train.py", "evaluate.py", "model/spiralformer.py", "kernels/cpu.py", "__init__.py"} <= files
    assert not files & {"export.py", "aot.py", "benchmarks/training.py", "roofline/hlo.py"}
    code = recording.code_of_tree()
    assert len(code.commit) == 40 and len(code.package) == 16


def wait_until(found, seconds: float = 60):
    end = time.monotonic() + seconds
    while not (result := found()):
        assert time.monotonic() < end, "waited for nothing"
        time.sleep(0.05)
    return result


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False
