"""When a run is saved."""

from collections.abc import Mapping, Sequence
from typing import Any

from spiral_jax.run.checkpoint import Checkpoints
from spiral_jax.training.divergence import Skips


class Saves:
    """Saves a run's state when it is due: a `training.loop.Saving`."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        last_step: int,
        meta: Mapping[str, Any],
        fingerprints: Sequence[str],
        skips: Skips,
    ):
        """`meta` is JSON to keep with every checkpoint; `fingerprints` are those of the training tokens."""
        self._checkpoints, self._last_step, self._skips = checkpoints, last_step, skips
        self._meta, self._fingerprints = meta, list(fingerprints)

    def due(self, step: int) -> bool:
        return self._checkpoints.due(step, self._last_step)

    def __call__(self, step: int, state: Any) -> None:
        data = {"step": step, "fingerprints": self._fingerprints}
        self._skips.saving(step)
        self._checkpoints.save(step, state, {**self._meta, "data": data, "divergence": self._skips.to_json()})
