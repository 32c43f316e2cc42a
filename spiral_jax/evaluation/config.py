"""When and how much a run is evaluated while it trains."""

import dataclasses

from spiral_jax.errors import require


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation on the validation store.

    Attributes:
      every_steps: steps between evaluations; the last step is always evaluated. 0 for that one only.
      batches: batches of `train.batch_size` windows per evaluation, from the start of the store; 0 for all of it.
        Bits per byte then take the store's mean bytes per token.
    """

    every_steps: int = 1000
    batches: int = 0

    def __post_init__(self):
        for field in ("every_steps", "batches"):
            require(getattr(self, field) >= 0, f"evaluation.{field}", getattr(self, field), "0 or more")
