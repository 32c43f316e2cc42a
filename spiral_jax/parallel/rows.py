"""Which rows of a batch a process has on its devices."""

import collections
from collections.abc import Mapping
from typing import Any

import jax

from spiral_jax.errors import SpiralError


def rows_of_process(sharding: jax.sharding.Sharding, batch_size: int) -> tuple[int, int]:
    """Which part of a batch this process has on its devices.

    Processes that differ only along an axis which does not cut the batch (`tensor`) have the same part.

    Args:
      sharding: of arrays [B, ..].
      batch_size: B.

    Returns:
      The index of the part and how many there are; parts are of one size.

    Raises:
      SpiralError: some processes have some of their rows in common.
    """
    spans: dict[int, set[tuple[int, int]]] = collections.defaultdict(set)
    shards: Mapping[Any, Any] = sharding.devices_indices_map((batch_size, 1))
    for device, index in shards.items():
        spans[device.process_index].add(index[0].indices(batch_size)[:2])
    parts = sorted({tuple(sorted(part)) for part in spans.values()})
    if sum(len(part) for part in parts) != len(set().union(*parts)) or len({len(part) for part in parts}) > 1:
        raise SpiralError(
            f"mesh cuts a batch so that its parts on the {len(spans)} processes overlap; allowed: mesh.tensor that "
            "divides a process's devices, or is a multiple of them"
        )
    return parts.index(tuple(sorted(spans[jax.process_index()]))), len(parts)
