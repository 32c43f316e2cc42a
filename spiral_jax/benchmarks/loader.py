"""How many tokens per second the loader makes training batches of, from a store of this machine or behind a URL."""

import dataclasses
import statistics
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from spiral_jax.data.pipeline import TrainBatches, WindowOrder, WindowReader, train_batches
from spiral_jax.data.prepared import open_source
from spiral_jax.data.storage import Storage
from spiral_jax.data.store import TokenStore
from spiral_jax.data.store_writer import StoreWriter
from spiral_jax.data.tokenizers import ByteTokenizer
from spiral_jax.data.windows import TokenSource, num_windows
from spiral_jax.errors import SpiralError

_SYNTHETIC_TOKENS = 2**25
_WARM_UP_SECONDS = 1.0
_RETRY_SECONDS = 10.0  # a measurement does not wait for a server as a run would


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
      place: the store, a path or URL.
      settings: how to drive it.

    Returns:
      The numbers that the command prints.

    Raises:
      SpiralError: no such store, or it cannot be read.
    """
    return _measure(open_source(place), settings)[0]


def measure_remote(url: str, local_place: str, settings: LoaderSettings) -> dict[str, Any]:
    """Times the loader on a store behind a URL, and compares every batch with that of the same store as a path.

    Args:
      url: where the store is read.
      local_place: the same store, a path.
      settings: how to drive the loader.

    Returns:
      The numbers that the command prints.

    Raises:
      SpiralError: no such store, or the batches are not those of the local one.
    """
    local = open_source(local_place)
    report, checksums = _measure(open_source(url, Storage(retry_seconds=_RETRY_SECONDS)), settings)
    with _batches(local, settings) as batches:
        for step, checksum in enumerate(checksums):
            if _checksum(next(batches)) != checksum:
                raise SpiralError(
                    f"{url}: the batch of step {step} is not that of {local_place}; allowed: the same tokens"
                )
    return {**report, "batches_equal_to_local": len(checksums)}


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
    vocab_size = source.manifest.vocab_size if isinstance(source, TokenStore) else 2**31
    return train_batches(
        WindowReader([source], sequence_length=settings.sequence_length, vocab_size=vocab_size),
        WindowOrder([windows], batch_size=settings.batch_size, seed=0),
        read_threads=settings.read_threads,
        prefetch_batches=settings.prefetch_batches,
    )


def _checksum(tokens_BxW: np.ndarray) -> int:
    return zlib.crc32(tokens_BxW.data)


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
