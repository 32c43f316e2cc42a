"""Times the loader: training batches from a store of this machine, or over HTTP from a slow, failing server."""

import contextlib
import dataclasses
import json
import statistics
import subprocess
import sys
import time
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from spiral_jax.benchmarks.range_server import STATS
from spiral_jax.corpus.store_writer import StoreWriter
from spiral_jax.data.pipeline import TrainBatches, WindowOrder, train_batches
from spiral_jax.data.prepared import open_source
from spiral_jax.data.storage import Storage
from spiral_jax.data.store import TokenStore
from spiral_jax.data.tokenizers import ByteTokenizer
from spiral_jax.data.windows import TokenSource, num_windows
from spiral_jax.errors import SpiralError

_SYNTHETIC_TOKENS = 2**25
_WARM_UP_SECONDS = 1.0
# Reads that are in flight when the server stops give up soon, and before they would complain.
_RETRY_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class LoaderSettings:
    """How the loader is driven, as in a training configuration, and for how long."""

    sequence_length: int
    batch_size: int
    read_threads: int
    prefetch_batches: int
    seconds: float
    repeats: int


def measure(place: str, settings: LoaderSettings) -> dict[str, Any]:
    """Times the loader on a store.

    Args:
      place: The store, a path or URL.
      settings: How to drive it.

    Returns:
      The numbers that the command prints.

    Raises:
      SpiralError: No such store, or it cannot be read.
    """
    return _measure(open_source(place, Storage()), settings)[0]


def measure_remote(place: str, settings: LoaderSettings, *, latency_ms: float, error_rate: float) -> dict[str, Any]:
    """Times the loader on a store of this machine read over HTTP, and compares every batch with the local one.

    Args:
      place: The store, a path.
      settings: How to drive it.
      latency_ms: How long the server waits before each answer.
      error_rate: Share of requests that fail.

    Returns:
      The numbers that the command prints; `requests` is what the server saw while batches were read.

    Raises:
      SpiralError: No such store, or the batches are not those of the local store.
    """
    local = open_source(place)
    with _server(place, latency_ms, error_rate) as url:
        remote = open_source(url, Storage(_RETRY_SECONDS))
        before = _stats(url)
        report, checksums = _measure(remote, settings)
        after = _stats(url)
    requests = {name: count - before.get(name, 0) for name, count in after.items() if count > before.get(name, 0)}
    with _batches(local, settings) as batches:
        for step, checksum in enumerate(checksums):
            if _checksum(next(batches)) != checksum:
                raise SpiralError(f"{url}: the batch of step {step} is not that of {place}; allowed: the same tokens")
    setting = {"latency_ms": latency_ms, "error_rate": error_rate}
    return {**report, **setting, "requests": requests, "batches_equal_to_local": len(checksums)}


def write_synthetic_store(folder: Path) -> None:
    """Writes a store of random bytes."""
    generator = np.random.default_rng(0)
    with StoreWriter(folder, ByteTokenizer()) as writer:
        for _ in range(2**5):
            tokens_N = generator.integers(256, size=_SYNTHETIC_TOKENS // 2**5, dtype=np.int64)
            writer.add(tokens_N, utf8_bytes=len(tokens_N))


def _measure(source: TokenSource, settings: LoaderSettings) -> tuple[dict[str, Any], list[int]]:
    """The numbers, and a checksum per batch."""
    checksums: list[int] = []
    walls, cpus, steps = [], [], []
    with _batches(source, settings) as batches:
        for seconds in (min(_WARM_UP_SECONDS, settings.seconds), *[settings.seconds] * settings.repeats):
            first, wall, cpu = len(checksums), time.perf_counter(), time.process_time()
            while time.perf_counter() - wall < seconds or len(checksums) == first:
                checksums.append(_checksum(next(batches)))
            walls.append(time.perf_counter() - wall)
            cpus.append(time.process_time() - cpu)
            steps.append(len(checksums) - first)
    # The first one is the warm-up.
    windows = [count * settings.batch_size for count in steps[1:]]
    tokens = [count * settings.sequence_length for count in windows]
    return {
        "store": source.name,
        "store_tokens": source.num_tokens,
        **dataclasses.asdict(settings),
        "steps": steps[1:],
        "tokens_per_second": _spread([n / wall for n, wall in zip(tokens, walls[1:], strict=True)]),
        "tokens_per_core_second": _spread([n / cpu for n, cpu in zip(tokens, cpus[1:], strict=True)]),
        "microseconds_per_window": _spread([1e6 * wall / n for n, wall in zip(windows, walls[1:], strict=True)]),
        "cores_used": _spread([cpu / wall for cpu, wall in zip(cpus[1:], walls[1:], strict=True)]),
    }, checksums


def _batches(source: TokenSource, settings: LoaderSettings) -> TrainBatches:
    windows = num_windows(source, settings.sequence_length)
    return train_batches(
        [source],
        WindowOrder([windows], batch_size=settings.batch_size, seed=0),
        sequence_length=settings.sequence_length,
        vocab_size=source.manifest.vocab_size if isinstance(source, TokenStore) else 2**31,
        read_threads=settings.read_threads,
        prefetch_batches=settings.prefetch_batches,
    )


def _checksum(batch: dict[str, np.ndarray]) -> int:
    return zlib.crc32(batch["tokens"])


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


@contextlib.contextmanager
def _server(folder: str, latency_ms: float, error_rate: float) -> Iterator[str]:
    """A server in a process of its own, so that its work is not counted as the loader's; yields its URL."""
    command = [sys.executable, "-m", "spiral_jax.benchmarks.range_server", folder]
    command += [f"--latency_ms={latency_ms}", f"--error_rate={error_rate}"]
    # It ends with its standard input, also when this process is killed.
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        url = process.stdout.readline().strip()
        if not url:
            raise RuntimeError("the range server did not start")
        yield url
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait()


def _stats(url: str) -> dict[str, int]:
    with urllib.request.urlopen(url + STATS) as answer:
        return json.load(answer)
