"""Topologies, poolings and optimizers in files of one's own: every command takes them, none runs without the file."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from verbs import call

import spiral_jax
from spiral_jax import describe, evaluate, export, generate, train
from spiral_jax.model.config import ModelConfig
from spiral_jax.model.operators import Linear
from spiral_jax.model.topology import topologies
from spiral_jax.parallel.mesh import check_divisible
from spiral_jax.run import own_code
from spiral_jax.run.metrics import read_rows

ROOT = Path(__file__).parents[2]
SMALL = [
    "--config.model.d_model=32", "--config.model.core_layers=1", "--config.model.chunks=(2,1)",
    "--config.optimizer.schedule=constant", "--config.train.steps=4", "--config.train.batch_size=8",
    "--config.train.sequence_length=16",
    "--config.checkpoint.every_steps=2",
]  # fmt: skip
ON_A_MESH = ["--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"]
OWN = """
import jax
import jax.numpy as jnp
import optax
from spiral_jax.run.config import default_config
from spiral_jax.model.operators import Linear
from spiral_jax.model.pooling import Pooling, poolings
from spiral_jax.model.spreading import Spreading, spreadings
from spiral_jax.model.topology import Topology, topologies
from spiral_jax.training.optimizers import optimizers
from spiral_jax.training.schedules import Schedule, schedules


@poolings.register("own_last")
class Last(Pooling):
    def pool(self, h_BxNxGxD, is_token_NxG, level, linears):
        return h_BxNxGxD[:, :, -1]


@spreadings.register("own_first")
class First(Spreading):
    def shares(self, zhat_BxNxD, level, linears):
        return jax.nn.one_hot(0, level.chunk)[None, None]


@optimizers.register("own_lion")
def lion(config, learning_rate, model):
    return optax.lion(learning_rate, b1=config.beta1, weight_decay=config.weight_decay)


@schedules.register("own_square_root")
class SquareRoot(Schedule):
    def factor(self, k):
        return (self.config.resolved_warmup(self.steps) / (k + 1)) ** 0.5


def get_config(argument=""):
    config = default_config()
    config.model.update(dict(vocab_size=264, d_model=32, num_heads=2, prelude_layers=1, core_layers=1, coda_layers=0,
                             chunks=(2, 1), dtype="float32", topology="base"))
    config.model.update(dict(pooling="own_last", allocation="own_first"))
    config.train.update(dict(steps=3, batch_size=8, sequence_length=16))
    config.optimizer.update(dict(name="own_lion", schedule="own_square_root", warmup_steps=1, peak_learning_rate=1e-3))
    config.data.paths = ("TEXT",)
    config.data.validation_fraction = 0.2
    config.mesh.data, config.mesh.fsdp = 2, 4
    return config
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A copy of the example, a file with one of everything else, and a text."""
    folder = tmp_path_factory.mktemp("own")
    shutil.copy(ROOT / "experiments/own_topology.py", folder / "mine.py")
    text = folder / "text.txt"
    text.write_text("".join(f"line {i} of a text\n" for i in range(400)))
    (folder / "own.py").write_text(OWN.replace("TEXT", str(text)))
    return folder


def arguments(folder, *more):
    return [f"--config={folder}/mine.py", *SMALL, f"--config.data.paths={folder}/text.txt", *more]


@pytest.fixture(scope="module")
def run(folder):
    """Of the example."""
    workdir = folder / "run"
    assert call(train, *arguments(folder, f"--workdir={workdir}")) == (0, "")
    return workdir


@pytest.mark.slow
def test_the_example_trains_decodes_and_is_counted(folder, capsys):
    """On a mesh, resumed after step 2 of 4."""
    run = folder / "on_a_mesh"
    for steps in (2, 4):
        flags = (*ON_A_MESH, f"--workdir={run}", f"--config.train.steps={steps}")
        assert call(train, *arguments(folder, *flags)) == (0, "")
    assert [row["step"] for row in read_rows(run / "metrics.jsonl")] == [1, 2, 3, 4]
    saved = json.loads((run / own_code.FILE).read_text())
    assert saved["model.topology"]["name"] == "blend" and len(saved["model.topology"]["sha256"]) == 64
    flag = f"--import={folder}/mine.py"
    status, errors = call(generate, flag, f"--workdir={run}", "--prompt=line", "--max_new_tokens=5", "--temperature=0")
    assert status == 0 and "note" not in errors
    status, errors = call(evaluate, flag, f"--workdir={run}")
    assert status == 0 and "note" not in errors  # of a slow machine its progress is there
    capsys.readouterr()
    assert call(describe, *arguments(folder, "--json", "--devices=8")) == (0, "")
    counts = json.loads(capsys.readouterr().out)["parameters"]
    assert counts["router"] == 2 * 3 * (32 + 1)
    _, params = spiral_jax.load(run)
    assert params["steps_1"]["mix"]["kernel"].shape == (32, 3)
    assert np.abs(params["steps_1"]["mix"]["kernel"]).max() > 0


def test_a_run_directory_alone_runs_no_code(folder, run, monkeypatch):
    """The file is named, and not executed."""
    monkeypatch.delitem(topologies._entries, "blend")
    for verb, *more in (
        (generate, "--prompt=a"),
        (evaluate,),
        (export, f"--output={folder}/out"),
    ):
        status, errors = call(verb, f"--workdir={run}", *more)
        assert status == 2 and errors.count("\n") == 1
        assert "model.topology is 'blend'" in errors and f"--import={folder}/mine.py" in errors


def test_another_file_is_said_in_one_line_at_resume(folder, run, tmp_path, capsys):
    workdir, mine = tmp_path / "run", folder / "mine.py"
    shutil.copytree(run, workdir)
    before = mine.read_text()
    try:
        assert call(train, *arguments(folder, f"--workdir={workdir}")) == (0, "")
        assert "note:" not in capsys.readouterr().out
        mine.write_text(before + "# a remark\n")
        assert call(train, *arguments(folder, f"--workdir={workdir}")) == (0, "")
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note:")]
        assert len(lines) == 1 and "model.topology 'blend' is not what the run was last started with" in lines[0]
    finally:
        mine.write_text(before)


def test_export_says_that_pytorch_has_no_code_for_it(folder, run):
    status, errors = call(export, f"--import={folder}/mine.py", f"--workdir={run}", f"--output={folder}/out")
    assert status == 2 and errors.count("\n") == 1
    assert "model.topology is 'blend'" in errors and "PyTorch has no code" in errors
    assert not (folder / "out").exists()


@pytest.mark.slow
def test_poolings_allocations_optimizers_and_schedules(folder, capsys):
    """On a mesh, to the end; what each is for shows in the run."""
    assert call(train, f"--config={folder}/own.py", f"--workdir={folder}/own") == (0, "")
    rates = [row["learning_rate"] for row in read_rows(folder / "own/metrics.jsonl")]
    np.testing.assert_allclose(rates, [1e-3, 1e-3 / 2**0.5, 1e-3 / 3**0.5], rtol=1e-5)
    saved = json.loads((folder / "own" / own_code.FILE).read_text())
    assert set(saved) == {"model.pooling", "model.allocation", "optimizer.name", "optimizer.schedule"}
    status, errors = call(train, f"--config={folder}/own.py", f"--workdir={folder}/own", "--config.train.steps=5")
    assert status == 2 and "the own_square_root schedule depends on it from the first step" in errors


def test_small_inputs_are_not_cut(folder, tmp_path):
    """A Linear of three inputs on a mesh that cuts the others in two: on every device."""
    model = dataclasses.replace(ModelConfig(vocab_size=64, d_model=32, num_heads=4), topology="base")
    assert Linear(3, 1).axes(32) == (None, "features")
    assert Linear((4, 32), 8, ("heads", "embed")).axes(32) == ("heads", "embed", "features")
    check_divisible((1, 8, 1), model, 8, 1)


def test_a_package_behind_a_link_is_still_the_package(tmp_path):
    (tmp_path / "linked").symlink_to(ROOT / "spiral_jax", target_is_directory=True)
    (tmp_path / "linked").rename(tmp_path / "spiral_jax")
    code = (
        "from spiral_jax.run import own_code; from spiral_jax.run.config import RunConfig; "
        "print(own_code.own_code(RunConfig().to_dict()))"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    found = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert found.stdout.strip() == "{}", found.stderr


def test_a_file_may_run_again_and_change(tmp_path):
    """As experiment files do in one process; the last one counts."""
    file = tmp_path / "changing.py"
    for body in ("e_BxLxD", "e_BxLxD + states.h_BxLxD"):
        file.write_text(
            "from spiral_jax.model.topology import Topology, topologies\n"
            '@topologies.register("changing")\nclass Changing(Topology):\n'
            f"    def next_state(self, states, e_BxLxD, linears):\n        return {body}\n"
        )
        for _ in range(2):
            own_code.import_files([str(file)])
    try:
        assert topologies["changing"].next_state(None, *_states(1.0), None) == 3.0
    finally:
        topologies._entries.pop("changing")


def _states(value):
    from spiral_jax.model.topology import States

    return States(2.0, 0.0, 0.0), value
