"""The loss on the validation store while a run trains."""

from collections.abc import Callable
from typing import Any

from spiral_jax.data.store import TokenStore
from spiral_jax.data.tokenizers import Tokenizer
from spiral_jax.evaluation.config import VALIDATION, EvaluationConfig
from spiral_jax.evaluation.perplexity import WindowScorer, score
from spiral_jax.parallel.placed_model import PlacedModel
from spiral_jax.training.config import StepConfig


class Validation:
    """A `training.loop.Evaluation`."""

    values = VALIDATION

    def __init__(
        self,
        wanted: EvaluationConfig,
        config: StepConfig,
        placed: PlacedModel,
        store: TokenStore,
        tokenizer: Tokenizer,
        check: Callable[[], None] = lambda: None,
    ):
        """Compiles now rather than when it is first due: what does not fit is known before anything is trained.

        Args:
          wanted: how often, and how much of the store.
          config: the run's.
          placed: its model on its mesh.
          store: the validation text.
          tokenizer: of its tokens.
          check: called before every batch; raises to leave the rest.
        """
        self._check = check
        self._wanted, self._train, self._store = wanted, config.train, store
        self._separator_id = tokenizer.separator_id
        self._nats_of = WindowScorer(config, placed, ahead=True)

    def due(self, step: int) -> bool:
        return self._wanted.due(step, self._train.steps)

    def __call__(self, step: int, state: Any) -> dict[str, float]:
        result = score(
            self._nats_of,
            state.params,
            self._store,
            utf8_bytes=self._store.utf8_bytes,
            separator_id=self._separator_id,
            sequence_length=self._train.sequence_length,
            batch_size=self._nats_of.batch_size,
            max_batches=self._wanted.batches * self._train.accumulation,
            check=self._check,
        )
        return {"validation_loss": result.loss, "validation_bits_per_byte": result.bits_per_byte}
