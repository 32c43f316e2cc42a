"""Several runs within one budget."""

import dataclasses
import json
import re
import shlex
import signal
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spiral_jax.errors import SpiralError
from tests.tpu.world import MemoryBucket, World
from tpu import several
from tpu.memory import Memory
from tpu.several import Run, Spent, next_start, read_entries

COMMON = (
    "--accelerator=v5litepod-16", "--zone=us-west4-a", "--bucket=gs://runs-of-ours",
    "--config=experiments/pile.py:160m,vanilla",
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_the_budget_holds_and_the_order_is_kept(data):
    """Whatever the runs spend under their caps, whenever they end, and whether or not what they had is given back."""
    budget = data.draw(st.floats(1, 1000), "budget")
    wide = data.draw(st.integers(1, 4), "side by side")
    wishes = data.draw(
        st.lists(st.tuples(st.floats(0.1, 20), st.none() | st.floats(0.1, 500), st.floats(0, 30)), max_size=6), "runs"
    )
    runs = [Run(f"run{i}", start, wanted, spent) for i, (start, wanted, spent) in enumerate(wishes)]
    within = sum(run.taken for run in runs) <= budget
    truly = {run.name: run.taken for run in runs}
    caps, order = {}, []
    while True:
        while found := next_start(runs, budget, wide, 0):
            run, cap = found
            assert cap - run.taken >= run.start, "a start that could not pay for itself"
            assert run.wanted is None or cap <= run.wanted + 1e-9
            caps[run.name] = cap
            order.append(run.name)
            runs = [one._replace(taken=cap, state="running") if one.name == run.name else one for one in runs]
        running = [run for run in runs if run.state == "running"]
        assert len(running) <= wide
        if not running:
            break
        ended = data.draw(st.sampled_from(running), "ends")
        truly[ended.name] = data.draw(st.floats(truly[ended.name], caps[ended.name]), "spent")
        over = data.draw(st.booleans(), "nothing bills any more")
        if not over:
            truly[ended.name] = caps[ended.name]
        runs = [one._replace(state="done", taken=truly[one.name]) if one.name == ended.name else one for one in runs]
        if within:
            assert sum(truly.values()) <= budget * (1 + 1e-9)
    assert order == sorted(order, key=lambda name: int(name[3:])), "overtaken"
    assert within or not order


def test_equal_shares_without_bounds():
    runs = [Run("a", 1, None, 0), Run("b", 1, None, 0), Run("c", 1, None, 0)]
    assert next_start(runs, 90, 2, 0) == (runs[0], 45)
    runs[0] = runs[0]._replace(state="running", taken=45)
    assert next_start(runs, 90, 2, 0) == (runs[1], 45)
    assert next_start(runs, 90, 1, 0) is None
    # What the first did not need goes to those that come.
    runs[0] = runs[0]._replace(state="done", taken=10)
    assert next_start(runs, 90, 1, 0) == (runs[1], 80)


def test_what_does_not_fit_is_not_overtaken():
    runs = [Run("a", 1, 60, 0, "running")._replace(taken=60), Run("b", 1, 50, 0), Run("c", 1, 10, 0)]
    assert next_start(runs, 100, 3, 0) is None
    runs[0] = runs[0]._replace(state="done", taken=40)
    assert next_start(runs, 100, 3, 0) == (runs[1], 50)


def write(path, *jobs):
    path.write_text(json.dumps([{"name": name, "flags": flags} for name, flags in jobs]))
    return str(path)


def test_entries_take_the_flags_of_the_command_line(tmp_path):
    flags = ["--config=experiments/quickstart.py", "--max_chip_hours=5"]
    path = write(tmp_path / "jobs.json", ("a", flags), ("b", ["--zone=us-west1-c"]))
    a, b = read_entries(path, COMMON)
    assert (a.job.name, a.job.zone, a.job.max_chip_hours, b.job.zone) == ("a", "us-west4-a", 5, "us-west1-c")


def test_the_list_of_the_page(tmp_path):
    """tpu/costs.md: its file and its command are taken as they stand."""
    page = (Path(__file__).parents[2] / "tpu" / "costs.md").read_text(encoding="utf-8")
    (tmp_path / "night.json").write_text(page.partition("```json\n")[2].partition("```")[0])
    (line,) = [line for line in page.splitlines() if "--jobs=" in line]
    common = [flag for flag in shlex.split(line)[4:] if not re.match("--(jobs|max_chip_hours|side_by_side)=", flag)]
    jobs = [entry.job for entry in read_entries(str(tmp_path / "night.json"), common)]
    assert [(job.name, job.chips, job.max_chip_hours) for job in jobs] == [
        ("b-seed0", 32, 900), ("b-seed1", 32, 900), ("vanilla", 32, None)
    ]  # fmt: skip
    assert all("--config.data.stores=gs://my-spiral/pile" in job.overrides for job in jobs)


BAD = {
    "no file": (None, "cannot be read"),
    "no JSON": ("{", "is something else; allowed: a list of"),
    "no list": ('{"name": "a"}', "is something else"),
    "empty": ("[]", "is something else"),
    "a further key": ('[{"name": "a", "flags": [], "more": 1}]', "is something else"),
    "a number": ('[{"name": "a", "flags": [1]}]', "is something else"),
    "a flag that is none": ('[{"name": "a", "flags": ["--x=1"]}]', "jobs.json, a: the argument is '--x=1'"),
    "a name twice": ('[{"name": "a", "flags": []}, {"name": "a", "flags": []}]', "a name is 'a'; allowed: each once"),
    "kept": ('[{"name": "a", "flags": ["--no-delete_at_success"]}]', "--delete_at_success is False"),
    "a configuration that is not there": (
        '[{"name": "a", "flags": ["--config=nope.py"]}]',
        "jobs.json, a: --config is 'nope.py'; allowed: a file of the",
    ),
    "on GKE": ('[{"name": "a", "flags": ["--provider=gke"]}]', "--provider is 'gke'; allowed: qr or vm"),
}


@pytest.mark.parametrize("text, words", BAD.values(), ids=BAD)
def test_bad_lists(text, words, tmp_path):
    path = tmp_path / "jobs.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SpiralError) as error:
        read_entries(str(path), COMMON)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.fixture
def world(monkeypatch):
    """Launchers that end at once with the status and the chip-hours of a script."""
    started, spent, script = [], {}, {}

    def launcher(arguments, say):
        name, cap = arguments[0], float(next(a for a in reversed(arguments) if "chip_hours" in a).partition("=")[2])
        started.append((name, cap))
        status, hours = script[name]
        spent[name] = Spent(min(hours, cap), status != 130, status)
        return subprocess.Popen(["sh", "-c", f"exit {status}"], text=True)

    monkeypatch.setattr(several, "_launcher", launcher)
    monkeypatch.setattr(several, "spent_by", lambda job: spent.get(job.name, Spent()))
    return dataclasses.make_dataclass("World", ["started", "spent", "script"])(started, spent, script)


def test_one_after_another_to_the_end_of_the_budget(world, tmp_path):
    path = write(tmp_path / "jobs.json", *((name, []) for name in "abcd"))
    world.script.update({"a": (0, 30), "b": (44, 20), "c": (0, 48), "d": (0, 1)})
    lines = []
    status = several.main([f"--jobs={path}", "--max_chip_hours=100", "--skip_plan", *COMMON], lines.append)
    # The last one would have had two chip-hours, less than a start of sixteen chips costs.
    assert world.started == [("a", 100), ("b", 70), ("c", 50)] and status == 44
    assert "not started, as the budget does not hold them: d" in lines
    assert any("PLAN SKIPPED" in line for line in lines)


def test_a_launcher_that_dies_beside_its_slice_is_replaced(world, tmp_path, monkeypatch):
    """Its memory has not ended, and what bills has nobody to bound it."""
    monkeypatch.setattr(several, "PAUSE", 0.0)
    path = write(tmp_path / "jobs.json", *((name, []) for name in "ab"))
    world.script.update({"a": (0, 30), "b": (0, 10)})
    start, deaths = several._launcher, iter([137, 1])

    def launcher(arguments, say):
        child = start(arguments, say)
        if arguments[0] == "a" and (death := next(deaths, None)):
            world.spent["a"] = Spent(7, False, None)
            return subprocess.Popen(["sh", "-c", f"exit {death}"], text=True)
        return child

    monkeypatch.setattr(several, "_launcher", launcher)
    assert several.main([f"--jobs={path}", "--max_chip_hours=100", "--skip_plan", *COMMON], lambda line: None) == 0
    assert world.started == [("a", 100), ("a", 100), ("a", 100), ("b", 70)]


def test_a_run_that_finished_before_is_not_started_again(world, tmp_path):
    path = write(tmp_path / "jobs.json", ("a", []), ("b", []))
    world.spent["a"] = Spent(60, True, 0)
    world.script["b"] = (0, 10)
    assert several.main([f"--jobs={path}", "--max_chip_hours=100", "--skip_plan", *COMMON], lambda line: None) == 0
    assert world.started == [("b", 40)]


def test_what_bills_already_comes_first(world, tmp_path):
    """The list was started before, by a launcher that died."""
    path = write(tmp_path / "jobs.json", ("a", []), ("b", []), ("c", []))
    world.spent.update({"a": Spent(5, True, 44), "c": Spent(10, False)})
    world.script.update({"b": (0, 10), "c": (0, 20)})
    assert several.main([f"--jobs={path}", "--max_chip_hours=100", "--skip_plan", *COMMON], lambda line: None) == 44
    assert world.started == [("c", 95), ("b", 75)]


def test_what_bills_gets_a_launcher_whatever_is_left():
    """Whose cap then ends it: nothing else would."""
    bills = Run("a", 10, 1000, 995, bills=True)
    assert next_start([bills], 5000, 1, 0) == (bills, 1000)
    assert next_start([bills], 990, 1, 0) == (bills, 995)
    others = [Run("b", 10, None, 100, "running"), Run("c", 10, None, 0), bills]
    assert next_start(others, 5000, 1, 0) == (bills, 1000)
    # Its launcher has just died: nobody overtakes it.
    assert next_start([Run("c", 10, None, 0), bills._replace(resume_at=30)], 5000, 2, 29) is None


def test_a_bucket_that_does_not_answer_gives_nothing_back(world, tmp_path, monkeypatch):
    """What is not known to be over gets another launcher, under the cap that it had."""
    monkeypatch.setattr(several, "PAUSE", 0.0)
    path = write(tmp_path / "jobs.json", ("a", ["--max_chip_hours=60"]), ("b", []))
    world.script.update({"a": (2, 5), "b": (0, 5)})
    answers = iter([Spent(), Spent(), None, Spent(5, True, 0), Spent(5)])

    def spent_by(job):
        if (answer := next(answers)) is None:
            raise SpiralError("the bucket does not answer")
        return answer

    monkeypatch.setattr(several, "spent_by", spent_by)
    several.main([f"--jobs={path}", "--max_chip_hours=100", "--skip_plan", *COMMON], lambda line: None)
    assert world.started == [("a", 60), ("a", 60), ("b", 95)]


def test_what_may_bill_is_named_at_the_end(world, tmp_path):
    path = write(tmp_path / "jobs.json", ("a", []))
    world.script["a"] = (130, 5)
    lines = []
    several.main([f"--jobs={path}", "--max_chip_hours=100", "--skip_plan", *COMMON], lines.append)
    assert any(line.startswith("a: may bill; ") for line in lines)


def test_what_may_bill_on_keeps_its_share(world, tmp_path):
    path = write(tmp_path / "jobs.json", ("a", ["--max_chip_hours=60"]), ("b", []))
    world.script.update({"a": (130, 5), "b": (0, 10)})
    several.main([f"--jobs={path}", "--max_chip_hours=100", "--skip_plan", *COMMON], lambda line: None)
    assert world.started == [("a", 60), ("b", 40)]


def test_a_run_that_has_spent_its_own_cap_holds_nobody_up(world, tmp_path):
    path = write(tmp_path / "jobs.json", ("a", ["--max_chip_hours=60"]), ("b", []))
    world.spent["a"] = Spent(59, True, 2)
    world.script["b"] = (0, 10)
    assert several.main([f"--jobs={path}", "--max_chip_hours=100", "--skip_plan", *COMMON], lambda line: None) == 2
    assert world.started == [("b", 41)]


def test_a_slice_that_was_kept_may_bill(world, tmp_path, monkeypatch):
    """It was in the queue when its job was stopped, and did not bill then."""
    memory = Memory(phase="ended", kept=True, ending="stopped", result=42, chip_seconds=7200)
    bucket = MemoryBucket(World())
    bucket.put("launch.json", vars(memory))
    monkeypatch.undo()
    monkeypatch.setattr(several, "Bucket", lambda root: bucket)
    assert several.spent_by(World().job) == Spent(2, False, 42)


def test_a_launcher_that_is_killed_between_two_slices_is_replaced(world, tmp_path, monkeypatch):
    monkeypatch.setattr(several, "PAUSE", 0.5)
    path = write(tmp_path / "jobs.json", ("a", []))
    world.script["a"] = (0, 30)
    start, deaths = several._launcher, iter(["kill -9 $$"])

    def launcher(arguments, say):
        child = start(arguments, say)
        if death := next(deaths, None):
            world.spent["a"] = Spent(7, True, None)
            return subprocess.Popen(["sh", "-c", death], text=True)
        return child

    monkeypatch.setattr(several, "_launcher", launcher)
    assert several.main([f"--jobs={path}", "--max_chip_hours=100", "--skip_plan", *COMMON], lambda line: None) == 0
    assert world.started == [("a", 100), ("a", 100)]


def test_a_signal_ends_launchers_that_heed_no_interrupt_and_says_what_may_bill(world, tmp_path, monkeypatch):
    """As those of a script, in whose background SIGINT is ignored."""
    path = write(tmp_path / "jobs.json", ("a", ["--max_chip_hours=60"]), ("b", []))
    world.script.update({"a": (130, 5), "b": (0, 5)})
    start, children, lines = several._launcher, [], []

    def launcher(arguments, say):
        child = start(arguments, say)
        if arguments[0] == "b":
            child.wait()
            child = subprocess.Popen(["sh", "-c", "trap '' INT; exec sleep 60"], text=True)
            children.append(child)
        return child

    def sleep(seconds):
        if children:
            raise KeyboardInterrupt

    monkeypatch.setattr(several, "_launcher", launcher)
    monkeypatch.setattr(several.time, "sleep", sleep)
    assert several.main([f"--jobs={path}", "--max_chip_hours=100", "--skip_plan", *COMMON], lines.append) == 130
    assert children[0].returncode == -signal.SIGTERM and any(line.startswith("a: may bill; ") for line in lines)


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], "--max_chip_hours"),
        (["--max_chip_hours=-1"], "--max_chip_hours is -1.0; allowed: a number above 0"),
        (["--max_chip_hours=5", "--side_by_side=0"], "--side_by_side is 0; allowed: 1 or more"),
    ],
)
def test_bad_flags_start_nothing(world, tmp_path, flags, words):
    path = write(tmp_path / "jobs.json", ("a", []))
    with pytest.raises(SpiralError, match=words):
        several.main([f"--jobs={path}", "--skip_plan", *flags, *COMMON])
    assert not world.started
