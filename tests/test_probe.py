"""`python -m spiral_jax.probe` on models of three words: a run, exported folders, two of them side by side."""

import csv
import dataclasses
import json

import numpy as np
import pytest
from folders import contents, run_of, write_folder
from verbs import call

from spiral_jax import probe
from spiral_jax.model.config import ModelConfig

SPIRAL = ModelConfig(vocab_size=6, d_model=16, num_heads=4, prelude_layers=0, core_layers=1, coda_layers=0,
                     chunks=(2, 1), rotary_fraction=0.5, dtype="float32")  # fmt: skip
LOOPED = dataclasses.replace(SPIRAL, chunks=(1,), topology="anchor")
TABLES = {"heads.csv", "updates.csv", "cka.csv", "singular_values.csv", "weights.csv"}
FIGURES = {"heads.png", "states.png", "weights.png"}


@pytest.fixture(scope="module")
def place(random_model, tmp_path_factory):
    """Two models, a run of the first, and a text."""
    place = tmp_path_factory.mktemp("probe")
    for name, config in (("spiral", SPIRAL), ("looped", LOOPED)):
        hf_config, tensors, _ = random_model(config)
        write_folder(place / name, hf_config, tensors)
    run_of(place / "spiral", place / "run")
    words = np.random.default_rng(0).choice(["a", "b"], 400)
    (place / "text.txt").write_text(" ".join(words), encoding="utf-8")
    return place


def run(place, workdir, output, *arguments):
    given = (f"--data={place}/text.txt", "--samples=5", "--sequence_length=24", "--batch_size=3")
    return call(probe, f"--workdir={place}/{workdir}", f"--output={output}", *given, *arguments)


def rows_of(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_beside_a_folder(place, tmp_path, capsys):
    out = tmp_path / "new/out"
    assert run(place, "run", out, f"--beside={place}/looped")[0] == 0
    printed = capsys.readouterr().out
    assert "run, step 0: 0+1x{1/2,1}+0 mesh, 5 sequences of 24 tokens" in printed and "looped: 0+1x{1}+0" in printed

    both = {"about.json", "probes.npz", *TABLES, *FIGURES}
    assert {path.name for path in out.iterdir()} == both | {"beside.png", "beside"}
    assert {path.name for path in (out / "beside").iterdir()} == both
    for path in out.rglob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000
    about = json.loads((out / "about.json").read_text(encoding="utf-8"))
    assert (about["step"], about["samples"], about["sequence_length"], about["seed"]) == (0, 5, 24, 0)

    arrays = np.load(out / "probes.npz", allow_pickle=False)
    assert list(arrays["chunk_T"]) == [2, 1] and list(arrays["length_T"]) == [12, 24]
    assert list(arrays["window_T"]) == [16, 32]
    heads = rows_of(out / "heads.csv")
    assert len(heads) == 2 * 1 * 4 and {row["chunk"] for row in heads if row["iteration"] == "0"} == {"2"}
    for name in ("entropy", "local_mass"):
        value_TxCxH = np.array([float(row[name]) for row in heads]).reshape(2, 1, 4)
        assert value_TxCxH == pytest.approx(arrays[f"{name}_TxCxH"], rel=1e-5) and np.ptp(value_TxCxH) > 1e-3
        assert arrays[f"dynamic_{name}_CxH"].sum() == 2
    for row in rows_of(out / "weights.csv"):
        mean_W = arrays[f"{row['weight']}.{row['where']}_W"]
        assert float(row["mean"]) == pytest.approx(mean_W[int(row["index"])], rel=1e-5)
        assert mean_W.sum() == pytest.approx(1, abs=1e-5)
    of = {(row["weight"], row["where"]) for row in rows_of(out / "weights.csv")}
    slots = {(side, where) for side in ("write", "read") for where in ("entry", "0", "1")}
    assert of == slots | {("pooling", "0"), ("allocation", "0")}
    assert [row["block"] for row in rows_of(out / "updates.csv")] == ["prelude", "core 0", "core 1", "coda"]
    assert len(rows_of(out / "cka.csv")) == 5**2 and not rows_of(out / "beside/weights.csv")

    # Its own folder is replaced; one with something else is not.
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    before = contents(out / "beside")
    status, errors = run(place, "run", out)
    assert status == 2 and "notes.txt; allowed: a folder that is new or empty" in errors
    assert contents(out / "beside") == before


@pytest.mark.slow
def test_a_folder_shows_what_its_run_does(place, tmp_path):
    """And again in place of the first; the text in batches of another size."""
    for workdir, batch_size in (("run", 1), ("spiral", 4)):
        out = tmp_path / workdir
        assert run(place, workdir, out, f"--batch_size={batch_size}")[0] == 0
    first, second = (np.load(tmp_path / name / "probes.npz") for name in ("run", "spiral"))
    for name in first.files:
        if first[name].dtype.kind == "f":
            assert second[name] == pytest.approx(first[name], abs=1e-5), name
    (tmp_path / "spiral/heads.png").unlink()
    assert run(place, "spiral", tmp_path / "spiral", "--samples=1")[0] == 0
    assert (tmp_path / "spiral/heads.png").exists()
    assert json.loads((tmp_path / "spiral/about.json").read_text(encoding="utf-8"))["samples"] == 1
