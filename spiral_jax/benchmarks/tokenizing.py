"""How fast text becomes a store, beside what the tokenizers library does with the same documents."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from spiral_jax.corpus.prepare import prepare_folder
from spiral_jax.corpus.sources import Source, find_sources
from spiral_jax.corpus.workers import num_workers, worker_command
from spiral_jax.data.config import DataConfig

# The library alone, in a process of its own: it counts the threads of its pool once.
_LIBRARY = """
import sys, time, tokenizers
tokenizer = tokenizers.Tokenizer.from_file(sys.argv[1])
tokenizer.encode_special_tokens = True
texts = [open(path, encoding="utf-8", newline="").read() for path in sys.argv[2:]]
begin = time.perf_counter()
encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
print(time.perf_counter() - begin, sum(len(encoding) for encoding in encodings))
"""


def measure(
    texts_paths: Sequence[str | os.PathLike], tokenizer_file: str | os.PathLike, repeats: int = 3
) -> dict[str, float]:
    """Times both on the cores that this process may use, one after the other, several times.

    The library encodes the whole documents, read before the clock starts, in one call; we make a store of them, from
    finding the files to the store under its name.

    Args:
      texts_paths: text files, folders or patterns.
      tokenizer_file: a `tokenizer.json`.
      repeats: how often.

    Returns:
      Medians: seconds and bytes per second of both, their ratio, and the seconds a worker needs to start, which are
      within ours.

    Raises:
      SpiralError: text or tokenizer that cannot be read.
    """
    sources = find_sources([str(path) for path in texts_paths], format="text", field="--input")
    num_bytes = sum(source.size for source in sources)
    config = DataConfig(
        paths=tuple(source.path for source in sources),
        format="text",
        tokenizer=str(tokenizer_file),
        validation_fraction=0.0,
    )
    ours, library, starts = [], [], []
    with tempfile.TemporaryDirectory() as scratch:
        for repeat in range(repeats):
            library.append(_time_library(sources, tokenizer_file))
            begin = time.perf_counter()
            prepare_folder(config, Path(scratch, str(repeat)), report=lambda line: None)
            ours.append(time.perf_counter() - begin)
            starts.append(_time_start(Path(scratch, str(repeat))))
    seconds, library_seconds = statistics.median(ours), statistics.median(library)
    return {
        "bytes": num_bytes,
        "documents": len(sources),
        "workers": num_workers(0),
        "seconds": seconds,
        "bytes_per_second": num_bytes / seconds,
        "library_seconds": library_seconds,
        "library_bytes_per_second": num_bytes / library_seconds,
        "share_of_library_speed": library_seconds / seconds,
        "worker_start_seconds": statistics.median(starts),
    }


def _time_library(sources: Sequence[Source], tokenizer_file: str | os.PathLike) -> float:
    command = [sys.executable, "-c", _LIBRARY, str(tokenizer_file), *(source.path for source in sources)]
    return float(subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout.split()[0])


def _time_start(tokenizer_folder: Path) -> float:
    """Seconds until a worker could begin: the interpreter, the modules, the tokenizer."""
    command, environment = worker_command()
    program = "import sys, spiral_jax.corpus.workers as workers; workers.load_tokenizer(sys.argv[1])"
    begin = time.perf_counter()
    subprocess.run([*command[:2], "-c", program, str(tokenizer_folder)], check=True, env=environment)
    return time.perf_counter() - begin
