"""The commands on a task with targets and weights of its own: trained, resumed, evaluated, described."""

import json

import pytest
from verbs import call

from spiral_jax import describe, evaluate, train
from spiral_jax.run.metrics import read_rows

CONFIG = """
import numpy as np
from spiral_jax.data.examples import Example, ExampleSource, example_sources
from spiral_jax.run.config import default_config


@example_sources.register("copy")
class Copy(ExampleSource):
    symbols = ("<|endoftext|>", *"abcdef")

    def example(self, index, rng, length):
        tokens_L = rng.integers(1, len(self.symbols), size=length)
        every_other = np.arange(length) % 2
        return Example(tokens_L, tokens_L, 1.0 + 2 * every_other, every_other)


@example_sources.register("rows")
class Rows(Copy):  # a data set: its rows do not come from the seed
    num_examples = 5

    def example(self, index, rng, length):
        return super().example(index, np.random.default_rng(index), length)


def get_config(argument="copy"):
    c = default_config()
    c.model.update(dict(vocab_size=16, d_model=16, num_heads=2, prelude_layers=0, core_layers=1, coda_layers=0,
                        chunks=(2, 1), rotary_fraction=0.5, dtype="float32"))
    c.train.update(dict(steps=8, batch_size=16, sequence_length=32, accumulation=2))
    c.optimizer.update(dict(peak_learning_rate=2e-2, warmup_steps=2, schedule="constant"))
    c.data.examples = argument
    c.checkpoint.every_steps = 4
    c.evaluation.update(dict(every_steps=4, batches=2))
    return c
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples")
    (folder / "config.py").write_text(CONFIG)
    return folder


@pytest.mark.slow
def test_a_run_on_ones_own_examples_is_resumed_bitwise_and_evaluated(folder, capsys):
    config = f"--config={folder}/config.py"
    assert call(train, config, f"--workdir={folder}/straight") == (0, "")
    assert call(train, config, f"--workdir={folder}/resumed", "--config.train.steps=4") == (0, "")
    assert call(train, config, f"--workdir={folder}/resumed") == (0, "")
    printed = capsys.readouterr().out
    assert "resuming after step 4 of 8" in printed and "% right" in printed
    straight, resumed = (read_rows(folder / name / "metrics.jsonl") for name in ("straight", "resumed"))
    names = ("step", "loss", "gradient_norm", "validation_loss", "validation_accuracy")
    assert [[row.get(name) for name in names] for row in straight] == [[row.get(n) for n in names] for row in resumed]
    assert straight[-1]["loss"] < straight[0]["loss"] - 0.5

    own = f"--import={folder}/config.py"
    assert call(evaluate, own, f"--workdir={folder}/straight", "--limit=32", "--json",
                f"--documents={folder}/documents.json") == (0, "")  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    documents = json.loads((folder / "documents.json").read_text())
    assert documents["input"] == "copy" and documents["by_group"] == found["by_group"]
    assert documents["tokens"] == [64] * 32  # every other answer counts three times
    assert sum(documents["nats"]) / sum(documents["tokens"]) == pytest.approx(found["loss"])
    assert found["windows"] == 32 and found["answers"] == 32 * 32 and set(found["by_group"]) == {"0", "1"}
    assert found["loss"] == pytest.approx(straight[-1]["validation_loss"], rel=1e-5)
    assert found["accuracy"] == pytest.approx(straight[-1]["validation_accuracy"], abs=1e-9)

    # A batch is 8 of them.
    assert call(evaluate, own, f"--workdir={folder}/straight", "--limit=11", "--json",
                f"--documents={folder}/documents.json") == (0, "")  # fmt: skip
    some, eleven = json.loads(capsys.readouterr().out), json.loads((folder / "documents.json").read_text())
    assert some["windows"] == 11 and some["answers"] == 11 * 32
    assert eleven["nats"] == pytest.approx(documents["nats"][:11], rel=1e-6)

    (folder / "config.py").write_text(CONFIG.replace("2 * every_other", "3 * every_other"))
    status, errors = call(train, config, f"--workdir={folder}/resumed")
    (folder / "config.py").write_text(CONFIG)
    assert status == 2 and errors.count("\n") == 1
    assert "data.examples 'copy': its tokens are not those the run" in errors


def test_examples_are_described(folder, capsys):
    assert call(describe, f"--config={folder}/config.py:listops", "--json", "--data") == (0, "")
    assert json.loads(capsys.readouterr().out)["data"]["examples"] == 2**31


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.data.examples=copies", "data.examples is 'copies'; did you mean 'copy'"),
        ("--config.model.vocab_size=4", "data.examples 'copy': example 0: tokens_L is id "),
        ("--config.evaluation.batches=0", "evaluation.batches is 0"),
        ("--config.data.paths=('a',)", "data.examples is 'copy'; allowed: without data.paths"),
        ("--config.data.examples=rows", "data.examples 'rows': held_out gives the examples that are trained on"),
    ],
)
def test_what_does_not_go_together_is_one_line(folder, tmp_path, flag, message):
    status, errors = call(train, f"--config={folder}/config.py", f"--workdir={tmp_path}/run", flag)
    assert status == 2 and message in errors and errors.count("\n") == 1
    assert not (tmp_path / "run").exists()
