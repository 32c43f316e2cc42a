"""What `check` finds in operators that are wrong, and that it finds nothing in those that are right."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from cases import slow
from verbs import call

from spiral_jax import check
from spiral_jax.evaluation import invariants
from spiral_jax.model.config import ModelConfig
from spiral_jax.model.operators import Linear
from spiral_jax.model.pooling import Mean, Pooling, poolings
from spiral_jax.model.spreading import Learned, spreadings
from spiral_jax.model.topology import Topology, Update, topologies
from spiral_jax.run.config import RunConfig
from spiral_jax.training.config import OptimizerConfig

MODEL = invariants.small(ModelConfig(chunks=(3, 2, 1), topology="residual", pooling="mean", allocation="uniform"))


@topologies.register("leaks_the_next_token")
class Leaks(Topology):
    """By a hundredth of it."""

    def next_state(self, states, e_BxLxD, linears):
        return e_BxLxD + states.h_BxLxD + 1e-2 * jnp.roll(states.h_BxLxD, -1, axis=1)


@topologies.register("leaks_from_far")
class LeaksFromFar(Topology):
    """From the last token, whatever the length."""

    def next_state(self, states, e_BxLxD, linears):
        return e_BxLxD + 0.1 * states.h_BxLxD[:, -1:]


@topologies.register("mixes_rows")
class MixesRows(Topology):
    def next_state(self, states, e_BxLxD, linears):
        return e_BxLxD + states.h_BxLxD.mean(axis=0)


@topologies.register("depends_on_the_length")
class DependsOnTheLength(Topology):
    def next_state(self, states, e_BxLxD, linears):
        return e_BxLxD + states.h_BxLxD / states.h_BxLxD.shape[1]


@topologies.register("counts_zeros")
class CountsZeros(Topology):
    """The mean of all updates: in a scan those to come are there as zeros."""

    def update(self, states, e_BxLxD, linears):
        every = (*states.kept, e_BxLxD)
        return Update(states.h_BxLxD + sum(every) / len(every), kept=(e_BxLxD,))


@topologies.register("written_out")
class WrittenOut(CountsZeros):
    scans = False


@topologies.register("sums")
class Sums(Topology):
    """Zeros do no harm."""

    def linears(self, level):
        return {"weight": Linear(self.config.d_model, 1)}

    def update(self, states, e_BxLxD, linears):
        new = linears["weight"](e_BxLxD) * e_BxLxD
        return Update(states.h_BxLxD + sum((*states.kept, new)), kept=(new,))


@poolings.register("running_mean")
class RunningMean(Mean):
    """The mean with a one-token pass of its own."""

    def open(self, level, batch):
        return jnp.zeros((batch, self.config.d_model))

    def add(self, chunk, place_B, h_BxD, level, linears):
        return chunk + h_BxD / level.chunk

    def close(self, chunk, is_token_BxG, level, linears):
        return chunk


@poolings.register("wrong_one_token_pass")
class WrongOneTokenPass(RunningMean):
    """Divides by the members there are, where `pool` divides by the chunk size: it differs in a short first chunk."""

    def close(self, chunk, is_token_BxG, level, linears):
        return chunk * level.chunk / is_token_BxG.sum(-1, keepdims=True)


@poolings.register("reads_other_chunks")
class ReadsOtherChunks(Pooling):
    def pool(self, h_BxNxGxD, is_token_NxG, level, linears):
        return h_BxNxGxD.mean(2) + 0.1 * h_BxNxGxD.mean((1, 2))[:, None]


@spreadings.register("backwards")
class Backwards(Learned):
    """Right in a full pass only: what it gives depends on how many chunks there are."""

    def shares(self, zhat_BxNxD, level, linears):
        return super().shares(zhat_BxNxD, level, linears) * zhat_BxNxD.shape[1]


def found(check, **fields) -> invariants.Finding:
    return check(dataclasses.replace(MODEL, **fields))


@pytest.mark.parametrize(
    "check, fields, where",
    [
        (invariants.causality, dict(topology="leaks_the_next_token"), r"token \d+ changes with token"),
        slow(invariants.causality, dict(topology="leaks_from_far"), "token"),
        slow(invariants.causality, dict(pooling="reads_other_chunks"), "token"),
        slow(invariants.lengths, dict(topology="depends_on_the_length"), "at length 1"),
        slow(invariants.lengths, dict(allocation="backwards"), "at length"),
        (invariants.rows, dict(topology="mixes_rows"), "the (first|last) row"),
        slow(invariants.scanned, dict(topology="counts_zeros"), ""),
        slow(invariants.decoded, dict(pooling="wrong_one_token_pass"), "tokens read at once and"),
        slow(invariants.decoded, dict(topology="leaks_from_far"), "tokens read at once and"),
    ],
)
def test_what_is_wrong_is_found(check, fields, where):
    finding = found(check, **fields)
    assert not finding.ok and finding.difference > 3 * invariants.TOLERANCE
    assert re.search(where, finding.where)


@pytest.mark.parametrize(
    "check, fields",
    [
        slow(invariants.causality, dict(topology="sums")),
        slow(invariants.lengths, dict(pooling="running_mean")),
        slow(invariants.rows, dict(topology="injection")),
        slow(invariants.scanned, dict(topology="sums")),
        (invariants.scanned, dict(topology="written_out")),
        slow(invariants.decoded, dict(pooling="running_mean", topology="sums")),
        slow(invariants.decoded, dict(topology="mesh", shared_core=False)),
        slow(invariants.decoded, dict(chunks=(), core_layers=0)),
    ],
)
def test_nothing_is_found_in_what_is_right(check, fields):
    finding = found(check, **fields)
    assert finding.ok, finding
    assert (finding.difference is None) == (fields.get("topology") == "written_out")


def test_no_number_is_no_agreement():
    assert not invariants.Finding("x", "y", invariants.difference(jnp.nan * jnp.ones(2), jnp.ones(2))).ok


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_sharded_steps_agree(name):
    model = dataclasses.replace(MODEL, chunks=(2,), topology="gated")
    finding = invariants.sharded(RunConfig(model=model, optimizer=OptimizerConfig(name=name)))
    assert finding.ok, finding


def test_weights_are_nowhere_at_their_start():
    model = dataclasses.replace(MODEL, topology="injection", pooling="self_aggregation", allocation="learned")
    for path, x in jax.tree_util.tree_leaves_with_path(invariants.random_params(model)):
        assert (x != 0).all() and (x.size < 2 or x.std() > 0), path


CONFIG = """
from spiral_jax.run.config import RunConfig, default_config

def get_config(argument=""):
    config = default_config()
    config.model.chunks = (2, 1)
    config.model.topology = argument
    return config
"""


def test_the_command(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.py").write_text(CONFIG, encoding="utf-8")
    findings = [invariants.Finding("causality", "all", 0.0), invariants.Finding("scanned", "nothing", None)]
    monkeypatch.setattr(invariants, "check", lambda config: iter(findings))
    assert call(check, f"--config={tmp_path}/config.py:gated") == (0, "")
    out = capsys.readouterr().out
    assert "ok      causality  all: differ by 0.0e+00" in out and "model.topology     gated\n" in out
    findings.append(invariants.Finding("rows", "two", 0.5, "in row 1"))
    status, errors = call(check, f"--config={tmp_path}/config.py:leaks_the_next_token")
    assert status == 2 and errors.count("\n") == 1
    assert "model.topology 'leaks_the_next_token'" in errors and "rows (in row 1)" in errors
    assert "FAILED  rows       two" in capsys.readouterr().out


@pytest.mark.slow
def test_the_example_in_full():
    """As the page has it."""
    assert call(check, f"--config={Path(__file__).parents[2]}/experiments/own_topology.py") == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("topology, status", [("injection", 0), ("leaks_the_next_token", 2)])
def test_the_command_in_full(tmp_path, topology, status):
    (tmp_path / "config.py").write_text(CONFIG, encoding="utf-8")
    found, errors = call(check, f"--config={tmp_path}/config.py:{topology}")
    assert found == status, json.dumps(errors)
