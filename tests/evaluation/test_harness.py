"""The harness over our models: against its own Hugging Face model on the same weights, and through the commands."""

import functools
import json
import os
import random
import shutil
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from cases import slow
from safetensors.numpy import load_file
from verbs import call

from spiral_jax import evaluate, train
from spiral_jax.convert.architecture import config_to_huggingface
from spiral_jax.convert.tensors import params_from_tensors
from spiral_jax.data.tokenizers import HuggingFaceTokenizer
from spiral_jax.errors import SpiralError
from spiral_jax.evaluation import catalogue
from spiral_jax.evaluation.generation import Generator
from spiral_jax.evaluation.scoring import Scorer
from spiral_jax.evaluation.task_evaluation import TaskEvaluation
from spiral_jax.kernels.choose import backend_for
from spiral_jax.model.config import ModelConfig
from spiral_jax.parallel.mesh import MeshConfig, make_mesh
from spiral_jax.parallel.placed_model import place
from spiral_jax.run import metrics

pytest.importorskip("lm_eval", reason="needs lm_eval")
EVAL = Path("/work/shared/data/eval")
TOKENIZER = EVAL.parent / "tokenizer" / "20B_tokenizer.json"
needs_data = pytest.mark.skipif(not TOKENIZER.is_file(), reason=f"needs the data in {EVAL.parent}")

MAX_LENGTH = 256
MODEL = ModelConfig(vocab_size=50277, d_model=64, num_heads=4, prelude_layers=2, core_layers=0, coda_layers=0,
                    chunks=(), topology="base", dtype="float32")  # fmt: skip


# Two models of one function.


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(ours, theirs): a random GPT-NeoX whose head has learnt the last words of half of LAMBADA's first texts."""
    torch = pytest.importorskip("torch", reason="needs torch")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    pytest.importorskip("accelerate", reason="needs accelerate")
    from lm_eval.models.huggingface import HFLM

    from spiral_jax.evaluation.harness import SpiralLM

    tokenizer = HuggingFaceTokenizer.from_file(TOKENIZER)
    torch.manual_seed(0)
    settings = config_to_huggingface(MODEL, MAX_LENGTH) | {"initializer_range": 0.2}
    del settings["model_type"], settings["architectures"]
    theirs = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**settings)).eval()
    texts = [json.loads(line)["text"] for line in (EVAL / "lambada_test.jsonl").read_text().splitlines()[:40:2]]
    states, targets = [], []
    with torch.no_grad():
        for text in texts:
            ids, first = tokenizer.encode(text), len(tokenizer.encode(text.rpartition(" ")[0]))
            h_LxD = theirs.gpt_neox(torch.tensor(ids[None])).last_hidden_state[0]
            states.append(h_LxD[first - 1 : -1])
            targets += ids[first:].tolist()
        head_VxD = 0.05 * torch.randn(MODEL.vocab_size, MODEL.d_model)
        head_VxD.index_add_(0, torch.tensor(targets), 10 * torch.linalg.pinv(torch.cat(states)).T)
        theirs.get_output_embeddings().weight.copy_(head_VxD)
    folder = tmp_path_factory.mktemp("neox")
    theirs.save_pretrained(folder)
    special = dict(eos_token="<|endoftext|>", bos_token="<|endoftext|>", pad_token="<|padding|>")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(TOKENIZER), **special)
    theirs = HFLM(pretrained=theirs, tokenizer=fast, batch_size=8, device="cpu", max_length=MAX_LENGTH)

    devices = make_mesh(MeshConfig(4, 2, 1))
    placed = place(MODEL, devices, backend_for(devices, MODEL))
    params = params_from_tensors(MODEL, load_file(folder / "model.safetensors"))
    params = jax.device_put(params, placed.param_shardings)
    scorer = Scorer(placed, max_length=MAX_LENGTH, batch_size=3, block=64)
    generator = Generator(placed, max_length=MAX_LENGTH, batch_size=3, num_ids=tokenizer.vocab_size)
    return SpiralLM(tokenizer, scorer, generator, params), theirs


class Record:
    """Which requests a model got, and what it answered."""

    def __init__(self, monkeypatch, lm):
        self.answers = []
        for name in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
            monkeypatch.setattr(lm, name, self._around(getattr(lm, name)))

    def _around(self, method):
        def answer(requests, **arguments):
            found = method(requests, **arguments)
            self.answers += [(request.args, answer) for request, answer in zip(requests, found, strict=True)]
            return found

        return answer


def compare(monkeypatch, pair, names, *, num_fewshot, limit, folder=EVAL):
    """Runs tasks with both models; their answers agree request by request, and so do the metrics. Returns ours."""
    from spiral_jax.evaluation import harness

    ours, theirs = pair
    tasks = harness.load_tasks(names, str(folder), MAX_LENGTH)
    with monkeypatch.context() as patch:
        records = Record(patch, ours), Record(patch, theirs)
        results, expected = (
            harness.run(lm, tasks, num_fewshot=num_fewshot, limit=limit, standard_errors=False) for lm in pair
        )
    found, wanted = (record.answers for record in records)
    assert [args for args, _ in found] == [args for args, _ in wanted]
    for (args, answer), (_, other) in zip(found, wanted, strict=True):
        if isinstance(answer, tuple):
            assert answer[0] == pytest.approx(other[0], abs=1e-3), args
            assert answer[1] == other[1], args
        elif isinstance(answer, float):  # a whole document: their sum is a float32
            windows = len(ours._tokenizer.encode(args[0])) / MAX_LENGTH
            assert answer == pytest.approx(other, abs=1e-3 * max(1, windows)), args
        else:
            assert answer == other, args
    values, others = catalogue.values_of(results), catalogue.values_of(expected)
    assert values.keys() == others.keys() and values
    for name, value in values.items():
        assert value == pytest.approx(others[name], rel=1e-4), name
    return results, wanted


@pytest.mark.slow
@needs_data
def test_a_few_requests_against_the_hugging_face_model(monkeypatch, pair):
    results, answers = compare(monkeypatch, pair, ["lambada_openai", "winogrande"], num_fewshot=0, limit=8)
    assert 0.2 < results["results"]["lambada_openai"]["acc,none"] < 0.9
    assert len(answers) == 8 + 2 * 8


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("num_fewshot", [0, 5])
def test_every_task_against_the_hugging_face_model(monkeypatch, pair, num_fewshot):
    """The metrics of the papers, prompts that are cut on the left, and flags of both kinds."""
    names, _ = catalogue.resolve(["paper"], str(EVAL))
    results, answers = compare(monkeypatch, pair, names, num_fewshot=num_fewshot, limit=12)
    assert {answer[1] for _, answer in answers} == {True, False}
    assert list(catalogue.paper_values(results)) == names
    longest = max(len(pair[0]._tokenizer.encode("".join(args))) for args, _ in answers)
    assert (longest > MAX_LENGTH + 100) == (num_fewshot == 5)


@needs_data
@pytest.mark.slow
def test_documents_against_the_hugging_face_model(monkeypatch, pair):
    results, _ = compare(monkeypatch, pair, ["wikitext"], num_fewshot=0, limit=5)
    assert set(results["results"]["wikitext"]) >= {"word_perplexity,none", "byte_perplexity,none", "bits_per_byte,none"}


@needs_data
@pytest.mark.parametrize("num_fewshot", [0, slow(2)])
def test_texts_against_the_hugging_face_model(monkeypatch, pair, tmp_path, num_fewshot):
    """Prompts of many lengths, one too long; stops by text and by length."""
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "complete.yaml").write_text(
        "task: complete\ncustom_dataset: !function spiral_jax.evaluation.documents.load\noutput_type: generate_until\n"
        "test_split: test\nfewshot_split: test\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n"
        "generation_kwargs: {until: [' a', 'er'], max_gen_toks: 12, do_sample: false}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
        "metadata: {version: 1.0, file: complete.jsonl}\n"
    )
    texts = [json.loads(line)["text"] for line in (EVAL / "lambada_test.jsonl").read_text().splitlines()[:8]]
    texts = [" ".join(text.split(" ")[:-1]) for text in texts] + ["Hello ", " ".join(texts)]
    rows = [json.dumps({"question": text, "answer": "yes"}) for text in texts]
    (tmp_path / "complete.jsonl").write_text("\n".join(rows))
    monkeypatch.setattr("spiral_jax.evaluation.harness.TASKS_FOLDER", tasks)
    _, answers = compare(monkeypatch, pair, ["complete"], num_fewshot=num_fewshot, limit=0, folder=tmp_path)
    assert len(answers) == 10
    assert len({answer for _, answer in answers}) > 1


# The commands.

TINY = """
from spiral_jax.run.config import default_config

def get_config(argument=""):
    config = default_config()
    config.model.update(dict(vocab_size=288, d_model=32, num_heads=2, prelude_layers=1, core_layers=1, coda_layers=0,
                             chunks=(2, 1), dtype="float32"))
    config.train.update(dict(steps=4, batch_size=8, sequence_length=64))
    config.data.paths = ("{text}",)
    config.checkpoint.every_steps = 4
    config.evaluation.update(dict(tasks=("piqa", "lambada_openai"), tasks_every_steps=3, tasks_data="{data}",
                                  tasks_limit=5, num_fewshot=1))
    return config
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data of two tasks, a configuration that runs them, and a finished run."""
    folder = tmp_path_factory.mktemp("harness")
    (folder / "text.txt").write_text("".join(f"line {i} of a text, naïvely counted\n" for i in range(300)))
    (folder / "tiny.py").write_text(
        TINY.replace("{text}", str(folder / "text.txt")).replace("{data}", str(folder / "data"))
    )
    (folder / "data").mkdir()
    # One continuation is longer than the model's context.
    rows = [{"goal": f"count to {i}", "sol1": f"line {i} of a text" * (9 if i == 3 else 1), "sol2": "sleep", "label": 0}
            for i in range(10)]  # fmt: skip
    (folder / "data" / "piqa_valid.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows = [{"text": f"line {i} of a text, naïvely counted"} for i in range(10)]
    (folder / "data" / "lambada_test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    measured = TaskEvaluation.metrics

    def slow(self, *given):
        time.sleep(SLOW)
        return measured(self, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskEvaluation, "metrics", slow)
        assert call(train, f"--config={folder}/tiny.py", f"--workdir={folder}/run")[0] == 0
    return folder


SLOW = 4.0  # seconds that the tasks take at least
NAMES = {"task/piqa/acc", "task/piqa/acc_norm", "task/lambada_openai/acc", "task/lambada_openai/perplexity"}


@pytest.mark.slow
def test_tasks_while_training(folder):
    """Every third step and at the end; outside of the steps' time, however long they take."""
    rows = metrics.read_rows(folder / "run" / "metrics.jsonl")
    with_tasks = {row["step"]: {name for name in row if name.startswith("task/")} for row in rows}
    assert with_tasks == {1: set(), 2: set(), 3: NAMES, 4: NAMES}
    assert all(0 <= row["task/piqa/acc_norm"] <= 1 for row in rows[2:])
    assert max(row["step_time"] for row in rows) < SLOW


def evaluated(folder, capsys, *flags):
    capsys.readouterr()
    code, errors = call(evaluate, f"--workdir={folder}/run", f"--tasks_data={folder}/data", *flags)
    return code, capsys.readouterr().out, errors


@pytest.mark.slow
def test_tasks_by_command(folder, capsys, tmp_path):
    """The same numbers as in training, whatever the batch; a table, remarks and a file."""
    output = tmp_path / "new" / "results.json"
    flags = ("--tasks=paper", "--num_fewshot=1", "--limit=5", "--batch_size=3", f"--output={output}")
    code, out, errors = evaluated(folder, capsys, *flags)
    assert code == 0, errors
    assert "|piqa" in out and "checkpoint of step 4, 1-shot, the first 5 documents of each task" in out
    assert "note: piqa: few-shot examples from the evaluated split, never the item itself" in out
    assert f"note: paper: left out, as {folder}/data has no data for them: lambada_standard, hellaswag" in out
    results = json.loads(output.read_text())
    last = metrics.read_rows(folder / "run" / "metrics.jsonl")[-1]
    for name in NAMES:
        _, task, metric = name.split("/")
        assert results["results"][task][f"{metric},none"] == pytest.approx(last[name], rel=1e-5)
    assert results["paper"]["piqa"] == {"metric": "acc_norm", "value": results["results"]["piqa"]["acc_norm,none"]}
    assert results["config"]["model_args"] == {"workdir": str(folder / "run"), "step": 4}
    assert results["n-samples"]["piqa"]["effective"] == 5
    assert len(results["notes"]) == 3

    code, out, _ = evaluated(folder, capsys, "--tasks=piqa", "--json")
    assert code == 0
    printed = json.loads(out)
    (written,) = (folder / "run" / "lm_eval").iterdir()
    assert json.loads(written.read_text())["results"] == printed["results"]
    assert printed["results"]["piqa"]["acc_stderr,none"] >= 0


BAD = {
    "unknown task": ("--tasks=pica", "--tasks is 'pica'; allowed with --tasks_data: paper, "),
    "missing data": ("--tasks=sciq", "which has no sciq_valid.jsonl; allowed: "),
    "no such folder": ("--tasks=piqa --tasks_data=/no/such", "--tasks_data is '/no/such', which is no folder"),
    "fewer than no examples": ("--tasks=piqa --num_fewshot=-1", "--num_fewshot is -1; allowed: 0 or more"),
    "a negative limit": ("--tasks=piqa --limit=-2", "--limit is -2"),
    "a text as well": ("--tasks=piqa --input=x.txt", "--input is x.txt; allowed: only without --tasks"),
    "a stride as well": ("--tasks=piqa --stride=4", "--stride is 4; allowed: only without --tasks"),
    "examples for a text": ("--num_fewshot=5", "--num_fewshot is 5; allowed: only with --tasks"),
    "an empty batch": ("--tasks=piqa --batch_size=0", "--batch_size is 0"),
    "broken data": ("--tasks=arc_easy", "arc_easy_test.jsonl: line 1 is '{'; allowed: a JSON object per line"),
    "other data": ("--tasks=winogrande", "winogrande_dev.jsonl: row 2 has no 'option2'; allowed: rows with sentence, "),
    "too few examples": ("--tasks=piqa --num_fewshot=10", "--num_fewshot is 10; allowed: 0 to 9 for piqa, of whose 10"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(folder, capsys, case, monkeypatch):
    """One line, status 2, and nothing compiled."""
    flags, expected = BAD[case]
    (folder / "data" / "arc_easy_test.jsonl").write_text("{\n")
    whole = {"sentence": "a _ b", "option1": "c", "option2": "d", "answer": "1"}
    lines = [json.dumps(whole), json.dumps({name: whole[name] for name in ("sentence", "option1", "answer")})]
    (folder / "data" / "winogrande_dev.jsonl").write_text("\n".join(lines) + "\n")
    compiled = []
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda *a, **k: compiled.append(a))
    monkeypatch.setattr(evaluate, "placed_model", lambda *a: compiled.append(a))
    code, out, errors = evaluated(folder, capsys, *flags.split())
    assert (code, out, compiled) == (2, "", [])
    assert errors.startswith("error: ") and errors.count("\n") == 1
    assert expected in errors


def test_without_the_harness(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, out, errors = evaluated(folder, capsys, "--tasks=piqa")
    assert (code, out, errors) == (2, "", "error: --tasks needs lm_eval: pip install 'spiral_jax[harness]'\n")


@pytest.mark.slow
def test_the_hub_s_tasks(monkeypatch):
    """An unknown name, and data that cannot be reached."""
    from lm_eval.tasks import TaskManager

    from spiral_jax.evaluation import harness

    monkeypatch.setattr(harness, "TaskManager", functools.cache(TaskManager))  # its index takes seconds
    with pytest.raises(SpiralError, match=r"^--tasks is 'pica'; allowed: paper, a name that `lm_eval ls tasks`"):
        harness.load_tasks(["pica"], "", 64)
    manager = harness.TaskManager()
    assert not [name for name in catalogue.PAPER if name not in manager.task_index]

    def unreachable(*args):
        raise ConnectionError("Couldn't reach\nthe Hub")

    monkeypatch.setattr(TaskManager, "load", unreachable)
    expected = r"^--tasks: piqa cannot be opened \(ConnectionError: Couldn't reach the Hub\); .* give --tasks_data=DIR$"
    with pytest.raises(SpiralError, match=expected):
        harness.load_tasks(["piqa"], "", 64)


def test_a_group_of_tasks(folder, monkeypatch, tmp_path):
    """Its mean is among the results, as for the 57 tasks of MMLU; and the harness leaves no seed behind."""
    from spiral_jax.evaluation import harness

    class Chooser(harness.SpiralLM):
        """Likes the first choice of even questions."""

        def __init__(self):
            harness.LM.__init__(self)

        def loglikelihood(self, requests):
            return [(-float(request.idx == request.doc["label"] % 2), False) for request in requests]

    for i in (1, 2):
        text = (catalogue.TASKS_FOLDER / "piqa.yaml").read_text()
        (tmp_path / f"part_{i}.yaml").write_text(text.replace("task: piqa", f"task: part_{i}"))
    (tmp_path / "group.yaml").write_text(
        "group: mmlu_continuation\ntask: [part_1, part_2]\n"
        "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\nmetadata: {version: 2}\n"
    )
    monkeypatch.setattr(harness, "TASKS_FOLDER", tmp_path)
    random.seed(5)
    np.random.seed(5)
    tasks = harness.load_tasks(["mmlu_continuation"], str(folder / "data"), 64)
    results = harness.run(Chooser(), tasks, num_fewshot=0, limit=4)
    assert [random.random(), np.random.random()] == [random.Random(5).random(), np.random.RandomState(5).random()]
    assert catalogue.values_of(results)["mmlu_continuation/acc"] == 0
    assert catalogue.paper_values(results) == {"mmlu_continuation": {"metric": "acc", "value": 0}}
    assert "mmlu_continuation" in harness.as_text(results) and " - part_2" in harness.as_text(results)


def test_a_configuration_with_bad_tasks_stops_before_training(folder, tmp_path):
    for flags, expected in (
        ("--config.evaluation.tasks=('pica',)", "evaluation.tasks is 'pica'"),
        ("--config.evaluation.tasks_data=/no/such", "evaluation.tasks_data is '/no/such'"),
        ("--config.evaluation.num_fewshot=-1", "evaluation.num_fewshot is -1"),
    ):
        code, errors = call(train, f"--config={folder}/tiny.py", f"--workdir={tmp_path}/run", flags)
        assert code == 2 and errors.count("\n") == 1, errors
        assert expected in errors
        assert not (tmp_path / "run" / "config.json").exists()


def test_the_network_is_left_alone(folder, capsys, monkeypatch):
    """With --tasks_data nothing but local files is opened."""
    import socket

    def refuse(*args, **kwargs):
        raise AssertionError(f"a connection to {args}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    code, _, errors = evaluated(folder, capsys, "--tasks=lambada_openai", "--limit=2")
    assert code == 0, errors
    assert os.environ["HF_HUB_OFFLINE"] == os.environ["HF_DATASETS_OFFLINE"] == "1"
    shutil.rmtree(folder / "run" / "lm_eval", ignore_errors=True)
