"""What is checked before anything is created."""

import configparser
import dataclasses
import importlib.metadata
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from spiral_jax.errors import SpiralError
from spiral_jax.hardware import parse_slice
from tests.tpu.launches import DESCRIBED, JOB, POINT, ROOT, fake
from tpu import plan
from tpu.plan import make_plan


def find_without(*missing):
    find = importlib.util.find_spec
    return lambda name, *rest: None if name in missing else find(name, *rest)


@pytest.fixture(scope="module")
def packed():
    return plan.pack(ROOT)


@pytest.fixture
def world(monkeypatch, tmp_path, packed):
    """A framework that answers at once, a bucket and an index that are there; `calls` has what was asked."""
    answers = {"spiral_jax.describe": json.loads(json.dumps(DESCRIBED)), "spiral_jax.aot": POINT}
    calls, lines = [], []

    def child(module, *arguments, say=None, LIBTPU_INIT_ARGS=""):
        assert ("--xla_tpu_" in LIBTPU_INIT_ARGS) == (module == "spiral_jax.aot"), "the flags that hosts run with"
        calls.append((module, *arguments))
        if isinstance(answers[module], Exception):
            raise answers[module]
        return json.dumps(answers[module])

    monkeypatch.setattr(plan, "_child", child)
    monkeypatch.setattr(plan, "pack", lambda root: packed)
    monkeypatch.setattr(plan, "_resolve", lambda: "resolved")
    monkeypatch.setattr(plan, "_versions", lambda: {"jax": "0.10.2", "jaxlib": "0.10.2", "libtpu": "1", "flax": "2"})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    world = dataclasses.make_dataclass("World", ["answers", "calls", "lines", "region"])(
        answers, calls, lines, "us-east5"
    )
    world.plan = lambda job=JOB: make_plan(job, lambda url: world.region, lines.append)
    return world


def asked(world):
    return [call[0] for call in world.calls]


def test_what_it_says_and_costs(world):
    found = world.plan(dataclasses.replace(JOB, price=2.0, max_chip_hours=30))
    seconds = 8e9 * 2**21 / (POINT["prediction"]["mfu"] * 459e12 * 64)
    assert found.is_compiled and found.step_seconds == pytest.approx(seconds)
    # A thousand steps, four times twenty batches forward only, ten minutes of 64 chips.
    hours = 64 / 3600 * (1000 + 4 * 20 / 3) * seconds + 64 / 6
    assert found.chip_hours == pytest.approx(hours)
    text = "\n".join(world.lines)
    assert f"chip-hours     {hours:,.1f}: training" in text and f"money          {2 * hours:,.2f} at 2 " in text
    assert f"{POINT['memory']['peak_bytes'] / 2**30:.1f} of 95.74 GiB" in text and "libtpu 1, not " in text
    (cut,) = re.findall(r"--max_chip_hours=30 ends it near step (\d+) of 1,000", text)
    assert int(cut) == pytest.approx(1000 * (30 - 64 / 6) / (hours - 64 / 6), abs=1)
    assert world.calls[0][1:] == (f"--config={JOB.config}", "--devices=64", "--data", "--json")
    assert world.calls[1][1:] == (f"--config={JOB.config}", "--topology=v5p:4x4x4", "--num_slices=1", "--json")


def test_the_closed_form_of_a_point_is_its_prediction():
    """Steps times predicted seconds, as the point has them, are what the formula gives for the run it was made of."""
    point = POINT["prediction"]
    flops = POINT["flops"]["dense_model"] + POINT["flops"]["attention_model_causal"]
    assert plan.chip_hours(flops, point["mfu"], JOB.slice) * 3600 / 64 == pytest.approx(point["step_seconds"])


def test_it_is_not_compiled_again(world, monkeypatch, packed):
    world.plan()
    world.plan(dataclasses.replace(JOB, name="other", price=3.0))
    assert asked(world).count("spiral_jax.aot") == 1 and any("compiled       before" in line for line in world.lines)
    world.plan(dataclasses.replace(JOB, overrides=("--config.train.accumulation=2",)))
    world.plan(dataclasses.replace(JOB, slice=parse_slice("v5p:4x4x8")))
    world.plan(dataclasses.replace(JOB, num_slices=2))
    assert asked(world).count("spiral_jax.aot") == 4
    monkeypatch.setattr(plan, "_versions", lambda: dict.fromkeys(plan.PACKAGES, "3"))
    world.plan()
    monkeypatch.setattr(plan, "pack", lambda root: dataclasses.replace(packed, name="0123456789ab-changed"))
    world.plan()
    assert asked(world).count("spiral_jax.aot") == 6


def test_a_cache_that_is_damaged_or_cannot_be_written(world, tmp_path):
    world.plan()
    (kept,) = (tmp_path / "cache").rglob("*.json")
    kept.write_text("{")
    world.plan()
    assert asked(world).count("spiral_jax.aot") == 2 and json.loads(kept.read_text()) == POINT
    kept.unlink()
    kept.parent.rmdir()
    kept.parent.write_text("a file")
    world.plan()


def refused(world, job=JOB):
    with pytest.raises(SpiralError) as error:
        world.plan(job)
    assert "\n" not in str(error.value) and re.search("; allowed: |; for example", str(error.value))
    return str(error.value)


def test_what_is_quick_is_refused_before_the_compiler_starts(world):
    assert refused(world, dataclasses.replace(JOB, config="")).startswith("--config is missing")
    assert refused(world, dataclasses.replace(JOB, config="nope.py")).startswith("--config is 'nope.py'")
    assert refused(world, dataclasses.replace(JOB, imports=("mine.py",))).startswith("--import is 'mine.py'")
    assert not world.calls
    world.answers["spiral_jax.describe"]["reads"] = {"data.stores": ["/data/pile"]}
    assert refused(world).startswith("data.stores is '/data/pile'; allowed: gs://")
    world.answers["spiral_jax.describe"]["reads"] = {"data.paths": [f"{ROOT}/docs/spec.md"]}
    assert refused(world).startswith("data.paths is")  # the hosts have the tree, but not there
    world.answers["spiral_jax.describe"]["reads"] = {}
    world.region = "us-central1"
    assert "which is in us-central1, while us-east5-a is in us-east5" in refused(world)
    world.region = "us"
    assert "which is in us, while" in refused(world)
    world.region = "us-east5"
    world.answers["spiral_jax.describe"] = SpiralError("data.stores is 'gs://x', which holds no tokens; allowed: y")
    assert refused(world).startswith("data.stores is 'gs://x'")
    assert "spiral_jax.aot" not in asked(world)


def test_data_in_another_region_is_said():
    lines, places = [], {"data.stores": ["gs://runs-of-ours/pile", "gs://far/pile", "gs://others/pile"]}

    def locate(url):
        if url == "gs://others":
            raise SpiralError("forbidden")
        return "europe-west4" if url == "gs://far" else "us-east5"

    plan._check_places(JOB, places, plan.Code("", b"", "", ()), locate, lines.append)
    (note,) = [line for line in lines if "note" in line]
    assert "gs://far, which is read, is in europe-west4" in note


def test_text_that_the_hosts_have(world):
    stdlib = str(Path(json.__file__).parents[1])
    world.answers["spiral_jax.describe"]["reads"] = {
        "data.paths": ["docs", "README.md", "docs/*.md", f"{stdlib}/[a-h]*.py"]
    }
    world.plan()


def test_packages_that_the_hosts_lack(world):
    """Found out here: a start there ends with 2, after the slice was paid for."""
    world.answers["spiral_jax.describe"]["extras"] = {"logging.wandb": "wandb"}
    line = refused(world)
    assert "--config.logging.wandb is set; allowed: false or empty, or a tpu/lock.txt made with" in line


def test_what_does_not_fit_is_said_by_the_compiler(world):
    world.answers["spiral_jax.aot"] = SpiralError("--topology is 'v5p:4x4x4', of which a device needs more; allowed: x")
    assert "of which a device needs more" in refused(world)


def test_without_libtpu_closed_forms_stand_in(world, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "libtpu" else object())
    found = world.plan()
    assert not found.is_compiled and found.mfu == POINT["prediction"]["mfu"] and asked(world) == ["spiral_jax.describe"]
    assert any("NOT COMPILED" in line for line in world.lines)
    # No point of this generation: the lowest MFU of all, so that what it will cost is not made to look small.
    world.region = "us-central2"
    other = world.plan(dataclasses.replace(JOB, slice=parse_slice("v4-128"), zone="us-central2-b"))
    assert other.mfu == min(json.loads(p.read_text())["prediction"]["mfu"] for p in ROOT.glob("tpu/predictions/*.json"))
    world.region = "us-east5"
    world.answers["spiral_jax.describe"]["memory"]["activations_kept"] = 10**11
    assert "of which a device needs 98.72 GiB or more of 95.74" in refused(world)


def test_without_jax_nothing_can_be_planned(world, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert re.match(r"jax is missing in .*; allowed: .*uv pip install -r tpu/lock.txt, or --skip_plan", refused(world))
    assert not world.calls


def test_skipping_is_loud():
    lines = []
    plan.plan_unless_skipped(JOB, True, lambda url: "us-east5", lines.append)
    assert lines[0].startswith("PLAN SKIPPED: nothing was checked")


def test_a_child_that_refuses(monkeypatch, tmp_path):
    fake(tmp_path / "python", "echo working >&2; echo 'error: x is 3; allowed: 4' >&2; exit 2")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    lines = []
    with pytest.raises(SpiralError, match=r"^x is 3; allowed: 4$"):
        plan._child("spiral_jax.aot", say=lines.append)
    assert lines == ["  ... working"]
    fake(tmp_path / "python", "echo 'Traceback:' >&2; echo 'KeyError: 3' >&2; exit 1")
    with pytest.raises(SpiralError, match=r"spiral_jax\.aot ended with status 1: KeyError: 3"):
        plan._child("spiral_jax.aot")
    fake(tmp_path / "python", "kill -9 $$")
    with pytest.raises(SpiralError, match="ended with status -9: it said nothing"):
        plan._child("spiral_jax.aot")


def test_dependencies(monkeypatch, tmp_path):
    def resolve(script):
        fake(tmp_path / "uv", script)
        return plan._resolve()

    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert re.fullmatch(r"\d+ packages of tpu/lock.txt can be had for Python 3.11", resolve("exit 0"))
    with pytest.raises(SpiralError, match=r"does not resolve .*no version of jax==99"):
        resolve("echo 'error: No solution: there is no version of jax==99' >&2; exit 1")
    assert "NOT CHECKED" in resolve("echo 'error: Request failed' >&2; exit 2")
    assert "NOT CHECKED" in resolve("echo 'hint: the network was disabled' >&2; exit 1")
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert "there is no uv here" in plan._resolve()


def test_the_lock_is_within_the_bounds_of_the_package():
    """Offline: what setup.cfg asks for, with the extras that hosts need, is pinned, to a version it allows."""
    parsed = configparser.ConfigParser()
    parsed.read(ROOT / "setup.cfg")
    wanted = parsed["options"]["install_requires"].split("\n")
    for extra in ("remote", "tensorboard", "tpu"):
        wanted += parsed["options.extras_require"][extra].split("\n")
    pins = {name.lower().replace("_", "-"): version for name, version in plan.pins().items()}
    for line in filter(None, wanted):
        if not line.startswith("#"):
            requirement = Requirement(line)
            assert requirement.specifier.contains(pins[requirement.name.lower().replace("_", "-")]), line
    assert set(plan.PACKAGES) | {"requests", "gcsfs"} <= set(pins)
    # jax says which libtpu it was released with; importlib.metadata knows it where jax of the lock is installed.
    if importlib.metadata.version("jax") == pins["jax"]:
        (libtpu,) = (
            Requirement(line)
            for line in importlib.metadata.requires("jax")
            if line.startswith("libtpu") and "tpu" in line
        )
        assert libtpu.specifier.contains(pins["libtpu"])


def test_the_lock_is_one_line_a_package():
    lines = [line for line in (ROOT / plan.LOCK).read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+", line) for line in lines) and len(lines) == len(plan.pins())


QUICKSTART = dataclasses.replace(
    JOB,
    config="experiments/quickstart.py",
    slice=parse_slice("v5p-8"),
    overrides=("--config.summary.plot=false",),
)


def test_the_framework_itself(monkeypatch):
    """The children as they are, without the compiler: quickstart, its text, a mesh that fits."""
    monkeypatch.setattr(importlib.util, "find_spec", find_without("libtpu"))
    monkeypatch.setattr(plan, "_resolve", lambda: "")
    lines = []
    found = make_plan(QUICKSTART, lambda url: "us-east5", lines.append)
    assert found.steps > 0 and found.chip_hours > 0 and any("data           files " in line for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize(
    "override, words",
    [
        ("--config.train.stepz=3", "--config.train.stepz is not a field of the configuration"),
        ("--config.mesh.fsdp=3", "mesh"),
        ("--config.data.stores=('/nowhere/at/all',)", "data.stores is '/nowhere/at/all', which does not exist"),
    ],
)
def test_what_the_framework_refuses(override, words):
    with pytest.raises(SpiralError) as error:
        make_plan(dataclasses.replace(QUICKSTART, overrides=(override,)), lambda url: "us-east5", print)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.slow
def test_the_compiler_itself(libtpu, monkeypatch, tmp_path, packed):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(plan, "_resolve", lambda: "")
    monkeypatch.setattr(plan, "pack", lambda root: packed)
    small = (
        "--config.mesh.fsdp=4",
        "--config.mesh.data=1",
        "--config.train.batch_size=8",
        "--config.summary.plot=False",
    )
    job = dataclasses.replace(QUICKSTART, overrides=small)
    lines = []
    found = make_plan(job, lambda url: "us-east5", lines.append)
    assert found.is_compiled and 0 < found.mfu < 1
    assert make_plan(job, lambda url: "us-east5", lines.append) == found
    assert sum("this takes minutes" in line for line in lines) == 1
