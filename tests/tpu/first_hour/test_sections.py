"""Sections of the first hour, as a rehearsal on CPU: what is right passes, what is wrong does not."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spiral_jax.decoding import cached
from spiral_jax.run.checkpoint import Checkpoints
from tpu.first_hour import checkpoint, decoding, device, points, speed, training
from tpu.first_hour.findings import Findings, relative_error, worst_element


@pytest.fixture
def findings():
    return Findings(lambda line: None)


def failed(findings):
    return [check["what"] for check in findings.checks if not check["ok"]]


def test_a_number_that_is_none_is_not_ok(findings):
    findings.at_most("a", float("nan"), 1)
    findings.at_most("b", float("inf"), 1)
    findings.at_most("c", 1, 1)
    assert failed(findings) == ["a", "b"] and findings.checks[0]["found"] is None
    json.dumps(findings.checks, allow_nan=False)


def test_a_case_that_raises_is_a_failed_check_and_the_next_goes_on(findings):
    with findings.case("one"):
        raise RuntimeError("no\nroom")
    with findings.case("two"):
        findings.at_most("two", 0, 1)
    assert failed(findings) == ["one"] and findings.checks[0]["why"] == "RuntimeError: no room"


def test_errors_are_relative():
    truth = np.array([[3.0, 4.0], [0.3, 0.4]])
    assert relative_error(truth * 1.01, truth) == pytest.approx(0.01)
    wrong = truth.copy()
    wrong[1, 0] += 0.5
    assert worst_element(wrong, truth) == pytest.approx(0.5 / (np.sqrt(0.125) + np.sqrt(25.25 / 4)))


def test_device(findings):
    device.run(findings, "tiny", "", "")
    assert not failed(findings)
    assert findings.measured["platform"] == "cpu" and findings.measured["generation"] is None
    assert findings.measured["versions"]["jax"] == jax.__version__
    json.dumps(findings.measured)


@pytest.fixture(scope="module")
def run_of():
    """(family, dtype) to the steps of its small model on the CPU."""
    made = {}

    def get(family, dtype):
        if (family, dtype) not in made:
            made[family, dtype] = training.steps(training.step_config(family, dtype, "tiny"), jax.devices()[0])
        return made[family, dtype]

    return get


def compared(family, dtype, ours, reference):
    found = Findings(lambda line: None)
    found.measured[f"{family} {dtype}"] = {}
    training.compare(found, family, dtype, ours, reference)
    return failed(found)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", training.ALLOWED)
def test_the_same_steps_pass(run_of, dtype):
    one = run_of("spiral_b", dtype)
    assert compared("spiral_b", dtype, one, one) == []
    assert one.losses[-1] < one.losses[0]


@pytest.mark.slow
def test_bfloat16_is_not_taken_for_float32(run_of):
    """Nor is the noise of bfloat16 more than is allowed for it."""
    rough, exact = run_of("spiral_b", "bfloat16"), run_of("spiral_b", "float32")
    assert "spiral_b float32: gradient" in compared("spiral_b", "float32", rough, exact)
    assert compared("spiral_b", "bfloat16", rough, exact) == []


@pytest.mark.slow
@pytest.mark.parametrize("dtype", training.ALLOWED)
def test_another_optimizer_seed_or_model_fails(run_of, dtype):
    right = run_of("spiral_b", dtype)
    half = jax.tree.map(lambda a, b: a + 0.5 * (b - a), right.start, right.end)
    assert compared("spiral_b", dtype, right._replace(end=right.start), right)
    assert compared("spiral_b", dtype, right._replace(end=half), right)
    other = jax.tree.map(lambda x: x[::-1], right.gradient)
    assert compared("spiral_b", dtype, right._replace(gradient=other), right)
    assert compared("spiral_b", dtype, right._replace(losses=[x * 1.01 for x in right.losses]), right)
    assert compared("spiral_b", dtype, right._replace(norms=[x * 1.1 for x in right.norms]), right)
    started = jax.tree.map(lambda x: x + np.float32(1e-4), right.start)
    assert compared("spiral_b", dtype, right._replace(start=started), right)


@pytest.mark.slow
def test_a_wrong_shift_fails(run_of):
    """The right shift of a Spiral is what is most easily lost: here it is one token more."""
    config = training.step_config("spiral_b", "float32", "tiny")
    wrong = dataclasses.replace(config, model=dataclasses.replace(config.model, shifts=(2, 0)))
    assert compared("spiral_b", "float32", training.steps(wrong, jax.devices()[0]), run_of("spiral_b", "float32"))


@pytest.mark.slow
def test_a_checkpoint_comes_back(findings, tmp_path):
    checkpoint.run(findings, "tiny", str(tmp_path), "")
    assert not failed(findings) and not list(tmp_path.iterdir())
    assert findings.measured["bytes"] > 1e5 and findings.measured["save_mb_per_second"] > 0


def test_one_bit_is_seen(findings, tmp_path, monkeypatch):
    restore = Checkpoints.restore

    def flipped(self, step, abstract_state):
        state = restore(self, step, abstract_state)
        leaves, structure = jax.tree.flatten(state)
        largest = max(range(len(leaves)), key=lambda i: leaves[i].size)
        leaves[largest] = leaves[largest].at[-1, -1].multiply(1 + 2**-23)
        return jax.tree.unflatten(structure, leaves)

    monkeypatch.setattr(Checkpoints, "restore", flipped)
    checkpoint.run(findings, "tiny", str(tmp_path), "")
    assert failed(findings) == ["arrays that came back otherwise"]


@pytest.mark.slow
def test_a_checkpoint_on_a_bucket_comes_back(findings, bucket_url, storage, monkeypatch):
    """By the emulator."""
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", storage)
    checkpoint.run(findings, "tiny", f"{bucket_url}/first_hour", "")
    assert not failed(findings) and findings.measured["kind"] == "bucket"


def test_a_checkpoint_that_cannot_be_written_leaves_nothing(findings, tmp_path, monkeypatch):
    def refuse(self, *args):
        raise OSError("the disk is full")

    monkeypatch.setattr(Checkpoints, "save", refuse)
    with pytest.raises(OSError, match="full"):
        checkpoint.run(findings, "tiny", str(tmp_path), "")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_cached_logits_are_those_of_the_full_pass(monkeypatch):
    found, truth = decoding.logits(training.step_config("spiral_b", "float32", "tiny"))
    assert found.shape == truth.shape == (decoding.ROWS, decoding.NEW, 512)
    allowed, worst = decoding.ALLOWED["float32"]
    assert relative_error(found, truth) < allowed and worst_element(found, truth) < worst

    step = cached.step

    def late(model, params, token_B, state, active_B=None):
        """Reads every token one place further on than it is."""
        return step(model, params, token_B, state._replace(position_B=state.position_B + 1), active_B)

    monkeypatch.setattr(cached, "step", late)
    wrong, _ = decoding.logits(training.step_config("spiral_b", "float32", "tiny"))
    for dtype, (allowed, worst) in decoding.ALLOWED.items():
        assert not (relative_error(wrong, truth) <= allowed and worst_element(wrong, truth) <= worst), dtype


@pytest.mark.slow
def test_decoding(findings):
    decoding.run(findings, "tiny", "", "")
    assert not failed(findings) and len(findings.checks) == 4
    assert all(rate > 0 for point in findings.measured.values() for rate in point.values())


@pytest.mark.slow
def test_training(findings):
    training.run(findings, "tiny", "", "")
    assert not failed(findings) and len(findings.checks) == 2 * (1 + 2 * training.STEPS + 2)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", training.ALLOWED)
def test_the_kernel_in_a_model_is_far_within_what_is_allowed(dtype, monkeypatch):
    """What the tolerances rest on: splash, interpreted, against plain attention."""
    from spiral_jax.kernels import choose, splash

    config = training.step_config("spiral_b", dtype, "tiny")
    reference = training.steps(training.on_cpu(config), jax.devices()[0])
    monkeypatch.setattr(choose, "kernels_of", lambda *_: ("splash", "xla"))
    # Not in TPU interpret mode, which does not take a batch of several rows (jax 0.10.2).
    interpreted = functools.partial(splash.causal_attention, interpret=True)
    monkeypatch.setattr(splash, "causal_attention", interpreted)
    ours = training.steps(config, jax.devices()[0])
    monkeypatch.setattr(training, "ALLOWED", {dtype: training.Allowed(*(x / 4 for x in training.ALLOWED[dtype]))})
    assert compared("spiral_b", dtype, ours, reference) == []
    assert ours.losses != reference.losses, "the kernel was not used"


@pytest.mark.slow
@pytest.mark.parametrize("point", points.POINTS)
def test_a_point(findings, point):
    points.run(findings, "tiny", "", point)
    assert not failed(findings)
    measured = findings.measured
    assert measured["is_rehearsal"] and len(measured["seconds"]) == points.WARM + points.TIMED
    assert min(measured["seconds"]) <= measured["step_seconds"] <= max(measured["seconds"])
    full = points.step_config(point, "full")
    assert full.train.sequence_length == 4096 and full.train.batch_size == points.POINTS[point].sequences


def test_speed(findings, monkeypatch):
    monkeypatch.setattr(speed, "kernel", lambda *_: (1.0, None))  # interpreted, it takes a while
    speed.run(findings, "tiny", "", "")
    assert not failed(findings)
    assert findings.measured["mxu_efficiency"]["per_second"] > 1e8
    assert findings.measured["hbm_efficiency"]["constant"] is None
    assert jnp.isfinite(findings.measured["hbm_efficiency"]["per_second"])
