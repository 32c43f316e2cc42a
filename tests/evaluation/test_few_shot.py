"""How many solved examples stand before a question of a task."""

import json

import pytest

from spiral_jax.errors import SpiralError
from spiral_jax.evaluation import catalogue
from spiral_jax.evaluation.config import EvaluationConfig
from spiral_jax.evaluation.task_evaluation import open_tasks, open_tasks_of_run

pytest.importorskip("lm_eval")

from spiral_jax.evaluation import harness


class Reader(harness.SpiralLM):
    """Keeps what it is asked, and likes the first choice."""

    def __init__(self):
        harness.LM.__init__(self)
        self.contexts = []

    def loglikelihood(self, requests):
        self.contexts += [request.args[0] for request in requests]
        return [(-float(request.idx), False) for request in requests]


@pytest.fixture
def data(tmp_path, monkeypatch):
    """PIQA of ten rows, and two tasks on it: one with two examples of its own."""
    rows = [{"goal": f"count to {i}", "sol1": f"{i}", "sol2": "sleep", "label": 0} for i in range(10)]
    (tmp_path / "piqa_valid.jsonl").write_text("\n".join(map(json.dumps, rows)))
    text = (catalogue.TASKS_FOLDER / "piqa.yaml").read_text()
    for name, more in (("own", "num_fewshot: 2\n"), ("none", "")):
        (tmp_path / f"{name}.yaml").write_text(text.replace("task: piqa", f"task: {name}") + more)
    monkeypatch.setattr(harness, "TASKS_FOLDER", tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize("asked, own, none", [(None, 2, 0), (0, 0, 0), (1, 1, 1)])
def test_a_task_s_own_number_stands_where_no_other_is_asked_for(data, asked, own, none):
    tasks = harness.load_tasks(["own", "none"], data, 64, asked)
    reader = Reader()
    assert harness.run(reader, tasks, num_fewshot=asked, limit=2)["n-shot"] == {"own": own, "none": none}
    assert {context.count("Question: ") for context in reader.contexts} == {own + 1, none + 1}


def test_more_examples_than_there_are_rows(data, monkeypatch):
    """An item is never its own example."""
    assert harness.load_tasks(["none"], data, 64, 9)
    message = "is 10; allowed: 0 to 9 for none, of whose 10 rows the examples are taken"
    monkeypatch.setattr(catalogue, "local_tasks", lambda: {"none": {"metadata": {"file": "piqa_valid.jsonl"}}})
    given = {"tasks_data": data, "num_fewshot": 10}
    with pytest.raises(SpiralError, match=f"^--num_fewshot {message}"):
        open_tasks(["none"], limit=0, max_length=64, **given)
    with pytest.raises(SpiralError, match=rf"^evaluation\.num_fewshot {message}"):
        open_tasks_of_run(EvaluationConfig(tasks=("none",), **given), 64)


def test_a_mean_says_of_how_many_tasks():
    def mean_of(names):
        results = {"results": {}, "configs": {}, "versions": {}, "n-shot": {}, "higher_is_better": {}, "n-samples": {}}
        paper = {name: {"metric": "acc", "value": 0.5} for name in names}
        (line,) = [line for line in harness.as_text(results | {"paper": paper}).splitlines() if "mean" in line]
        return " ".join(line.split())

    assert mean_of(catalogue.PAPER) == "mean 0.5000"
    assert mean_of(["piqa", "sciq"]) == "mean of 2 of 9 0.5000"
