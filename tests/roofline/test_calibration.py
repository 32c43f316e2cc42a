"""The six measured runs: their sizes, their work as it was counted and written down, the constants that follow."""

import dataclasses
from pathlib import Path

import pytest

from spiral_jax.hardware import parse_slice
from spiral_jax.roofline.predict import FITTED, Cost
from tpu import calibration
from tpu.calibration import (
    HALF,
    Count,
    constants_for,
    fit,
    generation_of,
    leave_one_out,
    load,
    measured_runs,
    predict_run,
    save,
)
from tpu.llama import Llama
from tpu.single_chip import SharedKeys

RUNS = {run.name: run for run in measured_runs()}
LEVANTER = [name for name, run in RUNS.items() if isinstance(run.model, Llama)]
COUNTS = load(Path(__file__).parents[2] / "tpu" / "calibration.json")
BOTH = list(RUNS.values()), [COUNTS[name] for name in RUNS]


def test_sizes_are_those_published():
    found = {name: (RUNS[name].model.num_params, parse_slice(RUNS[name].topology).chips) for name in LEVANTER}
    assert found == {
        "130m": (154_153_472, 4),
        "300m": (299_668_224, 4),
        "520m": (602_506_240, 8),
        "1_2b": (1_431_439_360, 16),
    }


@pytest.mark.parametrize("name", RUNS)
def test_the_constants_reproduce_the_run(name):
    assert predict_run(RUNS[name], COUNTS[name]) == pytest.approx(RUNS[name].seconds, rel=0.1)


def test_the_constants_are_what_fits():
    """One number for all generations, of which half is enough where the vector unit takes bfloat16."""
    found = fit(*BOTH)
    assert {name: of.score_operations * (2 if name in HALF else 1) for name, of in FITTED.items()} == (
        dict.fromkeys(FITTED, pytest.approx(found))
    )


def test_a_run_is_predicted_by_the_others():
    assert leave_one_out(*BOTH) == pytest.approx([1] * 6, abs=0.1)


@pytest.mark.parametrize("efficiency, fits", [(0.5, False), (0.7, True), (0.9, True)])
def test_what_the_runs_say_of_memory(efficiency, fits):
    operations = fit(*BOTH, hbm_efficiency=efficiency)
    found = []
    for run, counted in zip(*BOTH, strict=True):
        constants = dataclasses.replace(constants_for(generation_of(run), operations), hbm_efficiency=efficiency)
        found.append(abs(predict_run(run, counted, constants) / run.seconds - 1))
    assert (max(found) < 0.1) == fits


@pytest.mark.parametrize("name, utilization", [("tpuchat_v5e", 0.806), ("tpuchat_v6e", 0.514)])
def test_the_matrix_units_are_as_busy_as_the_profiler_said(name, utilization):
    """What was counted at the peak over what was measured: no constant takes part."""
    busy = sum(cost.times * (cost.matmul + cost.attention) for cost in COUNTS[name].costs)
    assert busy / RUNS[name].seconds == pytest.approx(utilization, rel=0.02)


@pytest.mark.parametrize(("d_model", "tokens_per_second"), [(512, 0.24e6), (8192, 39e3)])
def test_the_loss_is_as_fast_as_its_authors_measured(d_model, tokens_per_second):
    """On one v5p chip: four products of a token's vector and the head, and the logits."""
    products = 4 * 2 * d_model * 128_256 / 459e12 / FITTED["v5p"].mxu_efficiency
    assert 1 / (products + 128_256 * calibration.LOSS_SECONDS) == pytest.approx(tokens_per_second, rel=0.03)


@pytest.mark.parametrize("name", LEVANTER)
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


@pytest.mark.parametrize("name", LEVANTER)
def test_the_counted_traffic_holds_the_logits(name):
    """Float32 logits of every token are written and read, forward and backward; layers come on top."""
    run = RUNS[name]
    tokens = run.sequences * run.model.length // parse_slice(run.topology).chips
    assert COUNTS[name].hbm_bytes > tokens * run.model.vocab * 4 * 4


def test_fitting_finds_the_constant_behind_times():
    truth = {generation: constants_for(generation, 17.0) for generation in FITTED}
    runs = [
        run._replace(seconds=predict_run(run, COUNTS[name], truth[generation_of(run)])) for name, run in RUNS.items()
    ]
    assert fit(runs, BOTH[1]) == pytest.approx(17.0)


@pytest.mark.parametrize("name", ["tpuchat_v5e", "tpuchat_v6e"])
def test_the_counted_products_of_a_single_chip_are_those_of_its_model(name):
    """Nothing is computed again but the head: 6 FLOP for every parameter in a matrix and token, 8 for the head's."""
    model, counted = RUNS[name].model, COUNTS[name]
    head = model.vocab * model.d_model
    tokens = RUNS[name].sequences * model.length
    flops = tokens * (6 * (model.num_params - 2 * head) + 8 * head)
    assert counted.dense_flops == pytest.approx(flops, rel=1e-3)
    assert counted.kernels == 16 * 3 * model.layers


def test_saved_counts_come_back(tmp_path):
    pytest.importorskip("libtpu")  # its version is written
    counts = {"a": Count((Cost(1, 0.5, 0, 0.25),), 9, 7, 3.0, 2.0, 4)}
    save(counts, tmp_path / "counts.json")
    assert load(tmp_path / "counts.json") == counts


@pytest.mark.slow
def test_compiling_the_smallest_again_counts_the_same(libtpu):
    counted, written = calibration.count(RUNS["130m"], calibration.compile_run(RUNS["130m"])), COUNTS["130m"]
    assert counted[1:] == pytest.approx(written[1:], rel=0.02)
    assert predict_run(RUNS["130m"], counted) == pytest.approx(predict_run(RUNS["130m"], written), rel=0.02)


def test_the_model_of_the_single_chips_has_the_size_published():
    assert SharedKeys().num_params == pytest.approx(163.6e6, rel=1e-3)
    assert SharedKeys().num_params - SharedKeys().vocab * SharedKeys().d_model == pytest.approx(130.0e6, rel=1e-3)
