"""The notebook for one free chip, run on CPU with tiny sizes; and that it is as a reader should find it."""

import json
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "tpu" / "first_chip.ipynb"
TINY = """
INSTALL = False
FIRST_HOUR = ["--sections=device,point-160m-vanilla"]
TRAIN = ["--config=experiments/quickstart.py", "--config.data.paths=docs/*.md", "--config.data.exclude=()",
         "--config.data.bpe_vocab_size=300", "--config.model.vocab_size=300", "--config.model.d_model=32",
         "--config.model.num_heads=1", "--config.train.steps=6", "--config.train.sequence_length=32",
         "--config.train.loss_block=32", "--config.train.batch_size=2", "--config.summary.plot=False",
         "--config.summary.sample_tokens=0", "--config.evaluation.every_steps=6", "--config.checkpoint.every_steps=6"]
WORKDIR = {workdir!r}
"""


def read():
    nbformat = pytest.importorskip("nbformat")
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_has_no_outputs_and_is_valid():
    book = read()
    pytest.importorskip("nbformat").validate(book)
    for cell in book.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None
            compile(cell.source, "cell", "exec")
    assert NOTEBOOK.read_text() == json.dumps(json.loads(NOTEBOOK.read_text()), indent=1, ensure_ascii=False) + "\n"


@pytest.mark.slow
def test_it_runs(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("XLA_FLAGS", "")  # one device
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    book = read()
    (parameters,) = (cell for cell in book.cells if "parameters" in cell.metadata.get("tags", ()))
    parameters.source += TINY.format(workdir=str(tmp_path / "run"))
    hour = tmp_path / "first_hour.json"
    for cell in book.cells:
        cell.source = cell.source.replace("first_hour.json", str(hour))
    nbclient.NotebookClient(book, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()

    text = {number: outputs(cell) for number, cell in enumerate(book.cells) if cell.cell_type == "code"}
    assert any("exit status 0" in printed for printed in text.values())
    assert any("finished: 6 steps" in printed for printed in text.values())
    assert any("as expected" in printed for printed in text.values())
    pictures = [output for cell in book.cells if cell.cell_type == "code"
                for output in cell.outputs if "image/png" in output.get("data", {})]  # fmt: skip
    assert len(pictures) == 1
    assert json.loads(hour.read_text())["sections"]["point-160m-vanilla"]["status"] == "passed"
    assert os.path.exists(tmp_path / "run" / "metrics.jsonl")


def outputs(cell):
    return "".join(output.get("text", "") for output in cell.outputs)
