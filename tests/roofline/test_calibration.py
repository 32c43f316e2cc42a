"""The four measured runs: their sizes, their work as it was counted and written down, the constants fitted to them."""

import dataclasses
from pathlib import Path

import pytest

from spiral_jax.hardware import parse_slice
from spiral_jax.roofline.predict import FITTED, Cost, total
from tpu import calibration
from tpu.calibration import Count, compact, fit, leave_one_out, load, measured_runs, predict_run, save
from tpu.single_chip import SharedKeys

RUNS = {run.name: run for run in measured_runs()}
COUNTS = load(Path(__file__).parents[2] / "tpu" / "calibration.json")
SECONDS = [RUNS[name].seconds for name in COUNTS]


def test_sizes_are_those_published():
    found = {name: (run.model.num_params, parse_slice(run.topology).chips) for name, run in RUNS.items()}
    assert found == {
        "130m": (154_153_472, 4),
        "300m": (299_668_224, 4),
        "520m": (602_506_240, 8),
        "1_2b": (1_431_439_360, 16),
    }


@pytest.mark.parametrize("name", RUNS)
def test_the_constants_reproduce_the_run(name):
    predicted = predict_run(COUNTS[name])
    assert abs(predicted / RUNS[name].seconds - 1) < 0.15


def test_the_constants_are_what_fits():
    assert fit(list(COUNTS.values()), SECONDS) == FITTED


def test_a_run_is_predicted_by_the_others():
    assert leave_one_out(list(COUNTS.values()), SECONDS) == pytest.approx([1] * 4, abs=0.1)


@pytest.mark.parametrize("efficiency", [0.3, 0.5, 0.8])
def test_the_runs_leave_memory_open(efficiency):
    start = dataclasses.replace(FITTED, hbm_efficiency=efficiency)
    found = fit(list(COUNTS.values()), SECONDS, start=start)
    assert 0.4 < found.attention_efficiency < 0.7
    for counted, seconds in zip(COUNTS.values(), SECONDS, strict=True):
        assert predict_run(counted, found) == pytest.approx(seconds, rel=0.08)


@pytest.mark.parametrize(("d_model", "tokens_per_second"), [(512, 0.24e6), (8192, 39e3)])
def test_the_loss_is_as_fast_as_its_authors_measured(d_model, tokens_per_second):
    """On one v5p chip: four products of a token's vector and the head, and the logits."""
    products = 4 * 2 * d_model * 128_256 / 459e12 / FITTED.mxu_efficiency
    assert 1 / (products + 128_256 * calibration.LOSS_SECONDS) == pytest.approx(tokens_per_second, rel=0.03)


@pytest.mark.parametrize("name", RUNS)
def test_the_counted_products_are_those_of_full_rematerialization(name):
    """Forward twice and backward, which is two forwards: 8 FLOP for every parameter in a matrix and token."""
    run = RUNS[name]
    model, tokens = run.model, run.sequences * run.model.length // parse_slice(run.topology).chips
    kv_width = model.kv_heads * model.d_model // model.heads
    layer = 2 * model.d_model**2 + 2 * model.d_model * kv_width + 3 * model.d_model * model.d_mlp
    flops = 8 * tokens * (model.layers * layer + model.d_model * model.vocab)
    assert COUNTS[name].dense_flops == pytest.approx(flops, rel=1e-3)
    # Per layer: forward, forward again, the queries' gradients, the keys' and values'.
    assert COUNTS[name].kernels == 4 * model.layers


@pytest.mark.parametrize("name", RUNS)
def test_the_counted_traffic_holds_the_logits(name):
    """Float32 logits of every token are written and read, forward and backward; layers come on top."""
    run = RUNS[name]
    tokens = run.sequences * run.model.length // parse_slice(run.topology).chips
    assert COUNTS[name].hbm_bytes > tokens * run.model.vocab * 4 * 4


def test_fitting_finds_the_constants_behind_times():
    truth = dataclasses.replace(FITTED, mxu_efficiency=0.7, attention_efficiency=0.55)
    counts = list(COUNTS.values())
    seconds = [predict_run(counted, truth) for counted in counts]
    found = fit(counts, seconds, ("mxu_efficiency", "attention_efficiency"))
    assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(truth), abs=0.005)


def test_compact_costs_have_the_same_total():
    costs = [
        Cost(3, 1, 2, 1),
        Cost(2, 1, 0, 9),
        Cost(5, 0, 0, 2, 3, 1),
        Cost(7, 0, 0, 1),
        Cost(1, 0, 4, 0),
        Cost(2, 1, 0, 1),
    ]
    fewer = compact(costs)
    assert len(fewer) < len(costs)
    for mxu, hbm in ((0.3, 1.0), (0.9, 0.3), (1.0, 1.0)):
        constants = dataclasses.replace(FITTED, mxu_efficiency=mxu, hbm_efficiency=hbm, hidden_share=0.1)
        full, short = total(costs, constants), total(fewer, constants)
        assert short.step_seconds == pytest.approx(full.step_seconds)
        assert short.limits == pytest.approx(full.limits)


def test_saved_counts_come_back(tmp_path):
    pytest.importorskip("libtpu")  # its version is written
    counts = {"a": Count((Cost(1, 0.5, 0, 0.25),), 9, 7, 3.0, 2.0, 4)}
    save(counts, tmp_path / "counts.json")
    assert load(tmp_path / "counts.json") == counts


@pytest.mark.slow
def test_compiling_the_smallest_again_counts_the_same(libtpu):
    counted, written = calibration.count(RUNS["130m"], calibration.compile_run(RUNS["130m"])), COUNTS["130m"]
    assert counted[1:] == pytest.approx(written[1:], rel=0.02)
    assert predict_run(counted) == pytest.approx(predict_run(written), rel=0.02)


def test_the_model_of_the_single_chips_has_the_size_published():
    assert SharedKeys().num_params == pytest.approx(163.6e6, rel=1e-3)
    assert SharedKeys().num_params - SharedKeys().vocab * SharedKeys().d_model == pytest.approx(130.0e6, rel=1e-3)
