"""Local task files: which there are, that they ask what the harness's own tasks ask, and what is refused."""

import importlib.util
import json
from pathlib import Path

import pytest
import yaml

from spiral_jax.errors import SpiralError
from spiral_jax.evaluation import catalogue
from spiral_jax.evaluation.catalogue import PAPER, local_tasks, remarks_on, resolve
from spiral_jax.evaluation.config import EvaluationConfig
from spiral_jax.evaluation.documents import _json_lines, hellaswag_query, load, wikitext_pages

SHARED = Path("/work/shared/data")
EVAL = str(SHARED / "eval")
needs_data = pytest.mark.skipif(not Path(EVAL).is_dir(), reason=f"needs the data in {EVAL}")
needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm_eval")

# The harness's own file of each local task.
OWN = {
    "lambada_openai": "lambada/lambada_openai",
    "lambada_standard": "lambada/lambada_standard",
    "piqa": "piqa/piqa",
    "hellaswag": "hellaswag/hellaswag",
    "winogrande": "winogrande/default",
    "arc_easy": "arc/arc_easy",
    "arc_challenge": "arc/arc_challenge",
    "sciq": "sciq/sciq",
    "wikitext": "wikitext/wikitext",
}


def test_which_tasks_there_are():
    assert list(local_tasks()) == sorted(OWN)
    assert len(PAPER) == 9 and set(PAPER) - set(OWN) == {"mmlu_continuation"}
    assert {name for name, metric in PAPER.items() if metric == "acc_norm"} == {
        "piqa", "hellaswag", "arc_easy", "arc_challenge", "sciq"}  # fmt: skip
    for name, task in local_tasks().items():
        assert PAPER.get(name, "bits_per_byte") in [entry["metric"] for entry in task["metric_list"]]


def test_the_group_of_the_papers():
    assert resolve(["paper", "piqa", "wikitext"], "") == ([*PAPER, "wikitext"], [])


@needs_data
def test_the_group_on_local_files_says_what_it_leaves_out():
    names, remarks = resolve(["paper"], EVAL)
    assert names == [name for name in PAPER if name not in ("lambada_standard", "mmlu_continuation")]
    assert remarks == [f"paper: left out, as {EVAL} has no data for them: lambada_standard, mmlu_continuation"]


def test_remarks():
    assert remarks_on("piqa", 0) == []
    assert remarks_on("piqa", 5) == ["piqa: few-shot examples from the evaluated split, never the item itself"]
    assert remarks_on("sciq", 0) == ["sciq: validation split (the published benchmark scores the test split)"]
    for name, task in local_tasks().items():
        # Examples are taken from the evaluated split, and the harness leaves out the item only where it is told so.
        assert bool(remarks_on(name, 5)) == (name != "wikitext")
        assert task.get("fewshot_split", "test") == task["test_split"] == "test"


def test_what_is_refused(tmp_path):
    def refused(names, folder, field="--tasks"):
        with pytest.raises(SpiralError) as error:
            resolve(names, str(folder), field=field)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert refused(["pica"], tmp_path).startswith("--tasks is 'pica'; allowed with --tasks_data: paper, arc_")
    assert refused(["piqa"], tmp_path / "x").startswith(f"--tasks_data is '{tmp_path / 'x'}', which is no folder")
    message = refused(["piqa"], tmp_path)
    assert (
        message
        == f"--tasks_data is '{tmp_path}', which has no piqa_valid.jsonl; allowed: a folder with the data of piqa"
    )
    assert "which has no wiki.test.raw or ../" in refused(["wikitext"], tmp_path, "evaluation.tasks")
    assert "has no task with data" in refused(["paper"], tmp_path)


MINE = """
task: capitals
dataset_path: json
dataset_kwargs: {data_files: {test: "FOLDER/capitals.jsonl"}}
output_type: multiple_choice
test_split: test
doc_to_text: "The capital of {{country}} is"
doc_to_target: 0
doc_to_choice: "{{[capital, 'London']}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def test_a_yaml_file_of_ones_own_can_be_named(tmp_path):
    file = tmp_path / "capitals.yaml"
    file.write_text(MINE, encoding="utf-8")
    assert resolve([str(file), "piqa"], "") == ([str(file), "piqa"], [])
    assert resolve([str(file)], str(tmp_path)) == ([str(file)], []) and remarks_on(str(file), 5) == []
    with pytest.raises(SpiralError, match=r"^--tasks is '/no/x\.yaml'; allowed: a YAML file that exists, or the name"):
        resolve(["/no/x.yaml"], "")


@needs_harness
def test_a_task_of_ones_own_asks_what_it_says(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    from spiral_jax.evaluation import harness

    (tmp_path / "capitals.jsonl").write_text('{"country": "France", "capital": "Paris"}\n', encoding="utf-8")
    (tmp_path / "capitals.yaml").write_text(MINE.replace("FOLDER", str(tmp_path)), encoding="utf-8")
    [task] = harness.load_tasks([str(tmp_path / "capitals.yaml")], str(tmp_path), 64)
    assert task.doc_to_text(task.test_docs()[0]) == "The capital of France is"
    assert task.doc_to_choice(task.test_docs()[0]) == ["Paris", "London"]
    (tmp_path / "broken.yaml").write_text("task: [", encoding="utf-8")
    with pytest.raises(SpiralError, match=r"^--tasks: .*broken\.yaml cannot be opened"):
        harness.load_tasks([str(tmp_path / "broken.yaml")], str(tmp_path), 64)


@pytest.mark.parametrize(
    "values",
    [{"num_fewshot": -1}, {"tasks_limit": -1}, {"tasks_every_steps": -2}, {"tasks_every_steps": 5}],
)
def test_a_configuration_that_is_refused(values):
    (field,) = values
    with pytest.raises(SpiralError, match=rf"^evaluation.{field} is "):
        EvaluationConfig(**values)


def test_when_tasks_are_due():
    def due(**values):
        config = EvaluationConfig(**values)
        return [step for step in range(1, 8) if config.tasks_due(step, last_step=7)]

    assert due() == []
    assert due(tasks=("piqa",)) == [7]
    assert due(tasks=("piqa",), tasks_every_steps=3) == [3, 6, 7]


def test_without_the_harness(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SpiralError, match=r"^--tasks needs lm_eval: pip install 'spiral_jax\[harness\]'$"):
        catalogue.check_extra("--tasks")


# Documents.


def test_pages():
    text = " \n = One = \n \n text = x = \n = = Part = = \n more \n \n = Two words = \n end \n"
    first, second = (page["page"] for page in wikitext_pages(text))
    assert first + "\n" + second == text.removeprefix(" \n")
    assert second.startswith(" = Two words = ")
    assert [page["page"] for page in wikitext_pages("no heading")] == ["no heading"]


def test_rows_end_at_line_feeds_only_behind_a_byte_order_mark(tmp_path):
    """And pages of a file from another system are those of one with line feeds."""
    rows = [{"text": "a\x0bb\x85c\u2028d"}, {"text": "\ufeff"}]
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "x.jsonl").write_bytes(f"\ufeff{lines}\r\n".encode())
    assert _json_lines(tmp_path / "x.jsonl") == rows
    text = " = A = \n\n x\x85y\rz \n = B = \n b"
    assert wikitext_pages(text.replace("\n", "\r\n")) == wikitext_pages(text) and len(wikitext_pages(text)) == 2


@needs_data
def test_pages_of_wikitext():
    text = (SHARED / "wikitext-2" / "wiki.test.raw").read_text()
    pages = [page["page"] for page in wikitext_pages(text)]
    assert len(pages) == 62
    assert "\n".join(pages).strip() == text.strip()
    # The published number of tokens, less the one that ends each line.
    assert sum(len(page.split()) for page in pages) == 245_569 - 4_358


@needs_data
def test_contexts_of_hellaswag():
    """1,000 contexts that the harness made are made again of what the local file holds."""

    def key(query, ending):
        return "".join((query + ending).lower().replace("..", ".").split())

    rows = [json.loads(line) for line in Path(EVAL, "hellaswag_val.jsonl").open()]
    made = {key(row["query"], row["endings"][0]): hellaswag_query(row["query"]) for row in rows}
    wanted = [json.loads(line) for line in Path(EVAL, "hellaswag_val_subset1000.jsonl").open()]
    assert len(wanted) == 1000
    assert all(made[key(row["query"], row["choices"][0])] == row["query"] for row in wanted)


@needs_harness
def test_broken_files(tmp_path):
    place = tmp_path / "a.jsonl"
    for content, found in (("", "no rows"), ('{"a": 1}\n{"a"', "line 2"), ("[1]\n", "line 1"), ("{}\n", "")):
        place.write_text(content)
        if found:
            with pytest.raises(SpiralError, match=found):
                load(tasks_data=str(tmp_path), file="a.jsonl")
    place.write_bytes(b"\xff\n")
    with pytest.raises(SpiralError, match="cannot be read"):
        load(tasks_data=str(tmp_path), file="a.jsonl")
    place.write_text('{"a": 1}\n\n{"a": 2}\n')
    assert list(load(tasks_data=str(tmp_path), file=["b", "a.jsonl"])["test"]) == [{"a": 1}, {"a": 2}]


# The harness's own tasks.


def own(name):
    """The harness's YAML file of a task, with what it includes; functions as text."""
    import lm_eval.tasks

    path = Path(lm_eval.tasks.__file__).parent / f"{OWN[name]}.yaml"
    loaded = yaml.load(path.read_text(), catalogue._Loader)
    if "include" in loaded:
        loaded = yaml.load((path.parent / loaded["include"]).read_text(), catalogue._Loader) | loaded
    return loaded


@needs_harness
@pytest.mark.parametrize("name", OWN)
def test_the_questions_are_the_harness_s(name):
    ours, theirs = local_tasks()[name], own(name)
    assert ours["output_type"] == theirs["output_type"]
    assert ours["metadata"]["version"] == theirs["metadata"]["version"]
    assert [entry["metric"] for entry in ours["metric_list"]] == [entry["metric"] for entry in theirs["metric_list"]]
    for field in ("target_delimiter", "fewshot_delimiter", "description", "doc_to_text", "doc_to_target",
                  "doc_to_choice", "process_results", "fewshot_config"):  # fmt: skip
        if name == "winogrande" and field.startswith("doc_to_"):
            continue  # templates here, functions there: compared on documents below
        mine, other = ours.get(field), theirs.get(field)
        if isinstance(other, str) and other.startswith("preprocess_wikitext."):
            other = f"lm_eval.tasks.wikitext.{other}"
        assert mine == other, field


def recording(sample, drawn: list):
    """`sample`, with what it returns appended to `drawn`."""

    def record(**arguments):
        drawn.append(sample(**arguments))
        return drawn[-1]

    return record


@needs_harness
@needs_data
def test_every_local_task_on_its_data(monkeypatch):
    """The sizes; no item is its own example; winogrande's questions against the harness's own functions."""
    from lm_eval.tasks.winogrande import preprocess_winogrande

    from spiral_jax.evaluation.harness import load_tasks

    names = resolve(["paper", "wikitext"], EVAL)[0]
    tasks = {task.task_name: task for task in load_tasks(names, EVAL, 256)}
    sizes = {name: len(task.eval_docs) for name, task in tasks.items()}
    assert sizes == {"lambada_openai": 5153, "piqa": 1838, "hellaswag": 10042, "winogrande": 1267, "arc_easy": 2376,
                     "arc_challenge": 1172, "sciq": 1000, "wikitext": 62}  # fmt: skip
    for name, task in tasks.items():
        task.set_config("num_fewshot", 5)
        task.set_fewshot_seed(1)
        few, drawn = list(task.eval_docs)[:6], []
        monkeypatch.setattr(task.sampler, "sample", recording(task.sampler.replace_df(few).sample, drawn))
        for doc in few:
            task.fewshot_context(doc, 5)
            assert len(drawn[-1]) == 5
            if name not in ("wikitext", "lambada_openai"):
                assert doc not in drawn[-1], name
    winogrande = tasks["winogrande"]
    for doc in winogrande.eval_docs:
        assert winogrande.doc_to_text(doc) == preprocess_winogrande.doc_to_text(doc)
        assert winogrande.doc_to_target(doc) == preprocess_winogrande.doc_to_target(doc)
        assert winogrande.doc_to_choice(doc) == preprocess_winogrande.doc_to_choice(doc)
