"""The benchmark command: that it measures what it says, not how fast anything is."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from verbs import call

from spiral_jax import bench, benchmarks
from spiral_jax.benchmarks import loader
from spiral_jax.corpus.store_writer import StoreWriter
from spiral_jax.data.store import TokenStore
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
    flags = (f"--store={store}", "--remote", "--latency_ms=1", "--error_rate=0.05", *QUICK)
    assert call(bench, *flags) == (0, "")
    report = json.loads(capsys.readouterr().out)
    assert report["batches_equal_to_local"] >= sum(report["steps"]) > 0
    assert "HEAD" not in report["requests"] and any(name.startswith("fault") for name in report["requests"])
    assert report["requests"]["GET"] >= 4 * report["batches_equal_to_local"]

    other, opened = write(tmp_path / "other", seed=1), loader.open_source
    monkeypatch.setattr(loader, "open_source", lambda place, *more: opened(place if more else str(other), *more))
    status, errors = call(bench, *flags)
    assert status == 2 and "batch of step 0 is not that of" in errors and errors.count("\n") == 1


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
        (["--store=gs://bucket/store", "--remote"], "--remote"),
        (["--subject=tokenizer"], "--input"),
        (["--subject=tokenizer", "--input=/no/file", "--tokenizer=/no/tokenizer"], "/no/file"),
        (["--subject=model"], "subject"),
        (["--batch_size=0"], "batch_size"),
    ],
)
def test_mistakes_are_one_line(flags, named):
    status, errors = call(bench, *flags)
    assert status == 2 and named in errors and errors.count("\n") == 1, errors


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
