"""What a run that diverged leaves, and readers of what it left: status, line, checkpoints, nulls in JSON."""

import json
import math
import types

import numpy as np
import pytest
from etils.epath import Path
from verbs import call

from spiral_jax import evaluate, train
from spiral_jax.convert.card import _last
from spiral_jax.data.json_files import finite
from spiral_jax.evaluation.perplexity import Score
from spiral_jax.parallel.processes import ALONE
from spiral_jax.run.checkpoint import Checkpoints
from spiral_jax.run.config import RunConfig
from spiral_jax.run.metrics import read_rows, step_line
from spiral_jax.run.summary import plot_loss

CONFIG = """
from spiral_jax.run.config import default_config


def get_config():
    c = default_config()
    c.model.update(dict(vocab_size=264, d_model=16, num_heads=2, prelude_layers=1, core_layers=0, coda_layers=0,
                        chunks=(), topology="base", dtype="float32"))
    c.train.update(dict(steps=20, batch_size=8, sequence_length=16))
    c.optimizer.update(dict(peak_learning_rate=1e30, warmup_steps=0))
    c.data.update(dict(paths=("TEXT",), validation_fraction=0.1))
    c.checkpoint.update(dict(every_steps=1, keep=20))
    c.evaluation.every_steps = 100
    c.divergence.update(dict(skips_in_a_row=2, returns=2))
    return c
"""
ROWS = [
    {"step": 1, "loss": 5.5, "skipped": 0, "validation_loss": 5.0, "validation_bits_per_byte": 7.0},
    {"step": 2, "loss": None, "skipped": 1, "validation_loss": None, "validation_bits_per_byte": None},
]


@pytest.fixture(scope="module")
def diverged(tmp_path_factory):
    """A run at a learning rate of 1e30: its directory, and what the command said."""
    folder = tmp_path_factory.mktemp("diverged")
    text = " ".join(f"{n} times {n} is {n * n}." for n in range(100, 215))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    (folder / "config.py").write_text(CONFIG.replace("TEXT", str(folder / "text.txt")), encoding="utf-8")
    return folder / "run", *call(train, f"--config={folder / 'config.py'}", f"--workdir={folder / 'run'}")


def test_a_run_that_diverges_ends_with_44_and_one_line(diverged):
    workdir, status, errors = diverged
    rows = read_rows(Path(workdir / "metrics.jsonl"))
    assert (status, errors.count("\n")) == (44, 1), errors
    # The first update makes numbers that are finite, and every loss of theirs is not. Steps 2 and 3 are skipped and 4
    # is on its way: 4 is passed over with them, and the next two are 5 and 6.
    assert [row["step"] for row in rows if row["skipped"]] == list(range(2, len(rows) + 1))
    assert all(row["loss"] is None for row in rows[1:])
    assert errors.startswith("diverged: after 2 skipped updates in a row, the last one of step 9, and 2 returns to a ")
    checkpoints = Checkpoints(Path(workdir), read_only=True)
    assert checkpoints.steps() == list(range(1, 10))
    assert checkpoints.load_meta(9)["divergence"] == {"in_a_row": 2, "good": 7, "passed_over": [[2, 4], [5, 7]]}
    checkpoints.close()


def test_its_evaluation_is_json(diverged, capsys):
    workdir, *_ = diverged
    status, errors = call(evaluate, f"--workdir={workdir}", "--json")
    assert status == 0, errors
    report = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert report["loss"] is report["perplexity"] is report["bits_per_byte"] is None
    assert report["tokens"] > 0


def test_numbers_that_are_none_are_null():
    values = {"a": math.nan, "b": [1.5, math.inf, (np.float64("nan"), 2)], "c": {"d": -math.inf}, "e": "nan", "f": True}
    assert finite(values) == {"a": None, "b": [1.5, None, [None, 2]], "c": {"d": None}, "e": "nan", "f": True}
    assert Score(nats=8000.0, tokens=1, utf8_bytes=1).perplexity == math.inf
    assert math.isnan(Score(nats=math.nan, tokens=1, utf8_bytes=1).perplexity)
    assert Score(nats=700.0, tokens=1, utf8_bytes=1).perplexity == math.exp(700)


def test_the_end_of_a_run_and_the_card_take_the_last_number_there_is(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    train.finish(RunConfig(), Path(tmp_path), types.SimpleNamespace(validation=None, examples=None), ALONE)
    printed = capsys.readouterr().out
    assert "skipped updates: 1, the last one of step 2" in printed
    assert "validation after step 1: 7.0000 bits per byte, 5.0000 nats per token" in printed
    assert _last(ROWS, "loss") == "5.5000 (step 1)" and _last(ROWS[1:], "loss") == "not recorded"
    row = {"step": 2, "loss": math.nan, "learning_rate": 0.1, "tokens_per_second": 5.0}
    assert "loss nan" in step_line(row, 20, 5.0)


def test_the_plot_lives_with_nulls(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    assert plot_loss(Path(tmp_path)).exists()
