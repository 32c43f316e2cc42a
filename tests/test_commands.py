"""The commands as people type them: good input works, bad input is one line, exit status 2, and nothing compiled."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from verbs import call

from spiral_jax import command, describe, evaluate, train
from spiral_jax.hardware import has_accelerators
from spiral_jax.run.claim import claim

ROOT = Path(__file__).parent.parent
TINY = """
from spiral_jax.run.config import default_config

def get_config(argument=""):
    config = default_config()
    config.model.update(dict(vocab_size=288, d_model=32, num_heads=2, prelude_layers=1, core_layers=1, coda_layers=0,
                             chunks=(2, 1), dtype="float32"))
    config.train.update(dict(steps=4, batch_size=8, sequence_length=16))
    config.data.paths = ("{text}",)
    config.data.validation_fraction = 0.2
    config.checkpoint.every_steps = 2
    config.evaluation.every_steps = 0
    return config
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A configuration, a text, and a finished run."""
    folder = tmp_path_factory.mktemp("commands")
    (folder / "text.txt").write_text("".join(f"line {i} of a text, naïvely counted\n" for i in range(300)))
    (folder / "tiny.py").write_text(TINY.replace("{text}", str(folder / "text.txt")))
    (folder / "empty.txt").write_text("")
    assert call(train, f"--config={folder}/tiny.py", f"--workdir={folder}/run") == (0, "")
    return folder


BAD_TRAINING = {
    "unknown key": ("--config.model.d_modle=3", "config.model.d_modle"),
    "unknown section": ("--config.modle.d_model=3", "config.modle"),
    "wrong type": ("--config.train.steps=many", "train.steps"),
    "unknown flag": ("--batch=3", "batch"),
    "unknown topology": ("--config.model.topology=ring", "model.topology"),
    "unknown schedule": ("--config.optimizer.schedule=linear", "optimizer.schedule"),
    "leaking shift": ("--config.model.shifts=(0,0)", "model.shifts[0]"),
    "heads do not divide d": ("--config.model.num_heads=3", "model.num_heads"),
    "batch not divisible by the mesh": ("--config.train.batch_size=7", "train.batch_size"),
    "mesh does not fit": ("--config.mesh.fsdp=3", "mesh.fsdp"),
    "missing data": ("--config.data.paths=/no/such/file.txt", "/no/such/file.txt"),
    "missing store": ("--config.data.stores=/no/such/store", "/no/such/store"),
    "missing tokenizer": ("--config.data.tokenizer=/no/tokenizer.json", "/no/tokenizer.json"),
    "empty text": ("--config.data.paths={folder}/empty.txt", "empty.txt"),
    "vocabulary too small": ("--config.model.vocab_size=256", "model.vocab_size"),
    "text shorter than a window": ("--config.train.sequence_length=100000", "sequence"),
    "weights without stores": ("--config.data.weights=((1.0,),)", "data.weights"),
    "weights that cannot be kept": (
        ("--config.data.stores=('{store}','{store}')", "--config.data.weights=((0.1234567,0.7654321),)"),
        "data.weights",
    ),
    "bad profile": ("--profile=9", "--profile"),
    "float64 without x64": ("--config.model.dtype=float64", "JAX_ENABLE_X64"),
    "warm-up longer than the run": ("--config.optimizer.warmup_steps=9", "optimizer.warmup_steps"),
    "interval of kept checkpoints": ("--config.checkpoint.keep_every_steps=3", "checkpoint.keep_every_steps"),
}


@pytest.mark.parametrize("override, named", BAD_TRAINING.values(), ids=BAD_TRAINING.keys())
def test_bad_training_input_is_one_line_before_anything_is_compiled(folder, compilations, tmp_path, override, named):
    store = next((folder / "run/cache").glob("*/train")).parent
    overrides = (override,) if isinstance(override, str) else override
    overrides = [override.format(folder=folder, store=store) for override in overrides]
    status, errors = call(train, f"--config={folder}/tiny.py", f"--workdir={tmp_path}/run", *overrides)
    assert status == 2
    assert errors.startswith("error: ") and errors.count("\n") == 1, errors
    assert named in errors
    assert not compilations


def test_unwritable_and_missing_workdir(folder, compilations):
    for flag, named in ((f"--workdir={folder}/text.txt/run", "text.txt/run"), ("--workdir=/proc/run", "/proc/run")):
        status, errors = call(train, f"--config={folder}/tiny.py", flag)
        assert status == 2 and named in errors and errors.count("\n") == 1
    status, errors = call(train, f"--config={folder}/tiny.py")
    assert status == 2 and "--workdir" in errors
    assert not compilations


def test_missing_config_and_unknown_arguments(folder):
    for arguments, named in (
        ((), "--config"),
        (("--config=/no/file.py",), "/no/file.py"),
        (("--config.train.steps=3",), "--config is missing"),
        ((f"--config={ROOT}/experiments/pile.py:7b,mesh",), "7b"),
        ((f"--config={ROOT}/experiments/pile.py:1b,spiral",), "spiral"),
        ((f"--config={folder}/tiny.py", "stray"), "stray"),
        ((f"--config={ROOT}/experiments/quickstart.py:small",), "takes no argument"),
        ((f"--config={ROOT}/README.md",), "SyntaxError"),
    ):
        status, errors = call(describe, *arguments)
        assert status == 2 and named in errors and errors.count("\n") == 1, errors


def test_checkpoint_of_another_model_is_refused_and_kept(folder, compilations):
    saved = sorted(path.name for path in (folder / "run/checkpoints").iterdir())
    for override, saved_value, given in (
        ("--config.model.d_model=64", "32", "64"),
        ("--config.model.topology=anchor", "'mesh'", "'anchor'"),
        ("--config.seed=5", "0", "5"),
        ("--config.train.steps=9", "4", "9"),
    ):
        status, errors = call(train, f"--config={folder}/tiny.py", f"--workdir={folder}/run", override)
        field = override.removeprefix("--config.").split("=")[0]
        assert status == 2 and field in errors and saved_value in errors and given in errors, errors
    assert sorted(path.name for path in (folder / "run/checkpoints").iterdir()) == saved
    assert not compilations


@pytest.mark.parametrize("damage", ["truncated", "missing", "other tokenizer"])
def test_damaged_store_is_refused(folder, tmp_path, compilations, damage):
    store = next((folder / "run/cache").glob("*/train")).parent
    copy = tmp_path / "store"
    subprocess.run(["cp", "-r", str(store), str(copy)], check=True)
    override = "--config.data.tokenizer=bytes"
    tokens = copy / "train/tokens.bin"
    if damage == "truncated":
        os.truncate(tokens, tokens.stat().st_size - 2)
    elif damage == "missing":
        tokens.unlink()
    else:
        from spiral_jax.data.tokenizers import train_bpe

        train_bpe(["some text"], 260).save(tmp_path)
        override = f"--config.data.tokenizer={tmp_path}/tokenizer.json"
    status, errors = call(
        train, f"--config={folder}/tiny.py", f"--workdir={tmp_path}/run", f"--config.data.stores={copy}", override
    )
    assert status == 2 and errors.count("\n") == 1, errors
    assert ("tokenizer" if damage == "other tokenizer" else "tokens.bin") in errors
    assert not compilations


def test_a_finished_run_says_so_and_keeps_its_rows(folder, capsys):
    rows = (folder / "run/metrics.jsonl").read_text()
    assert [json.loads(row)["step"] for row in rows.splitlines()] == [1, 2, 3, 4]
    assert call(train, f"--config={folder}/tiny.py", f"--workdir={folder}/run") == (0, "")
    assert "finished: 4 steps" in capsys.readouterr().out
    assert (folder / "run/metrics.jsonl").read_text() == rows


def test_a_run_does_not_need_its_text_any_more(folder, tmp_path, capsys):
    run = tmp_path / "run"
    subprocess.run(["cp", "-r", str(folder / "run"), str(run)], check=True)
    text, elsewhere = folder / "text.txt", folder / "moved.txt"
    text.rename(elsewhere)
    try:
        assert call(train, f"--config={folder}/tiny.py", f"--workdir={run}") == (0, "")
    finally:
        elsewhere.rename(text)
    assert "finished: 4 steps" in capsys.readouterr().out


def test_two_processes_cannot_train_in_one_directory(folder):
    with claim(folder / "run"):
        status, errors = call(train, f"--config={folder}/tiny.py", f"--workdir={folder}/run")
    assert status == 2 and "another process" in errors and errors.count("\n") == 1


@pytest.mark.slow
def test_accumulation_evaluates_the_same_in_smaller_batches_and_a_profile_may_end_with_the_run(
    folder, tmp_path, capsys
):
    arguments = (f"--config={folder}/tiny.py", f"--workdir={tmp_path}/run", "--config.train.batch_size=16")
    # In a process of its own: the profiler crashes in one that a test has loaded the TPU compiler into.
    command = (sys.executable, "-m", "spiral_jax.train", *arguments, "--config.train.accumulation=2", "--profile=3:9")
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert list((tmp_path / "run/profile").rglob("*.xplane.pb"))
    (row,) = (json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1:])
    capsys.readouterr()
    assert call(evaluate, f"--workdir={tmp_path}/run", "--batch_size=24", "--json") == (0, "")
    assert row["validation_loss"] == pytest.approx(json.loads(capsys.readouterr().out)["loss"], rel=1e-6)


def test_what_a_run_leaves_behind(folder):
    run = folder / "run"
    assert json.loads((run / "config.json").read_text())["model"]["d_model"] == 32
    table = (run / "parameters.txt").read_text()
    assert "core/layers/qkv/kernel" in table and table.splitlines()[-1].split() == ["total", "44,992"]
    (start, *_) = json.loads((run / "environment.json").read_text())
    assert start["packages"]["jax"] == jax.__version__ and start["mesh"] == {"data": 8, "fsdp": 1, "tensor": 1}


def test_evaluate_agrees_with_the_run_and_scores_files(folder, capsys):
    documents = folder / "run" / "documents.json"
    assert call(evaluate, f"--workdir={folder}/run", "--json", f"--documents={documents}") == (0, "")
    report = json.loads(capsys.readouterr().out)
    found = json.loads(documents.read_text())
    assert sum(found["tokens"]) == report["tokens"] and len(found["nats"]) == len(found["tokens"])
    assert sum(found["nats"]) / report["tokens"] == pytest.approx(report["loss"], rel=1e-12)
    last = json.loads((folder / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert report["step"] == 4
    assert report["loss"] == pytest.approx(last["validation_loss"], rel=1e-6)
    assert report["bits_per_byte"] == pytest.approx(last["validation_bits_per_byte"], rel=1e-6)
    assert call(evaluate, f"--workdir={folder}/run", f"--input={folder}/text.txt", "--stride=5", "--json") == (0, "")
    report = json.loads(capsys.readouterr().out)
    assert report["tokens"] == report["utf8_bytes"] == len((folder / "text.txt").read_bytes())


def test_bad_evaluation_input(folder, tmp_path):
    for arguments, named in (
        ((), "--workdir"),
        ((f"--workdir={tmp_path}",), "has no checkpoints"),
        (("--workdir=/no/run",), "/no/run"),
        ((f"--workdir={folder}/run", "--step=3"), "step 3"),
        ((f"--workdir={folder}/run", "--input=/no/file"), "/no/file"),
        ((f"--workdir={folder}/run", f"--input={folder}/empty.txt"), "empty.txt"),
        ((f"--workdir={folder}/run", f"--input={folder}/*.*"), "matches 2 files"),
        ((f"--workdir={folder}/run", "--stride=17"), "--stride"),
        ((f"--workdir={folder}/run", "--batch_size=0"), "--batch_size"),
        ((f"--workdir={folder}/run", "--documents=/no/file"), "--documents"),
    ):
        status, errors = call(evaluate, *arguments)
        assert status == 2 and named in errors and errors.count("\n") == 1, errors


def test_describe_json(capsys):
    assert call(describe, f"--config={ROOT}/experiments/pile.py:1.4b,mesh", "--devices=64", "--json") == (0, "")
    description = json.loads(capsys.readouterr().out)
    assert description["parameters"]["non_embedding"] == 805_797_918
    assert description["parameters"]["router"] == 61_470
    assert description["parameters"]["total"] == 805_797_918 + 2 * 50304 * 2048
    assert description["flops"]["prefill"] == pytest.approx(14.08e12, rel=0.015)
    assert description["flops"]["train_per_token"] == pytest.approx(3 * description["flops"]["prefill"] / 4096)
    assert [part["length"] for part in description["schedule"]] == [4096] * 4
    assert description["memory"]["parameters"] == pytest.approx(4 * description["parameters"]["total"] / 64, rel=0.03)


@pytest.mark.slow
def test_every_paper_configuration_describes_itself(capsys):
    from experiments.pile import FAMILIES, SIZES, get_config
    from spiral_jax.run.config import RunConfig

    for size in SIZES:
        for family in FAMILIES:
            config = RunConfig.from_dict(get_config(f"{size},{family}").to_dict())
            assert describe.describe(config, 8)["parameters"]["total"] == config.model.total_parameters


def test_verbs_are_listed_and_help_is_given(capsys):
    listed = subprocess.run([sys.executable, "-m", "spiral_jax"], capture_output=True, text=True, cwd=ROOT, check=True)
    from spiral_jax.__main__ import VERBS

    for verb in VERBS:
        assert verb in listed.stdout
        assert (ROOT / f"spiral_jax/{verb}.py").exists()
    for verb in (train, evaluate, describe):
        assert call(verb, "--help") == (0, "")
        text = capsys.readouterr().out
        # Flags that verbs share, too.
        assert "--import: " in text
        assert ("--config: " in text) == (verb is not evaluate)
        assert ("--initialization_timeout: " in text) == (verb is not describe)


def test_importing_the_package_touches_no_device():
    code = "import sys, spiral_jax.train; from jax._src import xla_bridge; sys.exit(bool(xla_bridge._backends))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


PLATFORMS = """
import os
import jax
from spiral_jax import command
from spiral_jax.errors import SpiralError
for wanted in ("cuda", "cdua", "cpu"):
    os.environ["JAX_PLATFORMS"] = wanted
    jax.config.update("jax_platforms", wanted)
    try:
        with command._platforms_blamed():
            print(len(jax.devices()))
    except SpiralError as error:
        print(error)
"""


def test_platforms_that_are_not_here_are_one_line():
    done = subprocess.run([sys.executable, "-c", PLATFORMS], capture_output=True, text=True, cwd=ROOT, timeout=60)
    cuda, typo, cpu = done.stdout.splitlines()
    allowed = "allowed: a platform of this machine, or nothing for what there is ("
    assert cuda.startswith(f"JAX_PLATFORMS is 'cuda'; {allowed}"), done
    assert typo.startswith(f"JAX_PLATFORMS is 'cdua'; {allowed}") and "not in the list of known backends" in typo
    assert int(cpu) >= 1


@pytest.mark.skipif(has_accelerators(), reason="jax shall start what is here")
def test_a_tpu_library_without_a_tpu_is_passed_over():
    """It warns, waits for answers of Google's cloud, and its profiler crashes."""
    pytest.importorskip("libtpu")
    script = (
        "import jax; from spiral_jax import command\n"
        "command.run('x', '', lambda values: None, lambda values: print(jax.devices()[0].platform))"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("cpu\n", "")


@pytest.mark.parametrize(
    "said, status",
    [
        ("INTERNAL: Core halted unexpectedly: INTERNAL: Accelerator device halted prematurely", 43),
        ("UNAVAILABLE: The TPU driver does not answer", 43),
        ("ABORTED: a slice was lost", 43),
        ("RESOURCE_EXHAUSTED: Out of memory allocating 10 bytes", 1),
        ("INVALID_ARGUMENT: an executable of other shapes", 1),
        ("INTERNAL: CpuCallback error calling callback: Traceback", 1),
    ],
)
def test_what_a_runtime_says_is_tried_again_unless_it_is_of_the_program(said, status):
    """A launcher starts 43 again, as a failure of the machine; of 1 it takes two."""
    found, text = command._outcome(jax.errors.JaxRuntimeError(said))
    assert found == status and "JaxRuntimeError" in text and said in text


@pytest.mark.parametrize(
    "dtype, there, expected", [("float32", True, "highest"), ("bfloat16", True, None), ("float32", False, None)]
)
def test_float32_is_float32_on_accelerators(dtype, there, expected, monkeypatch):
    monkeypatch.setattr(command, "has_accelerators", lambda: there)
    before = jax.config.jax_default_matmul_precision
    try:
        command.compute_in(dtype)
        assert jax.config.jax_default_matmul_precision == expected
    finally:
        jax.config.update("jax_default_matmul_precision", before)
