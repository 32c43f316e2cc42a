"""Tasks of the harness on two processes: the numbers of one."""

import json

import pytest
from pairs import flags_of, run_pair, write_inputs
from verbs import call

from spiral_jax import evaluate, train
from spiral_jax.run.metrics import read_rows

pytest.importorskip("lm_eval", reason="lm_eval is not installed (extra harness)")

TASKS = "--config.evaluation.tasks=('piqa','lambada_openai')"
NO_SAMPLE = "--config.summary.sample_tokens=0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data of two tasks, another one with a document more, and the run of one process."""
    folder = tmp_path_factory.mktemp("tasks")
    write_inputs(folder)
    for name, count in (("data", 6), ("other", 5)):
        (folder / name).mkdir()
        rows = [{"goal": f"{i}", "sol1": f"times {i}" * 2, "sol2": "is", "label": i % 2} for i in range(count)]
        (folder / name / "piqa_valid.jsonl").write_text("\n".join(map(json.dumps, rows)))
        rows = [{"text": f"{i} times {i} is"} for i in range(6)]
        (folder / name / "lambada_test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = flags_in_training(folder)
    assert call(train, *flags_of(folder, "alone"), *flags)[0] == 0
    return folder


def flags_in_training(folder) -> tuple[str, ...]:
    return TASKS, f"--config.evaluation.tasks_data={folder}/data", "--config.evaluation.tasks_every_steps=3", NO_SAMPLE


@pytest.mark.slow
def test_in_training(folder):
    first, second = run_pair(folder, "train", *flags_of(folder, "pair"), *flags_in_training(folder))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "tasks after step 3: " in first.stdout and second.stdout == ""
    for ours, theirs in zip(*(read_rows(folder / name / "metrics.jsonl") for name in ("pair", "alone")), strict=True):
        names = {name for name in theirs if name.startswith("task/")}
        assert names == {name for name in ours if name.startswith("task/")} and bool(names) == (ours["step"] % 3 == 0)
        for name in names:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name


@pytest.mark.slow
def test_by_command(folder, capsys):
    flags = f"--workdir={folder}/alone", f"--tasks_data={folder}/data", "--tasks=piqa,lambada_openai", "--json"
    first, second = run_pair(folder, "evaluate", *flags, f"--output={folder}/pair.json")
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert second.stdout == ""
    capsys.readouterr()
    assert call(evaluate, *flags, f"--output={folder}/alone.json")[0] == 0
    expected = json.loads(capsys.readouterr().out)["results"]
    for task, values in json.loads(first.stdout)["results"].items():
        for name, value in values.items():
            theirs = expected[task][name]
            assert value == (pytest.approx(theirs, rel=1e-5) if isinstance(value, float) else theirs), name


@pytest.mark.slow
def test_other_data_on_another_process_ends_all(folder):
    flags = f"--workdir={folder}/alone", "--tasks=piqa", f"--output={folder}/none.json"
    done = run_pair(
        folder, "evaluate", *flags, first=(f"--tasks_data={folder}/data",), second=(f"--tasks_data={folder}/other",)
    )
    for process in done:
        assert process.returncode == 2
        last = process.stderr.splitlines()[-1]  # after the harness's own
        assert last.startswith("error: ") and "--tasks: the data on process 1 is not that of process 0" in last
