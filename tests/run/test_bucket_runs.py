"""Whole runs on a bucket, against the same run on a disk."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import bucket
import fsspec
import jax
import numpy as np
import pytest
from pairs import ROOT, finished, free_port
from verbs import call

import spiral_jax
from spiral_jax import evaluate, export, generate, import_hf, train
from spiral_jax.data.bucket import bucket_path
from spiral_jax.parallel.xla_flags import quick_flags
from spiral_jax.run.metrics import read_rows, rows_of

STEPS, EVERY = 12, 4
CONFIG = """
import os, signal, time
from etils import epath
from spiral_jax.data import pipeline
from spiral_jax.run import bucket_hold
from spiral_jax.run.config import default_config

bucket_hold.SECONDS_OF_SILENCE, bucket_hold.SECONDS_OF_A_RENEWAL = 4.0, 0.5


def get_config():
    c = default_config()
    c.model.update(dict(vocab_size=264, d_model=16, num_heads=2, prelude_layers=1, core_layers=0, coda_layers=0,
                        chunks=(), rotary_fraction=0.5, dtype="float32"))
    c.train.update(dict(steps=12, batch_size=8, sequence_length=32, loss_block=32))
    c.optimizer.update(dict(peak_learning_rate=1e-2, warmup_steps=3))
    c.data.update(dict(paths=("TEXT",), validation_fraction=0.3))
    c.mesh.update(dict(data=-1, fsdp=2))
    c.deadlines.silence_seconds = 8.0
    c.checkpoint.update(dict(every_steps=4, keep=2))
    c.evaluation.update(dict(every_steps=5, batches=4))
    c.summary.update(dict(sample_tokens=4, plot=True))
    return c


if "SIGNAL" in os.environ:  # SIGNAL:PROCESS:STEP, once the checkpoint of step 4 is there
    name, process, at = os.environ["SIGNAL"].split(":")
    read = pipeline.TrainBatches.__next__

    def read_and_act(self):
        batch = read(self)
        if self.step == int(at) and os.environ.get("JAX_PROCESS_ID", "0") == process:
            while not (epath.Path(os.environ["RUN"]) / "checkpoints/4/commit_success.txt").exists():
                time.sleep(0.05)
            os.kill(os.getpid(), signal.Signals[name])
        return batch

    pipeline.TrainBatches.__next__ = read_and_act
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A text, a configuration file that trains on it, and the run on a disk."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text.txt").write_text(" ".join(f"{n} times {n} is {n * n}." for n in range(100, 215)))
    (folder / "config.py").write_text(CONFIG.replace("TEXT", f"{folder}/text.txt"))
    return folder


def meta(place, step=STEPS) -> dict:
    return json.loads((place / "checkpoints" / str(step) / "meta/metadata").read_text())


def compared(place) -> list[tuple]:
    return [(row["step"], row["loss"], row.get("validation_loss"), row["tokens"]) for row in read_rows(rows_of(place))]


def same_run(place, other) -> None:
    assert meta(place)["arrays"] == meta(other)["arrays"]
    assert compared(place) == compared(other)


def names(place) -> set[str]:
    root = str(place).removeprefix("gs://")
    return {name.removeprefix(f"{root}/") for name in fsspec.filesystem("gcs").find(root)}


def outputs(capsys, verb, *arguments) -> str:
    capsys.readouterr()
    status, errors = call(verb, *arguments)
    assert status == 0, errors
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def alone(folder):
    assert call(train, f"--config={folder}/config.py", f"--workdir={folder}/alone") == (0, "")
    return bucket_path_or_disk(f"{folder}/alone")


def bucket_path_or_disk(place):
    from spiral_jax.data.storage import writable_path

    return writable_path("--workdir", place)


@pytest.fixture(scope="module")
def on_bucket(folder, emulator_url):
    """The run on the bucket, broken off after step 8 as by a kill, and gone on with."""
    place = bucket_path("--workdir", f"gs://{bucket.BUCKET}/whole")
    flags = f"--config={folder}/config.py", f"--workdir={place}"
    assert call(train, *flags, "--profile=2:3", "--config.logging.tensorboard=true") == (0, "")
    (place / f"checkpoints/{STEPS}/commit_success.txt").unlink()
    (place / ".lock").unlink()
    assert call(train, *flags) == (0, "")
    return place


@pytest.mark.slow
def test_it_ends_as_on_a_disk(on_bucket, alone):
    same_run(on_bucket, alone)


@pytest.mark.slow
def test_everything_of_a_run_is_there(on_bucket):
    found = names(on_bucket)
    for name in ("config.json", "parameters.txt", "environment.json", "data.json", "own_code.json", ".lock",
                 "sample.txt", "loss_curve.png", "tokenizer/tokenizer_info.json",
                 "checkpoints/8/commit_success.txt", "checkpoints/12/commit_success.txt"):  # fmt: skip
        assert name in found, sorted(found)
    patterns = (r"cache/\w{16}/train/tokens\.bin", r"cache/\w{16}/prepared\.json", r"metrics/\d{9}\.jsonl",
                r"tensorboard/events.*", r"profile/plugins/.*\.xplane\.pb")  # fmt: skip
    for pattern in patterns:
        assert any(re.fullmatch(pattern, name) for name in found), (pattern, sorted(found))
    assert not any(".partial" in name or "probe" in name or ".now-" in name or ".shared" in name for name in found)
    assert len(json.loads((on_bucket / "environment.json").read_text())) == 2
    data = json.loads((on_bucket / "data.json").read_text())
    assert data["train"][0].startswith("cache/")


@pytest.mark.slow
def test_it_is_scored_sampled_and_loaded_as_on_a_disk(on_bucket, alone, capsys):
    scores = [json.loads(outputs(capsys, evaluate, f"--workdir={place}", "--json")) for place in (on_bucket, alone)]
    assert scores[0]["input"].startswith(f"{on_bucket}/cache/")
    assert {**scores[0], "input": ""} == {**scores[1], "input": ""}
    texts = [outputs(capsys, generate, f"--workdir={place}", "--prompt=12 times", "--max_new_tokens=8")
             for place in (on_bucket, alone)]  # fmt: skip
    assert texts[0] == texts[1] and texts[0].startswith("12 times")
    (ours, params), (theirs, expected) = spiral_jax.load(str(on_bucket), step=8), spiral_jax.load(alone, step=8)
    assert ours.config == theirs.config
    jax.tree.map(np.testing.assert_array_equal, params, expected)


@pytest.mark.slow
def test_it_is_exported_to_a_disk_and_to_a_bucket_and_read_from_there(on_bucket, alone, tmp_path, capsys):
    there = bucket_path("--output", f"gs://{bucket.BUCKET}/exported")
    (there / "model-00009-of-00009.safetensors").write_bytes(b"of an export before")
    (there / "export.json").write_text(
        json.dumps({"format": "spiral_jax.export", "files": ["model-00009-of-00009.safetensors", "export.json"]})
    )
    for workdir, output in ((alone, tmp_path / "alone"), (on_bucket, tmp_path / "here"), (on_bucket, there)):
        outputs(capsys, export, f"--workdir={workdir}", f"--output={output}")
    expected = {path.name: path.read_bytes() for path in (tmp_path / "alone").iterdir() if path.name != "README.md"}
    for output in (tmp_path / "here", there):
        found = {path.name: path.read_bytes() for path in output.iterdir() if path.name != "README.md"}
        assert found == expected
    _, params = spiral_jax.load(str(there))
    jax.tree.map(np.testing.assert_array_equal, params, spiral_jax.load(tmp_path / "alone")[1])
    assert outputs(capsys, generate, f"--workdir={there}", "--prompt=12 times", "--max_new_tokens=8")
    imported = f"gs://{bucket.BUCKET}/imported"
    outputs(capsys, import_hf, f"--input={there}", f"--workdir={imported}")
    jax.tree.map(np.testing.assert_array_equal, params, spiral_jax.load(imported)[1])


def test_what_cannot_be_is_one_line(emulator_url, folder, monkeypatch):
    for place, found in (
        ("gs://no-such-bucket/run", "whose bucket cannot be used (404"),
        ("gs://bucket", "allowed: a path, or a folder as gs://BUCKET/FOLDER"),
        ("gs://bucket/../x", "allowed: a path, or a folder as gs://BUCKET/FOLDER"),
        ("gs://bucket/sweep[12]", "gs://BUCKET/FOLDER, the bucket in lower case, without any of *?[]{}"),
        ("gs:/bucket/run", "--workdir is 'gs:/bucket/run'; allowed: a path of this machine"),
        ("s3://bucket/run", "allowed: a path, or a folder as gs://BUCKET/FOLDER"),
        ("foo://bucket/run", "allowed: a path, or a folder as gs://BUCKET/FOLDER"),
    ):
        status, errors = call(train, f"--config={folder}/config.py", f"--workdir={place}")
        assert status == 2 and errors.count("\n") == 1 and found in errors, errors
    status, errors = call(evaluate, f"--workdir=gs://{bucket.BUCKET}/nothing")
    assert (status, errors) == (
        2,
        f"error: --workdir is 'gs://{bucket.BUCKET}/nothing', which does not exist; allowed: the directory of a run\n",
    )
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    status, errors = call(evaluate, f"--workdir=gs://{bucket.BUCKET}/run")
    assert status == 2 and errors.endswith("needs gcsfs; allowed: with pip install 'spiral_jax[remote]'\n"), errors


def test_a_start_that_is_refused_leaves_nothing(emulator_url, folder):
    place = bucket_path("--workdir", f"gs://{bucket.BUCKET}/refused")
    status, errors = call(
        train, f"--config={folder}/config.py", f"--workdir={place}", "--config.data.paths=('/nowhere/x.txt',)"
    )
    assert status == 2 and errors.count("\n") == 1, errors
    assert names(place) == set()


# Several processes, which is where most of the time goes.


def start(folder, place, verb="train", *flags, url=None, **environment) -> subprocess.Popen:
    """A process of 2 devices."""
    environment = os.environ | (bucket.environment(url) if url else {}) | environment | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=2 {quick_flags()}",
        "PYTHONPATH": str(ROOT),
        "RUN": str(place),
    }  # fmt: skip
    given = [f"--config={folder}/config.py"] if verb == "train" else []
    command = [sys.executable, "-m", f"spiral_jax.{verb}", *given, f"--workdir={place}", *flags]
    return subprocess.Popen(
        command, env=environment, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def run(*arguments, **named) -> SimpleNamespace:
    return finished(start(*arguments, **named), 120)


def pair(folder, place, verb="train", *flags, **environment) -> list[SimpleNamespace]:
    """Two processes, of two devices each."""
    address = f"--coordinator_address=127.0.0.1:{free_port()}"
    running = [
        start(folder, place, verb, address, *flags, JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=str(i), **environment)
        for i in (0, 1)
    ]
    try:
        return [finished(process, 150) for process in running]
    finally:
        for process in running:
            process.kill()


@pytest.fixture(scope="module")
def alone_small(folder):
    """The run on a disk, on the two devices that the processes here have."""
    assert run(folder, f"{folder}/alone-2").returncode == 0
    return bucket_path_or_disk(f"{folder}/alone-2")


@pytest.mark.slow
def test_killed_and_started_again_it_ends_bitwise_as_it_would_have(folder, emulator_url, alone_small):
    place = bucket_path("--workdir", f"gs://{bucket.BUCKET}/killed")
    assert run(folder, place, SIGNAL="SIGKILL:0:7").returncode == -signal.SIGKILL
    assert names(place) >= {"checkpoints/4/commit_success.txt", "metrics/000000001.jsonl", ".lock"}
    assert [row["step"] for row in read_rows(rows_of(place))] == [1, 2, 3, 4]  # by the checkpoint
    done = run(folder, place)
    assert done.returncode == 0, done.stderr
    assert "resuming after step 4 of 12" in done.stdout
    same_run(place, alone_small)
    assert json.loads((place / ".lock").read_text())["attempt"] == 2


@pytest.mark.slow
def test_of_two_processes_one_is_killed_and_the_run_ends_bitwise(folder, emulator_url):
    straight = bucket_path_or_disk(f"{folder}/pair")
    assert [done.returncode for done in pair(folder, straight)] == [0, 0]
    place = bucket_path("--workdir", f"gs://{bucket.BUCKET}/pair")
    first, second = pair(folder, place, SIGNAL="SIGKILL:1:7")
    assert (first.returncode, second.returncode) == (43, -signal.SIGKILL), first.stderr
    done = pair(folder, place)
    assert [one.returncode for one in done] == [0, 0], done
    assert "resuming after step 4 of 12" in done[0].stdout
    same_run(place, straight)
    scores = [pair(folder, each, "evaluate", "--json") for each in (place, straight)]
    reports = [{**json.loads(first.stdout), "input": ""} for first, _ in scores]
    assert reports[0] == reports[1]


@pytest.mark.slow
def test_two_starts_at_once_are_one_run(folder, emulator_url, alone_small):
    place = bucket_path("--workdir", f"gs://{bucket.BUCKET}/twice")
    done = [finished(process, 120) for process in [start(folder, place), start(folder, place)]]
    assert [one.returncode for one in done] == [0, 0], done
    assert sorted("waiting for process" in one.stderr for one in done) == [False, True]
    assert sorted("step 12/12" in one.stdout for one in done) == [False, True]  # one of them trains
    same_run(place, alone_small)


@pytest.mark.slow
def test_a_writer_that_lost_its_claim_writes_nothing(folder, emulator_url, alone_small):
    place = bucket_path("--workdir", f"gs://{bucket.BUCKET}/lost")
    stopped = start(folder, place, SIGNAL="SIGSTOP:0:7")
    try:
        deadline = time.monotonic() + 60
        while "State:\tT" not in open(f"/proc/{stopped.pid}/status").read():
            assert time.monotonic() < deadline and stopped.poll() is None
            time.sleep(0.1)
        done = run(folder, place)
        assert done.returncode == 0 and "resuming after step 4" in done.stdout, done.stderr
        files = fsspec.filesystem("gcs")
        before = {name: files.info(name)["generation"] for name in files.find(str(place))}
        stopped.send_signal(signal.SIGCONT)
        ended = finished(stopped, 30)
    finally:
        stopped.kill()
    assert ended.returncode == 43, ended.stderr
    assert f"error: the run in {place} was taken over by process" in ended.stderr
    assert {name: files.info(name)["generation"] for name in files.find(str(place))} == before
    same_run(place, alone_small)


@pytest.mark.slow
@pytest.mark.parametrize(("rate", "seconds"), [(0.04, 0.0), (0.0, 0.05)], ids=["failing", "slow"])
def test_a_bucket_that_fails_or_is_slow(folder, emulator_url, alone_small, rate, seconds):
    """429, 500, and 500 after the work was done, now and then, by a seed."""
    place = bucket_path("--workdir", f"gs://{bucket.BUCKET}/trouble-{rate}")
    proxy = bucket.Proxy(emulator_url, rate=rate, seconds=seconds, seed=3)
    try:
        assert run(folder, place, url=proxy.url, SIGNAL="SIGKILL:0:7").returncode == -signal.SIGKILL
        done = run(folder, place, url=proxy.url)
        assert done.returncode == 0, done.stderr
        scored = run(folder, place, "evaluate", "--json", url=proxy.url)
        assert scored.returncode == 0, scored.stderr
    finally:
        proxy.close()
    assert bool(proxy.count[429] and proxy.count[500]) == bool(rate), proxy.count
    same_run(place, alone_small)


@pytest.mark.slow
def test_the_compilation_cache_may_be_on_the_bucket(folder, emulator_url):
    place = bucket_path("--workdir", f"gs://{bucket.BUCKET}/cached")
    cache = f"gs://{bucket.BUCKET}/jax"
    assert run(folder, place, JAX_COMPILATION_CACHE_DIR=cache).returncode == 0
    entries = names(bucket_path("--workdir", cache))
    assert any("jit_" in name for name in entries)
    again = run(folder, f"{place}-again", JAX_COMPILATION_CACHE_DIR=cache)
    assert again.returncode == 0, again.stderr
    assert names(bucket_path("--workdir", cache)) == entries
