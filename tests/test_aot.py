"""`aot`: what it refuses before it compiles anything, what it says of what does not fit, and a small program read."""

import dataclasses
import importlib.util
import json

import pytest
from verbs import call

from spiral_jax import aot
from spiral_jax.hardware import parse_slice
from spiral_jax.roofline import report as reports
from spiral_jax.roofline import search as searches
from spiral_jax.roofline import slices
from spiral_jax.roofline.report import CompiledStep, DoesNotFit
from spiral_jax.run.config import RunConfig

PILE = "--config=experiments/pile.py:160m,spiral_b"
V5E = parse_slice("v5e:2x2")


@pytest.fixture(autouse=True)
def in_repository(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


@pytest.fixture
def never_compiled(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("something was compiled")

    monkeypatch.setattr(reports, "compile_described", refuse)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((PILE,), "--topology is missing"),
        (("--topology=v5e:4x4",), "--config is missing"),
        ((PILE, "--topology=v5p:3x3x3"), "no v5p slice has the shape 3x3x3"),
        ((PILE, "--topology=v5p-100"), "no v5p slice has 100"),
        ((PILE, "--topology=v9e:2x2"), "there is no generation 'v9e'"),
        ((PILE, "--topology=v5e:4x4", "--config.train.batch_size=500"), "train.batch_size is 500"),
        ((PILE, "--topology=v5e:4x4", "--config.train.accumulation=3"), "train.batch_size is 512"),
        ((PILE, "--topology=v5e:4x4", "--config.mesh.fsdp=5"), "does not fit 16 devices"),
        ((PILE, "--topology=v5e:4x4", "--config.model.remat=full"), "model.remat is 'full'; allowed: keep_all"),
        ((PILE, "--topology=v5e:4x4", "--config.train.gather_core=never"), "train.gather_core is 'never'"),
        ((PILE, "--topology=v5e:4x4", "--output=/no/folder/report.json"), "--output is '/no/folder"),
        ((PILE, "--topology=v5e:4x4", "--output=/tmp"), "--output is '/tmp'"),
        ((PILE, "--topology=v5e:4x4", "--search", "--config.train.batch_size=500"), "train.batch_size is 500"),
        ((PILE, "--topology=v5e:1x1", "--search", "--config.model.d_model=12288"), "no layout can fit"),
        ((PILE, "--topology=v5e:4x4", "--num_slices=0"), "num_slices"),
        ((PILE, "--topology=v5e:4x4", "--config.train.attention=cudnn"), "train.attention is 'cudnn'"),
        ((PILE, "--topology=v5e:4x4", "--num_slices=2"), "mesh.data is 1; allowed: a multiple of the 2 slices"),
    ],
)
def test_mistakes_are_one_line(arguments, named, never_compiled, request):
    if named.startswith(("mesh.data", "train.attention")):
        request.getfixturevalue("libtpu")
    status, errors = call(aot, *arguments)
    assert status == 2 and errors.count("\n") == 1 and named in errors, errors


def test_without_libtpu_the_extra_is_named(monkeypatch, never_compiled):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        slices.importlib.util, "find_spec", lambda name, *rest: None if name == "libtpu" else find(name, *rest)
    )
    status, errors = call(aot, PILE, "--topology=v5e:4x4")
    assert status == 2 and "pip install 'spiral_jax[tpu]'" in errors.splitlines()[-1]


def bytes_needed(config: RunConfig) -> float:
    """As if a device's need were its micro-batch times what is kept of it, in GiB."""
    rows = config.train.batch_size / config.train.accumulation / 4
    return rows * {"keep_all": 4, "keep_products": 3, "keep_attention": 2, "keep_inputs": 1}[config.model.remat] * 2**30


@pytest.fixture
def pretended(monkeypatch):
    """Compilations that take no time, and a roofline for which keeping saves time and micro-batches cost it."""
    compiled = []

    def compile_step(config, chips, num_slices, say):
        compiled.append(config)
        if bytes_needed(config) > chips.generation.hbm_bytes:
            raise DoesNotFit(bytes_needed(config), chips.generation.hbm_bytes)
        return CompiledStep(None, None, "", 0.0)

    def seconds(config):
        kept = {"keep_all": 1.0, "keep_products": 1.02, "keep_attention": 1.2, "keep_inputs": 1.3}[config.model.remat]
        return 60 * kept * (1 + 0.01 * config.train.accumulation) * (1 if config.mesh.tensor == 1 else 2)

    def report(config, chips, num_slices, step):
        return {"memory": {"peak_bytes": bytes_needed(config)}, "prediction": {"step_seconds": seconds(config)}}

    for module in (searches, aot):
        monkeypatch.setattr(module, "compile_step", compile_step)
        monkeypatch.setattr(module, "report", report)
    monkeypatch.setattr(searches, "product_seconds", lambda config, *_: 0.9 * seconds(config))
    return compiled, seconds


def test_what_does_not_fit_says_by_how_much_and_what_does(pretended):
    """512 sequences on 4 chips: 128 GiB at accumulation 1 where nothing but inputs is kept, 15.75 are usable."""
    flags = (PILE, "--topology=v5e:2x2", "--config.model.remat=keep_products", "--config.train.accumulation=4")
    status, errors = call(aot, *flags)
    assert status == 2
    last = errors.splitlines()[-1]
    assert "needs 96.00 GiB of 15.75 GiB, 80.25 GiB too much" in last
    assert "nearest that fits: --config.train.accumulation=16 --config.model.remat=keep_inputs" in last


@pytest.mark.slow
def test_a_search_finds_the_fastest_that_fits(pretended, quiet=lambda line: None):
    compiled, seconds = pretended
    config = RunConfig()
    found = searches.search(config, V5E, 1, 1000, quiet)
    every = list(searches.layouts(config, 4))
    fitting = [one for one in every if bytes_needed(one) <= V5E.generation.hbm_bytes]
    assert 0 < len(fitting) < len(every)
    assert found.best["prediction"]["step_seconds"] == pytest.approx(min(map(seconds, fitting)))
    assert seconds(found.config) == min(map(seconds, fitting))
    assert len(compiled) == len(found.tried) < len(every), "nothing was left out"
    few = searches.search(config, V5E, 1, 3, quiet)
    assert len(few.tried) == 3 and few.left > 0


def test_layouts_divide():
    config = RunConfig()
    found = [(*dataclasses.astuple(one.mesh), one.train.accumulation) for one in searches.layouts(config, 16)]
    # 512 sequences, width 768, 12 heads.
    assert {(1, 16, 1, 32), (16, 1, 1, 1), (2, 4, 2, 64)} < set(found)
    assert all(512 % (data * fsdp * accumulation) == 0 for data, fsdp, _, accumulation in found)
    # Each with four remats, and with the core gathered once or not where it is cut.
    assert all(found.count(one) == (4 if one[1] == 1 else 8) for one in found)


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.50G of "
         "15.75G hbm. Exceeded hbm capacity by 4.75G.", 20.5 * 2**30),
        ("RESOURCE_EXHAUSTED: ... memory space hbm. Used 900.00M of 15.75G hbm.", 900 * 2**20),
        ("RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
         "temporaries (106.93G) exceeds available HBM (15.75G). HLO module: jit_train_step.", 106.93 * 2**30),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem while allocating on stack", None),
    ],
)  # fmt: skip
def test_the_compilers_message_is_read(message, needed):
    assert reports._needed(message) == needed


# Small, with levels of 128 and 256 chunks; the batch over four chips. Two layers each: of a single one the compiler
# gathers the matrices once for both passes.
SMALL = (
    PILE, "--topology=v5e:2x2", "--config.model.d_model=256", "--config.model.num_heads=4",
    "--config.model.vocab_size=1280", "--config.model.chunks=(2,1)", "--config.train.sequence_length=256",
    "--config.model.prelude_layers=2", "--config.model.core_layers=2", "--config.model.coda_layers=2",
    "--config.train.batch_size=8", "--config.train.loss_block=128", "--json",
)  # fmt: skip


@pytest.fixture
def small_report(libtpu, capsys):
    """Flags to the report of SMALL with them."""

    def make(*flags):
        status, errors = call(aot, *SMALL, *flags)
        assert status == 0, errors
        return json.loads(capsys.readouterr().out)

    return make


def check_communication(found):
    sent = found["communication_per_device"]
    for what in ("gathered_bytes", "summed_bytes"):
        assert sent[what] == pytest.approx(sent["closed_form"][what], rel=0.1)


@pytest.mark.slow
def test_a_small_program_is_what_the_closed_forms_say(small_report, tmp_path):
    found = small_report("--config.train.gather_core=step", f"--output={tmp_path}/report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == found
    check_communication(found)
    # Routers in float32, six passes but one product, are the rest.
    form = found["flops"]
    assert form["dense_executed"] == pytest.approx(form["dense_executed_closed_form"], rel=0.03)
    assert found["scores_and_logits_in_memory"] == []
    held = found["memory"]
    assert 0 < held["peak_bytes"] < held["usable_bytes"]
    # The compiler's peak of so small a program counts what lies in VMEM as well; that of real ones does not
    # (tests/roofline/test_points.py).
    assert 0.4 < held["simulated_peak_bytes"] / held["peak_bytes"] < 1.05
    assert {"parameters", "optimizer state"} <= held["held_at_the_peak"].keys()
    assert found["prediction"]["step_seconds"] > 0 and "prediction" in found["prediction"]["is"]
    assert found["versions"]["libtpu"] and "aot" in found["command"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        *(["--topology=" + topology] for topology in ("v4:2x2x2", "v5p:2x2x1", "v6e:2x4", "tpu7x:2x2x1")),
        ["--topology=v5e:2x4", "--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"],
        ["--topology=tpu7x:2x2x1", "--config.mesh.fsdp=2", "--config.mesh.tensor=4", "--config.train.gather_core=step"],
    ],
    ids=" ".join,
)
def test_other_programs_are_what_the_closed_forms_say(small_report, flags):
    """Every generation, and tensor parallelism."""
    # A width that is no level's length: activations of few rows would look like scores.
    found = small_report(*flags, "--config.model.d_model=512", "--config.model.num_heads=8")
    check_communication(found)
    assert found["flops"]["dense_executed"] == pytest.approx(found["flops"]["dense_executed_closed_form"], rel=0.03)
    assert found["scores_and_logits_in_memory"] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("remat", "forward"), [("keep_all", 1), ("keep_products", 1), ("keep_attention", 1), ("keep_inputs", 2)]
)
def test_what_is_kept_is_not_computed_again(small_report, remat, forward):
    """Attention forward per backward pass, of eight executed layers; products against the closed form."""
    flops = small_report(f"--config.model.remat={remat}")["flops"]
    assert flops["attention_kernels"] == {"fwd": 8 * forward, "dq": 8, "dkv": 8}
    assert flops["dense_executed"] == pytest.approx(flops["dense_executed_closed_form"], rel=0.03)


@pytest.mark.slow
def test_scores_and_logits_are_seen(small_report):
    """Plain XLA attention has all scores, and a block of all positions all logits."""
    found = small_report("--config.train.attention=xla", "--config.train.loss_block=256")
    shapes = " ".join(found["scores_and_logits_in_memory"])
    assert "256,256]" in shapes and "1280]" in shapes


@pytest.mark.slow
def test_between_slices_only_gradients_are_summed(small_report):
    found = small_report("--num_slices=2", "--config.mesh.data=2", "--config.mesh.fsdp=4")
    parameters = found["model"]["parameters"]
    # A device's shard of the gradients, and numbers for the metrics; what is not cut is summed whole.
    assert 0 < found["bytes_between_slices"] < 2.2 * 4 * parameters / 4


@pytest.mark.slow
def test_running_out_of_memory_is_a_result(small_report):
    flags = [flag for flag in SMALL if "batch_size" not in flag and "vocab" not in flag]
    status, errors = call(aot, *flags, "--config.train.batch_size=65536", "--config.model.remat=keep_products")
    last = errors.splitlines()[-1]
    assert status == 2 and "too much" in last and "the nearest that fits: --config.train.accumulation=" in last, errors
