"""The points of tpu/predictions: that they fit, do the work they should, and send what they should."""

import json
from pathlib import Path

import pytest

from tpu.table import tables

POINTS = {path.stem: json.loads(path.read_text()) for path in Path(__file__).parents[2].glob("tpu/predictions/*.json")}


def test_all_points_are_there():
    families = ("vanilla", "mesh", "spiral_b", "spiral_l")
    groups = ("160m-v5e-4x4", "1.4b-v5p-4x4x4", "1.4b-v6e-8x8")
    assert POINTS.keys() == {f"{group}-{family}" for group in groups for family in families}


@pytest.mark.parametrize("name", POINTS)
def test_a_point(name):
    point = POINTS[name]
    assert point["memory"]["peak_bytes"] <= point["memory"]["usable_bytes"]
    assert point["memory"]["simulated_peak_bytes"] == pytest.approx(point["memory"]["peak_bytes"], rel=0.03)
    assert point["scores_and_logits_in_memory"] == []
    limit = {"keep_all": 1.01, "keep_inputs": 1.35}[point["step"]["remat"]]
    assert 0.999 < point["flops"]["dense_executed_over_model"] <= limit
    assert point["flops"]["dense_executed"] == pytest.approx(point["flops"]["dense_executed_closed_form"], rel=0.01)
    sent = point["communication_per_device"]
    assert (sent["gathered_bytes"], sent["summed_bytes"]) == pytest.approx(tuple(sent["closed_form"].values()), rel=0.1)
    assert point["step"]["batch_size"] * point["step"]["sequence_length"] == 512 * 4096
    assert point["versions"].keys() >= {"jax", "libtpu"} and "spiral_jax.aot" in point["command"]


@pytest.mark.parametrize("group", ["160m-v5e-4x4", "1.4b-v5p-4x4x4", "1.4b-v6e-8x8"])
@pytest.mark.parametrize("family", ["spiral_b", "spiral_l"])
def test_a_spiral_stands_to_the_loop_as_the_closed_forms_do(group, family):
    """Matrix work, executed, of which it does less; and activations.

    Those are more where only layers' inputs are kept: the memory of four iterations holds more than that of two.
    """
    spiral, loop = POINTS[f"{group}-{family}"], POINTS[f"{group}-mesh"]
    found, form = (
        spiral["flops"][name] / loop["flops"][name] for name in ("dense_executed", "dense_executed_closed_form")
    )
    assert found == pytest.approx(form, rel=0.01)
    assert found < 1

    def activations(point):
        """Kept by the closed form, and found: the peak without what else is there while the loss is computed."""
        form = point["memory"]["closed_form"]
        others = ("parameters", "optimizer", "gradients", "core", "gathered_rest", "logits_block")
        return form["activations_kept"], point["memory"]["peak_bytes"] - sum(form[name] for name in others)

    (kept, found), (loop_kept, loop_found) = activations(spiral), activations(loop)
    assert kept < found and loop_kept < loop_found
    assert found / loop_found == pytest.approx(kept / loop_kept, rel=0.15)


def test_the_pages_have_the_points_as_they_are():
    for page, table in tables().items():
        assert table in page.read_text(encoding="utf-8"), f"{page}: run python -m tpu.table"
