"""The part of a batch that a process has."""

import contextlib
from types import SimpleNamespace

import jax
import pytest

from spiral_jax.errors import SpiralError
from spiral_jax.parallel.rows import rows_of_process


def test_the_part_of_a_batch_that_a_process_has():
    def parts(processes_of_rows):
        """(index, count) of each process; `processes_of_rows`: of each shard of rows, the processes that hold it."""
        size = len(processes_of_rows)
        shards = {
            Device(process): (slice(i, i + 1), slice(None))
            for i, processes in enumerate(processes_of_rows)
            for process in processes
        }
        sharding = SimpleNamespace(devices_indices_map=lambda shape: shards)
        found = []
        for process in sorted(set().union(*processes_of_rows)):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(jax, "process_index", lambda process=process: process)
                with contextlib.suppress(SpiralError):
                    found.append(rows_of_process(sharding, size))
        return found

    assert parts([[0], [0], [1], [1]]) == [(0, 2), (1, 2)]
    assert parts([[1], [0], [1], [0]]) == [(1, 2), (0, 2)]  # interleaved, as on a torus
    assert parts([[0, 1], [0, 1]]) == [(0, 1), (0, 1)]  # tensor across processes
    assert parts([[0, 1], [2, 3]]) == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert parts([[0], [0, 1], [1]]) == []  # refused


class Device:
    """A device, hashable by itself."""

    def __init__(self, process_index: int):
        self.process_index = process_index
