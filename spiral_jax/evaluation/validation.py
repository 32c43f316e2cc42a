"""The loss on the validation store while a run trains."""

from typing import Any

from spiral_jax.data.store import TokenStore
from spiral_jax.data.tokenizers import Tokenizer
from spiral_jax.evaluation.config import EvaluationConfig
from spiral_jax.evaluation.perplexity import score
from spiral_jax.training.config import TrainConfig
from spiral_jax.training.step import Program


class Validation:
    """A `training.loop.Evaluation`."""

    def __init__(
        self, wanted: EvaluationConfig, train: TrainConfig, program: Program, store: TokenStore, tokenizer: Tokenizer
    ):
        """Compiles now rather than when it is first due: what does not fit is known before anything is trained.

        Args:
          wanted: how often, and how much of the store.
          train: steps, length, and the micro-batch that fits.
          program: the run's.
          store: the validation text.
          tokenizer: of its tokens.
        """
        self._wanted, self._train, self._program, self._store = wanted, train, program, store
        self._separator_id = tokenizer.separator_id
        # A micro-batch, as what fits in training fits in evaluation.
        self._batch_size = train.batch_size // train.accumulation
        self._eval_step = program.compile_eval_step(self._batch_size, train.sequence_length)

    def due(self, step: int) -> bool:
        return self._wanted.due(step, self._train.steps)

    def __call__(self, step: int, state: Any) -> dict[str, float]:
        result = score(
            self._eval_step,
            state.params,
            self._store,
            utf8_bytes=self._store.utf8_bytes,
            separator_id=self._separator_id,
            sequence_length=self._train.sequence_length,
            batch_size=self._batch_size,
            put=self._program.put,
            max_batches=self._wanted.batches * self._train.accumulation,
        )
        return {"validation_loss": result.loss, "validation_bits_per_byte": result.bits_per_byte}
