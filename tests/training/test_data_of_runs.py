"""What the train command makes of `data.stores`: mixtures, stages, stores that moved, changed or hold a wrong id."""

import json
import shutil

import numpy as np
import pytest
from verbs import call

import spiral_jax
from spiral_jax import evaluate, train
from spiral_jax.data.store_writer import StoreWriter
from spiral_jax.data.tokenizers import ByteTokenizer
from spiral_jax.run.metrics import read_rows

WINDOWS = {"one": 40, "two": 10}  # of 8
CONFIG = """
from spiral_jax.run.config import default_config

def get_config(argument=""):
    config = default_config()
    config.model.update(dict(vocab_size=264, d_model=16, num_heads=2, prelude_layers=0, core_layers=1, coda_layers=0,
                             chunks=(2, 1), dtype="float32", unroll=True))
    config.train.update(dict(steps=6, batch_size=8, sequence_length=8))
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_steps = 1
    config.checkpoint.every_steps = 2
    return config
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two stores of bytes, one with a validation store, and a configuration."""
    folder = tmp_path_factory.mktemp("data_of_runs")
    (folder / "tiny.py").write_text(CONFIG)
    rng = np.random.default_rng(0)
    for name, windows in WINDOWS.items():
        write(folder / name / "train", rng.integers(97, 123, windows * 8))
    write(folder / "two/validation", rng.integers(97, 123, 100))
    return folder


def write(place, ids_N):
    with StoreWriter(place, ByteTokenizer()) as writer:
        writer.add(ids_N, utf8_bytes=len(ids_N))


def run(folder, name, *flags, stores=("one", "two")):
    places = ",".join(f"'{folder / store}'" for store in stores)
    return call(
        train, f"--config={folder}/tiny.py", f"--workdir={folder / name}", f"--config.data.stores=({places},)", *flags
    )


def rows_of(folder, name):
    kept = ("step", "loss", "epoch", "epochs_of_stores", "validation_loss")
    return [{key: row.get(key) for key in kept} for row in read_rows(folder / name / "metrics.jsonl")]


WEIGHTED = "--config.data.weights=((0.5, 0.5),)"


@pytest.fixture(scope="module")
def weighted(folder):
    assert run(folder, "weighted", WEIGHTED) == (0, "")
    return rows_of(folder, "weighted")


def test_epochs_are_logged_as_fractions(folder, weighted):
    for row in weighted:
        windows = 8 * row["step"]
        assert row["epoch"] == windows / 50
        assert row["epochs_of_stores"] == [windows / 2 / 40, windows / 2 / 10]
    assert weighted[-1]["validation_loss"] is not None  # of the second store, the first one has none


@pytest.mark.slow
def test_stores_by_size_and_what_is_left_in_the_directory(folder, capsys):
    assert run(folder, "by_size") == (0, "")
    rows = rows_of(folder, "by_size")
    assert rows[-1]["epoch"] == 48 / 50 and rows[-1]["epochs_of_stores"] is None
    places = json.loads((folder / "by_size/data.json").read_text())
    assert places["train"] == [str(folder / "one/train"), str(folder / "two/train")]
    assert call(evaluate, f"--workdir={folder}/by_size", "--json") == (0, "")
    spiral_jax.load(folder / "by_size")


@pytest.mark.slow
def test_a_later_stage_is_decided_on_resume_and_stores_may_have_moved(folder, weighted):
    shutil.copytree(folder / "one", folder / "moved")
    assert run(folder, "staged", WEIGHTED, "--config.train.steps=4", stores=("moved", "two")) == (0, "")
    assert rows_of(folder, "staged")[:3] == weighted[:3]
    staged = ("--config.data.weights=((0.5, 0.5),(0.0, 1.0))", "--config.data.stage_starts=(0,4)")
    assert run(folder, "staged", *staged) == (0, "")
    assert rows_of(folder, "staged")[-1]["epochs_of_stores"] == [16 / 40, (16 + 16) / 10]
    straight = run(folder, "straight", *staged)
    assert straight == (0, "")
    losses = [[row["loss"] for row in rows_of(folder, name)] for name in ("staged", "straight")]
    assert losses[0] == losses[1]


def test_tokens_that_changed_since_the_run_began_are_named(folder, weighted):
    shutil.copytree(folder / "two", folder / "changed")
    shutil.rmtree(folder / "changed/train")
    write(folder / "changed/train", np.arange(80) % 26 + 97)
    before = (folder / "weighted/metrics.jsonl").read_text()
    status, errors = run(folder, "weighted", WEIGHTED, "--config.train.steps=8", stores=("one", "changed"))
    assert status == 2 and errors.count("\n") == 1
    assert f"{folder}/changed/train: its tokens are not those the run in {folder}/weighted began with" in errors
    status, errors = run(folder, "weighted", "--config.data.weights=((1.0,),)", stores=("one",))
    assert status == 2 and "data.weights" in errors
    assert (folder / "weighted/metrics.jsonl").read_text() == before


@pytest.mark.slow
def test_a_store_more_needs_weights(folder):
    assert run(folder, "alone", stores=("one",)) == (0, "")
    status, errors = run(folder, "alone", "--config.train.steps=8")
    assert status == 2 and "data.stores has 2 stores; allowed: the 1 that the run" in errors and errors.count("\n") == 1


def test_a_token_out_of_range_stops_the_run_and_keeps_what_was_saved(folder):
    shutil.copytree(folder / "one", folder / "bad")
    tokens = np.memmap(folder / "bad/train/tokens.bin", "<u2", "r+")
    tokens[::8] = 300  # in every window
    tokens.flush()
    # A store that was damaged is refused when it is opened; one of a writer with a mistake, or an old one, is not.
    manifest = json.loads((folder / "bad/train/manifest.json").read_text(encoding="utf-8"))
    for file in manifest["files"].values():
        del file["block_bytes"], file["crc32_of_blocks"]
    (folder / "bad/train/manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert run(folder, "broken", stores=("one",)) == (0, "")
    status, errors = run(folder, "broken", "--config.train.steps=8", stores=("bad",))
    assert status == 2 and errors.count("\n") == 1
    assert f"{folder}/bad/train/tokens.bin: document 0, token " in errors
    assert "is id 300; allowed: 0 to 263 (model.vocab_size - 1)" in errors
    assert (folder / "broken/checkpoints/6").is_dir()
