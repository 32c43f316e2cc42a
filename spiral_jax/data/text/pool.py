"""Runs work units, in this process or on several."""

import collections
import contextlib
import dataclasses
import itertools
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import spiral_jax
from spiral_jax.data.text.parts import InvalidInput, Recipe, encode_unit
from spiral_jax.data.text.spans import Invalid
from spiral_jax.data.text.units import Unit
from spiral_jax.data.text.worker import receive, send, unit_message
from spiral_jax.data.tokenizers import load_tokenizer
from spiral_jax.errors import SpiralError

# One to work on and one to go on with.
_UNITS_PER_WORKER = 2
_SECONDS_BETWEEN_CHECKS = 0.2


@dataclasses.dataclass(frozen=True)
class Job:
    """What a worker needs to know besides its units.

    Attributes:
      tokenizer: Folder of the tokenizer.
      parts: Folder that parts are written to.
      recipe: How text becomes tokens.
    """

    tokenizer: Path
    parts: Path
    recipe: Recipe


def num_workers(configured: int) -> int:
    """How many processes are to tokenise.

    Args:
      configured: `data.workers`; 0 for as many as this process may use cores.
    """
    return configured or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def run_units(job: Job, units: Iterable[Unit], workers: int, check: Callable[[], None]) -> Iterator[Unit]:
    """Tokenises units into parts; at most two per worker are in memory at a time.

    Args:
      job: What is the same for all.
      units: The work; asked for as workers come free.
      workers: Number of processes. With one of them, or one unit, this process does the work.
      check: Called now and then; raises to stop the work.

    Yields:
      Units whose parts are finished, in the order they are.

    Raises:
      SpiralError: The first that a unit raised, or a worker died.
    """
    units = iter(units)
    first = list(itertools.islice(units, 2))
    units = itertools.chain(first, units)
    if workers > 1 and len(first) > 1:
        with _Pool(job, workers) as pool:
            yield from pool.run(units, check)
        return
    tokenizer = load_tokenizer(job.tokenizer) if first else None
    for unit in units:
        check()
        encode_unit(unit, tokenizer, job.recipe, job.parts, check)
        yield unit


def worker_command() -> tuple[list[str], dict[str, str]]:
    """How a worker is started: command line and environment."""
    package = str(Path(spiral_jax.__file__).parents[1])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    single = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | single
    # -P: a file in the current folder must not stand in for a module.
    return [sys.executable, "-P", "-m", "spiral_jax.data.text.worker"], environment


class _Pool:
    """Worker processes, started as there is work for them."""

    def __init__(self, job: Job, workers: int):
        self._job = job
        self._size = workers
        self._processes: list[subprocess.Popen] = []
        self._queues: dict[subprocess.Popen, collections.deque[Unit]] = {}
        self._results: queue.SimpleQueue = queue.SimpleQueue()

    def __enter__(self) -> "_Pool":
        return self

    def __exit__(self, *exception) -> None:
        # The end of its input ends a worker, also in the middle of a unit.
        for process in self._processes:
            with contextlib.suppress(OSError):
                process.stdin.close()
        for process in self._processes:
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def run(self, units: Iterator[Unit], check: Callable[[], None]) -> Iterator[Unit]:
        for unit in units:
            while (process := self._free()) is None:
                yield from self._finished(check)
            check()
            self._send(process, unit_message(unit), unit.content)
            self._queues[process].append(unit)
        while any(self._queues.values()):
            yield from self._finished(check)

    def _free(self) -> subprocess.Popen | None:
        """The worker with the least to do, a new one if all have something, None if all have enough."""
        least = min(self._processes, key=lambda process: len(self._queues[process]), default=None)
        if least is not None and not self._queues[least]:
            return least
        if len(self._processes) < self._size:
            return self._start()
        return least if len(self._queues[least]) < _UNITS_PER_WORKER else None

    def _start(self) -> subprocess.Popen:
        command, environment = worker_command()
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            process_group=0,  # Ctrl-C is for the parent, which decides what becomes of the workers
        )
        self._processes.append(process)
        self._queues[process] = collections.deque()
        threading.Thread(target=self._listen, args=(process,), daemon=True).start()
        job = {
            "tokenizer": str(self._job.tokenizer),
            "parts": str(self._job.parts),
            "recipe": dataclasses.asdict(self._job.recipe),
        }
        self._send(process, job)
        return process

    def _send(self, process: subprocess.Popen, message: dict, content: bytes | None = None) -> None:
        try:
            send(process.stdin, message, content)
        except BrokenPipeError:
            self._died(process)

    def _listen(self, process: subprocess.Popen) -> None:
        with process.stdout:
            while (received := receive(process.stdout)) is not None:
                self._results.put((process, received[0]))
        self._results.put((process, None))

    def _finished(self, check: Callable[[], None]) -> Iterator[Unit]:
        """Waits a while for a result."""
        check()
        try:
            process, result = self._results.get(timeout=_SECONDS_BETWEEN_CHECKS)
        except queue.Empty:
            return
        if result is None:
            self._died(process)
        unit = self._queues[process].popleft()
        if "invalid" in result:
            raise InvalidInput(Invalid(**result["invalid"]))
        if "error" in result:
            raise SpiralError(result["error"])
        if "defect" in result:
            raise RuntimeError(f"a worker failed on unit {unit.name}:\n{result['defect']}")
        yield unit

    def _died(self, process: subprocess.Popen) -> None:
        status = process.wait()
        reason = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        hint = " (the machine may be out of memory: fewer data.workers need less)" if status == -signal.SIGKILL else ""
        raise SpiralError(f"data.workers: a worker ended with {reason}{hint}; run it again to go on")
