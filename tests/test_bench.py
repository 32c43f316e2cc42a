"""The benchmark command: that it measures what it says, not how fast anything is."""

import contextlib
import http.client
import importlib.util
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from types import SimpleNamespace

import numpy as np
import pytest
import range_server
from range_server import RangeServer, random_faults
from verbs import call

from spiral_jax import bench, benchmarks
from spiral_jax.benchmarks import loader, nanodo, training
from spiral_jax.benchmarks.families import models
from spiral_jax.benchmarks.peer import gpt_neox
from spiral_jax.data.store import TokenStore
from spiral_jax.data.store_writer import StoreWriter
from spiral_jax.data.tokenizers import ByteTokenizer

QUICK = ("--seconds=0.1", "--repeats=2", "--sequence_length=64", "--batch_size=4", "--read_threads=2", "--json")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write(tmp_path_factory.mktemp("bench") / "store", seed=0)


def write(folder, seed):
    with StoreWriter(folder, ByteTokenizer()) as writer:
        writer.add(np.random.default_rng(seed).integers(256, size=10_000), utf8_bytes=10_000)
    return folder


def test_loader(store, capsys):
    assert call(bench, f"--store={store}", *QUICK) == (0, "")
    report = json.loads(capsys.readouterr().out)
    assert report["subject"] == "loader" and report["store_tokens"] == 10_001
    assert len(report["steps"]) == 2 and report["prefetch_batches"] == 4
    rate, window = report["tokens_per_second"], report["microseconds_per_window"]
    assert rate["min"] <= rate["median"] <= rate["max"]
    assert rate["max"] * window["min"] / 1e6 == pytest.approx(64)
    assert rate["max"] <= max(report["steps"]) * 4 * 64 / 0.1
    assert report["machine"]["cores"] >= 1 and report["machine"]["numpy"] == np.__version__


def test_remote_loader_is_compared_with_the_local_one(store, capsys, monkeypatch, tmp_path):
    pytest.importorskip("aiohttp")
    with RangeServer(store, latency_seconds=0.001, fault=random_faults(0.05, seed=0)) as server:
        flags = (f"--store={store}", f"--remote={server.url}", *QUICK)
        assert call(bench, *flags) == (0, "")
        report = json.loads(capsys.readouterr().out)
        assert report["store"] == server.url and report["batches_equal_to_local"] >= sum(report["steps"]) > 0
        # While batches are read, nothing but tokens is asked for, and some of it in vain.
        first = next(i for i, (request, _) in enumerate(server.log) if request.path == "/tokens.bin" and request.start)
        requests = server.log[first:]
        assert {request.method for request, _ in requests} == {"GET"} and any(fault for _, fault in requests)
        assert len(requests) >= 4 * report["batches_equal_to_local"]

        other, opened = write(tmp_path / "other", seed=1), loader.open_source
        monkeypatch.setattr(
            loader, "open_source", lambda place, *more: opened(str(other) if place == str(store) else place, *more)
        )
        status, errors = call(bench, *flags)
        assert status == 2 and "batch of step 0 is not that of" in errors and errors.count("\n") == 1


def test_the_range_server_is_a_command(store):
    """As CONTRIBUTING.md gives it: prints a URL, serves until its input ends, and counts the requests."""
    command = [sys.executable, range_server.__file__, store, "--latency_ms=50", "--error_rate=0.5"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    url, statuses, begin = process.stdout.readline().strip(), [], time.monotonic()
    for _ in range(20):
        # What is left of the faults besides errors: connections that break, answers cut short, one that hangs.
        with contextlib.suppress(OSError, http.client.HTTPException):
            try:
                with urllib.request.urlopen(f"{url}/manifest.json", timeout=1) as answer:
                    assert json.load(answer)["num_tokens"] == 10_001
                    statuses.append(200)
            except urllib.error.HTTPError as error:
                statuses.append(error.code)
    assert time.monotonic() - begin > 20 * 0.05
    stats = json.loads(process.communicate(timeout=60)[0])
    assert stats["GET"] == 20 and {200, 500, 503} >= set(statuses) > {200}
    assert statuses.count(500) == stats.get("fault 500", 0) and statuses.count(503) == stats.get("fault 503", 0)


def test_the_synthetic_store_is_a_store(tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "_SYNTHETIC_TOKENS", 2**10)
    loader.write_synthetic_store(tmp_path / "synthetic")
    TokenStore.open(tmp_path / "synthetic").verify()


def test_tokenizer(tmp_path, capsys, monkeypatch):
    (tmp_path / "text").touch(), (tmp_path / "tokenizer.json").touch()
    asked = []
    fake = SimpleNamespace(measure=lambda *given: asked.append(given) or {"bytes_per_second": 3e6})
    monkeypatch.setattr(benchmarks, "tokenizing", fake, raising=False)
    flags = (f"--input={tmp_path}/text", f"--tokenizer={tmp_path}/tokenizer.json", "--repeats=5")
    assert call(bench, "--subject=tokenizer", *flags) == (0, "")
    assert asked == [([f"{tmp_path}/text"], f"{tmp_path}/tokenizer.json", 5)]
    assert "bytes per second         3,000,000" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--store=/no/such/store"], "/no/such/store"),
        (["--store=gs://bucket/store", "--remote=http://localhost/store"], "--remote"),
        (["--remote=http://localhost/store"], "--store is ''"),
        (["--store=/a/store", "--remote=/a/store"], "--remote is '/a/store'"),
        (["--subject=tokenizer"], "--input"),
        (["--subject=tokenizer", "--input=/no/file", "--tokenizer=/no/tokenizer"], "/no/file"),
        (["--subject=model"], "subject"),
        (["--batch_size=0"], "batch_size"),
    ],
)
def test_mistakes_are_one_line(flags, named):
    status, errors = call(bench, *flags)
    assert status == 2 and named in errors and errors.count("\n") == 1, errors


@pytest.fixture
def tiny(monkeypatch):
    """A size that compiles in seconds."""
    monkeypatch.setitem(training.SIZES, "tiny", training.Size(16, 2, 6, 32, 2, 8))


def flops_per_token(width, layers, vocab_size, length):
    """Of a transformer's step, by hand: two per multiply-add, forward and twice that backward."""
    causal_pairs = (length + 1) / 2
    return 3 * 2 * (layers * (12 * width**2 + 2 * width * causal_pairs) + width * vocab_size)


def test_training(tiny):
    settings = training.TrainingSettings(sizes=("tiny",), repeats=2, seconds=0.01, unroll=False)
    report = training.measure(settings, report=lambda line: None)
    row = report["tiny vanilla"]
    assert row["slowest"] <= row["lower_quartile"] <= row["tokens_per_second"] <= row["fastest"]
    assert row["first_step_seconds"] > 0
    assert row["gflops"] * 1e9 == pytest.approx(row["tokens_per_second"] * flops_per_token(16, 6, 32, 8))
    assert row["of_sgemm"] == pytest.approx(row["gflops"] / report["tiny sgemm"]["gflops"], rel=1e-6)


@pytest.mark.slow
def test_training_beside_torch(tiny):
    """The peer is a GPT-NeoX of the same shape, trained on the same windows: its loss falls, too."""
    pytest.importorskip("transformers")
    settings = training.TrainingSettings(sizes=("tiny",), families=("vanilla", "spiral_b"), peers=("torch",), repeats=1)
    report = training.measure(settings, report=lambda line: None)
    ours, theirs = report["tiny vanilla"], report["tiny torch"]
    assert ours["over_torch"] == pytest.approx(ours["tokens_per_second"] / theirs["tokens_per_second"], rel=1e-6)
    assert theirs["gflops"] / theirs["tokens_per_second"] == pytest.approx(ours["gflops"] / ours["tokens_per_second"])
    assert "over_torch" in report["tiny spiral_b"] and report["tiny torch sgemm"]["gflops"] > 1


NANODO = """
import dataclasses
from flax import linen as nn

@dataclasses.dataclass
class DoConfig:
    D: int; H: int; L: int; N: int; V: int; F: int; fsdp_enabled: bool

class TransformerDo(nn.Module):
    docfg: DoConfig

    @nn.compact
    def __call__(self, tokens):
        assert dataclasses.asdict(self.docfg) == dict(D=16, H=2, L=8, N=6, V=32, F=64, fsdp_enabled=False)
        embed = nn.Embed(self.docfg.V, self.docfg.D)
        return embed.attend(embed(tokens))
"""


def test_training_beside_nanodo(tmp_path, monkeypatch):
    """A model with nanodo's interface, from a folder importable for a moment only, gets our shape and learns."""
    (tmp_path / "nanodo").mkdir()
    (tmp_path / "nanodo" / "model.py").write_text(NANODO)
    monkeypatch.delitem(sys.modules, "nanodo", raising=False)
    before = list(sys.path)
    model, windows_BxW = models(width=16, heads=2, layers=6, vocab_size=32)["vanilla"], np.arange(18).reshape(2, 9)
    run = nanodo.train_step(str(tmp_path), model, windows_BxW)
    assert sys.path == before

    def nats(state):
        table_VxD = np.asarray(state[0]["Embed_0"]["embedding"], np.float64)
        logits_BxLxV = table_VxD[windows_BxW[:, :-1]] @ table_VxD.T
        of_targets_BxL = np.take_along_axis(logits_BxLxV, windows_BxW[:, 1:, None], axis=2)[..., 0]
        return (np.log(np.exp(logits_BxLxV).sum(-1)) - of_targets_BxL).mean()

    first = nats(run())
    for _ in range(50):
        last = nats(run())
    assert last < first - 0.05


@pytest.mark.slow
def test_peer_has_our_shape():
    pytest.importorskip("transformers")
    model = models(width=16, heads=2, layers=6, vocab_size=32)["vanilla"]
    assert sum(p.numel() for p in gpt_neox(model, 8).parameters()) == model.total_parameters


@pytest.mark.slow
def test_operations_are_those_of_torch(tiny):
    """Both sides give the same gradients, so that they do the same work."""
    pytest.importorskip("transformers")
    from spiral_jax.benchmarks import operations

    found = operations._operations(training.SIZES["tiny"])
    for name, operation in found.items():
        if name == "clip_and_adamw":
            continue
        (_, ours), theirs = operation.ours(), operation.torch()
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(np.asarray(a), b.numpy(), atol=1e-5, rtol=1e-4, err_msg=name)
    report = operations.measure(("tiny",), repeats=1, report=lambda line: None)
    flops = 6 * 2 * 8 * 16 * 48 * 6
    assert report["tiny qkv"]["limit_ms"] == pytest.approx(flops / report["sgemm_gflops"] / 1e6)
    assert all(row["ours_ms"] > 0 and row["torch_ms"] > 0 for name, row in report.items() if name.startswith("tiny"))


@pytest.mark.parametrize("flag", ["--sizes=3m", "--families=spiral", "--peers=jax"])
def test_bad_settings_of_training(flag):
    status, errors = call(bench, "--subject=training", flag)
    name, _, value = flag.partition("=")
    assert status == 2 and errors.startswith(f"error: {name} is {value!r}; allowed: ") and errors.count("\n") == 1


@pytest.mark.parametrize("folder", ["", "no/such"])
def test_a_peer_without_its_folder_is_named(folder):
    status, errors = call(bench, "--subject=training", "--peers=nanodo", f"--nanodo={folder}")
    assert status == 2 and errors.startswith(f"error: --nanodo is {folder!r}; allowed: ") and errors.count("\n") == 1


def test_a_peer_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for subject in ("training", "decoding"):
        status, errors = call(bench, f"--subject={subject}", "--peers=torch")
        assert status == 2 and "torch is not installed; pip install 'spiral_jax[hf]'" in errors


@pytest.mark.slow
def test_decoding(capsys):
    """Four models at both batch sizes, each with its memory and its work."""
    status, errors = call(
        bench, "--subject=decoding", "--width=64", "--layers=6", "--new_tokens=3", "--prompt_tokens=8", "--repeats=1",
        "--json",
    )  # fmt: skip
    report = json.loads(capsys.readouterr().out)
    assert status == 0 and errors.count("compiling") == 8
    for batch in (1, 8):
        rows = [report[f"{name} x{batch}"] for name in ("vanilla", "loop", "spiral_b", "spiral_l")]
        assert [row["layer_runs_per_token"] for row in rows] == [6, 6, 5.75, 5.875]
        assert rows[0]["bytes_per_token"] == rows[1]["bytes_per_token"]
        assert rows[0]["bytes_per_token"] == pytest.approx(2 * 6 * 64 * 4, rel=1e-3)
        assert rows[0]["of_ceiling"] == 1
        assert all(row["tokens_per_second"] > 0 and row["uncached_tokens_per_second"] > 0 for row in rows)


@pytest.mark.parametrize("flag", ["--texts=0", "--layers=7", "--width=100", "--new_tokens=1", "--prompt_tokens=2"])
def test_bad_settings_of_decoding(flag):
    status, errors = call(bench, "--subject=decoding", flag)
    assert (
        status == 2
        and errors.startswith(f"error: {flag.partition('=')[0]}")
        and "allowed" in errors
        and errors.count("\n") == 1
    )
