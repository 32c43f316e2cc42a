"""docs/topologies.md: its code runs, its commands work, and its example is the one that we ship."""

import dataclasses
import re
import shlex
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from verbs import call

from spiral_jax import check, describe, evaluate, generate, train
from spiral_jax.evaluation import invariants
from spiral_jax.model.config import ModelConfig
from spiral_jax.model.declarations import check_operators
from spiral_jax.model.pooling import poolings
from spiral_jax.model.spreading import spreadings
from spiral_jax.model.topology import topologies
from spiral_jax.run import own_code
from spiral_jax.training.config import OptimizerConfig
from spiral_jax.training.optimizers import make_optimizer, optimizers
from spiral_jax.training.schedules import learning_rate, schedules

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "topologies.md").read_text(encoding="utf-8")
REGISTRIES = (topologies, poolings, spreadings, optimizers, schedules)
MODEL = ModelConfig(d_model=32, num_heads=4, core_layers=1, chunks=(3, 2, 1), topology="residual", dtype="float32")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.M | re.S)


@pytest.fixture(scope="module")
def registered(tmp_path_factory):
    """What the page's code registers: (registry, name)."""
    before = {registry.field: set(registry) for registry in REGISTRIES}
    folder = tmp_path_factory.mktemp("page")
    for number, code in enumerate(blocks("python")[1:]):
        file = folder / f"block_{number}.py"
        file.write_text(code, encoding="utf-8")
        own_code.import_files([str(file)])
    added = [(registry, name) for registry in REGISTRIES for name in registry if name not in before[registry.field]]
    yield added
    for registry, name in added:
        registry._entries.pop(name)


def test_the_example_is_the_one_we_ship():
    shipped = (ROOT / "experiments" / "own_topology.py").read_text(encoding="utf-8")
    first = blocks("python")[0]
    assert first[first.index("@topologies") :] in shipped
    assert first.count("\n") < 30


def test_every_block_registers_what_the_text_says(registered):
    names = {name for _, name in registered}
    assert names == {"average", "scaled", "reminded", "mean_of_updates", "last", "gated_mean", "by_place", "weighed",
                     "lion", "inverse_square_root"}  # fmt: skip


@pytest.mark.slow
def test_operators_fit_and_are_causal_and_decode(registered):
    """Those of the page in three models."""
    assert len(registered) == 10
    for fields in (
        dict(topology="average", pooling="last", allocation="by_place"),
        dict(topology="reminded", pooling="gated_mean"),
        dict(topology="mean_of_updates"),
        dict(topology="scaled"),
        dict(topology="weighed"),
    ):
        model = dataclasses.replace(MODEL, **fields)
        check_operators(model)
        for invariant in (invariants.causality, invariants.decoded):
            finding = invariant(invariants.small(model))
            assert finding.ok, (fields, finding)


def test_optimizer_and_schedule(registered):
    config = OptimizerConfig(name="lion", schedule="inverse_square_root", warmup_steps=4, peak_learning_rate=0.1)
    rates = [float(learning_rate(config, 100)(k)) for k in range(16)]
    np.testing.assert_allclose(rates, [0.1 * min((k + 1) / 4, (4 / (k + 1)) ** 0.5) for k in range(16)], rtol=1e-5)
    assert config.stable_until(100) == 100
    params = {
        "core": {"layers": {"out": {"kernel": np.ones((2, 3, 4), np.float32), "bias": np.ones((2, 4), np.float32)}}}
    }
    optimizer = make_optimizer(dataclasses.replace(config, weight_decay=0.5), 100, MODEL)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    np.testing.assert_allclose(updates["core"]["layers"]["out"]["kernel"], -0.025 * 1.5, rtol=1e-5)
    np.testing.assert_allclose(updates["core"]["layers"]["out"]["bias"], -0.025, rtol=1e-5)


@pytest.mark.slow
def test_the_commands(tmp_path, monkeypatch, capsys):
    """In the order of the page, on a small text and for few steps."""
    (tmp_path / "experiments").mkdir()
    shutil.copy(ROOT / "experiments" / "own_topology.py", tmp_path / "experiments")
    (tmp_path / "text.txt").write_text("".join(f"line {i} of a text\n" for i in range(400)), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(invariants, "check", lambda config: iter([]))
    small = ["--config.model.d_model=32", "--config.model.core_layers=1", "--config.model.chunks=(2,1)",
             "--config.train.steps=2", "--config.train.sequence_length=16", "--config.data.paths=text.txt"]  # fmt: skip
    verbs = {"check": check, "train": train, "generate": generate, "evaluate": evaluate, "describe": describe}
    seen = []
    for line in blocks("sh")[0].splitlines():
        python, _, module, *arguments = shlex.split(line)
        verb = module.removeprefix("spiral_jax.")
        more = small if any(a.startswith("--config=") for a in arguments) else []
        more = [*more, "--max_new_tokens=4"] if verb == "generate" else more
        status, errors = call(verbs[verb], *arguments, *more)
        assert (python, status) == ("python", 0), (line, errors)
        seen.append(verb)
    assert seen == list(verbs)
    assert "topology blend" in capsys.readouterr().out
    assert len(jax.devices()) == 8
