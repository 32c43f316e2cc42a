"""Comparing the first hour's file with predictions: ratios, verdicts, exit statuses; and the predictions themselves."""

import copy
import dataclasses
import json

import pytest

from spiral_jax.hardware import GENERATIONS
from spiral_jax.roofline.predict import FITTED
from spiral_jax.training import costs
from tpu.first_hour import __main__ as program
from tpu.first_hour import points
from tpu.first_hour.agenda import SECTIONS

COMMITTED = json.loads(program.PREDICTIONS.read_text())
PREDICTIONS = {
    "format": 1,
    "constants": COMMITTED["constants"],
    "points": {
        "v5e": {
            name: {"step_seconds": 0.1 * i, "peak_bytes": i * 10**9, "versions": {"libtpu": "1.2"}}
            for i, name in enumerate(points.POINTS, 1)
        }
    },
}


def passed(measured=None):
    check = {"what": "error", "found": 0.1, "allowed": 1.0, "ok": True}
    return {"status": "passed", "seconds": 1.0, "checks": [check], "measured": measured or {}, "why": ""}


@pytest.fixture
def perfect():
    """A v5e chip that does exactly what is predicted."""
    sections = {section.name: passed() for section in SECTIONS}
    sections["device"] = passed({"device_kind": "TPU v5 lite", "generation": "v5e", "versions": {"libtpu": "1.1"}})
    sections["speed"] = passed({
        name: {"per_second": 1.0, "constant": PREDICTIONS["constants"]["v5e"][name]}
        for name in ("mxu_efficiency", "hbm_efficiency", "score_operations")
    })  # fmt: skip
    for name, point in PREDICTIONS["points"]["v5e"].items():
        measured = {"is_rehearsal": False, "step_seconds": point["step_seconds"], "peak_bytes": point["peak_bytes"]}
        sections[f"point-{name}"] = passed(measured)
    return {"format": 1, "commit": "abc", "size": "full", "sections": sections}


@pytest.fixture
def compare(tmp_path, capsys):
    """(file) to the exit status and the lines printed."""

    def run(found, *flags):
        path = tmp_path / "hour.json"
        path.write_text(found if isinstance(found, str) else json.dumps(found))
        predictions = tmp_path / "predictions.json"
        predictions.write_text(json.dumps(PREDICTIONS))
        status = program.main([f"--compare={path}", f"--predictions={predictions}", *flags])
        out, err = capsys.readouterr()
        return status, out.splitlines() + err.splitlines()

    return run


def line_of(lines, start):
    (line,) = (line for line in lines if line.startswith(start))
    return line


def test_a_chip_that_does_what_is_predicted(compare, perfect):
    status, lines = compare(perfect)
    assert status == 0
    assert lines[:2] == ["TPU v5 lite, commit abc, size full", "measured with libtpu 1.1, predicted with 1.2"]
    assert not [line for line in lines if "NOT" in line]
    assert line_of(lines, "point-160m-vanilla s/step").split()[-3] == "1"
    for section in SECTIONS:
        assert "as expected" in line_of(lines, f"{section.name}  ")


@pytest.mark.parametrize(
    "section, path, factor",
    [
        ("point-160m-vanilla", ("step_seconds",), 1.5),
        ("point-160m-spiral_b", ("step_seconds",), 0.5),
        ("point-410m-spiral_b", ("peak_bytes",), 1.2),
        ("speed", ("mxu_efficiency", "constant"), 0.6),
        ("speed", ("score_operations", "constant"), 2),
    ],
)
def test_what_is_far_from_its_prediction_is_named(compare, perfect, section, path, factor):
    target = perfect["sections"][section]["measured"]
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] *= factor
    status, lines = compare(perfect)
    line = line_of(lines, f"{section}  ")
    assert status == 1 and "NOT as expected" in line and f"{factor:.3g} of the prediction" in line
    assert sum("NOT as expected" in line for line in lines) == 2, "its row and its section, and no other"


def test_a_failed_check_a_broken_and_a_skipped_section_are_named(compare, perfect):
    sections = perfect["sections"]
    sections["attention"]["status"] = "failed"
    bad = {"what": "splash: value", "found": 0.3, "allowed": 0.01, "ok": False}
    sections["attention"]["checks"] += [bad, copy.copy(bad)]
    sections["training"] |= {"status": "broken", "why": "its process ended by SIGSEGV"}
    sections["decoding"] |= {"status": "skipped", "why": "120 s at least, and 0m03s are left", "checks": []}
    status, lines = compare(perfect)
    assert status == 1
    assert "splash: value is 0.3; allowed: 0.01 and 1 more" in line_of(lines, "attention  ")
    assert "broken: its process ended by SIGSEGV" in line_of(lines, "training  ")
    assert "skipped: 120 s at least" in line_of(lines, "decoding  ")
    assert "as expected" in line_of(lines, "checkpoint  ") and "NOT" not in line_of(lines, "checkpoint  ")


@pytest.mark.parametrize("measured", [{"step_seconds": None}, {"peak_bytes": None}])
def test_what_was_not_measured_is_not_as_expected(compare, perfect, measured):
    perfect["sections"]["point-160m-vanilla"]["measured"] |= measured
    assert compare(perfect)[0] == 1


def test_a_chip_without_predictions_and_a_rehearsal(compare, perfect):
    perfect["sections"]["device"]["measured"]["generation"] = "v9"
    status, lines = compare(perfect)
    assert status == 1 and "no prediction for v9" in line_of(lines, "point-160m-vanilla  ")
    perfect["sections"]["device"]["measured"]["generation"] = None
    assert "no prediction for a rehearsal" in line_of(compare(perfect)[1], "point-160m-vanilla  ")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 2, "sections": {}}', "\x00\xff"])
def test_another_file_is_refused_in_a_line(compare, content):
    status, (line,) = compare(content)
    assert status == 2 and line.startswith("error: --compare: ")


@pytest.mark.parametrize("name, point", [(name, point) for name, of in COMMITTED["points"].items() for point in of])
def test_predictions(name, point):
    """They fit, and are no faster than the chip's peak nor slower than a tenth of it."""
    found = COMMITTED["points"][name][point]
    (generation,) = (generation for generation in GENERATIONS if generation.name == name)
    config = points.step_config(point, "full")
    form = costs.flops(config)
    share = (form.dense + form.attention_causal) / found["step_seconds"] / (generation.peak_flops / generation.devices)
    assert 0.1 < share < FITTED[name].mxu_efficiency
    assert costs.memory(config, 1)["optimizer"] < found["peak_bytes"] < found["usable_bytes"] == generation.hbm_bytes
    assert COMMITTED["constants"] == {name: dataclasses.asdict(of) for name, of in FITTED.items()}


@pytest.mark.slow
def test_a_prediction_can_be_made_again(libtpu, monkeypatch, tmp_path):
    from tpu.first_hour import predict

    small = points.step_config("160m-spiral_b", "tiny")
    monkeypatch.setattr(predict, "step_config", lambda name, size: small)
    monkeypatch.setattr(predict, "OUTPUT", tmp_path / "predictions.json")
    kept = {"format": 1, "constants": {}, "points": {"v4": {"kept": {}}}}
    (tmp_path / "predictions.json").write_text(json.dumps(kept))
    predict.main(["v5e/160m-vanilla"])
    made = json.loads((tmp_path / "predictions.json").read_text())["points"]
    assert made["v4"] == {"kept": {}} and made["v5e"].keys() == {"160m-vanilla"}
    assert 0 < made["v5e"]["160m-vanilla"]["step_seconds"] < 0.1
    assert made["v5e"]["160m-vanilla"].keys() == COMMITTED["points"]["v5e"]["160m-vanilla"].keys()
