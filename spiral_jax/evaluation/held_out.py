"""What a model makes of examples that were held out: its loss, and its answers by what they depend on."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spiral_jax.data.examples import Examples, ExampleStream, stacked
from spiral_jax.evaluation.config import VALIDATION, EvaluationConfig
from spiral_jax.evaluation.rows import jit_on_rows
from spiral_jax.parallel.placed_model import PlacedModel
from spiral_jax.progress import Progress, Report
from spiral_jax.training.config import StepConfig
from spiral_jax.training.loss import nats_and_greedy


@dataclasses.dataclass(frozen=True)
class ExampleScore:
    """What examples cost, and how many answers were right.

    Attributes:
      nats_N: of each example -log p of its targets times their weights, summed.
      weights_N: of each example the sum of its weights.
      by_group: by group, how many answers were the model's likeliest, and how many were asked for (weight above 0).
    """

    nats_N: np.ndarray
    weights_N: np.ndarray
    by_group: dict[int, tuple[int, int]]

    @property
    def loss(self) -> float:
        """Nats, the mean over all weights."""
        return float(np.sum(self.nats_N) / np.sum(self.weights_N))

    @property
    def accuracy(self) -> float:
        """The share of answers that were right, each counted alike."""
        correct, asked = np.sum(list(self.by_group.values()), axis=0)
        return float(correct / asked)


class ExampleScorer:
    """Nats and right answers at every position of a batch, its parameters gathered as in training."""

    def __init__(self, config: StepConfig, placed: PlacedModel, *, ahead: bool = False):
        """Builds the step.

        Args:
          config: the run's; a batch is one of its micro-batches.
          placed: its model on its mesh.
          ahead: whether to compile now rather than at the first batch.
        """
        train = config.train
        self.batch_size, self._placed = train.micro_batch_size, placed

        def answers(model, params, tokens_BxL: jax.Array, targets_BxL: jax.Array) -> tuple[jax.Array, jax.Array]:
            h_BxLxD, _ = model.apply({"params": params}, tokens_BxL, method="hidden")
            return nats_and_greedy(model, params, h_BxLxD, targets_BxL, train.loss_block)

        self.step = jit_on_rows(config, placed, answers)
        if ahead:
            ids = jax.ShapeDtypeStruct((self.batch_size, train.sequence_length), jnp.int32, sharding=placed.batch)
            self.step = self.step.lower(placed.abstract_params, ids, ids).compile()

    def __call__(self, params: Any, examples: Examples) -> tuple[jax.Array, jax.Array]:
        """nats_BxL and is_right_BxL."""
        return self.step(params, self._placed.put(examples.tokens_BxL), self._placed.put(examples.targets_BxL))


def score_examples(
    answers_of: ExampleScorer,
    params: Any,
    stream: ExampleStream,
    count: int,
    *,
    report: Report = lambda line: None,
    check: Callable[[], None] = lambda: None,
) -> ExampleScore:
    """Scores the first held-out examples.

    Args:
      answers_of: the model.
      params: its parameters.
      stream: where the examples come from.
      count: how many, 1 or more.
      report: takes a line about the progress every few seconds.
      check: called before every batch; raises to leave the rest.
    """
    nats, weights = [], []
    by_group: dict[int, tuple[int, int]] = {}
    rows = answers_of.batch_size
    progress = Progress("scoring", count, unit="examples", report=report, seconds=5)
    for first in range(0, count, rows):
        check()
        examples = stream.held_out(range(first, min(first + rows, count)))
        full = [*examples, *examples[-1:] * (rows - len(examples))]  # programs are for whole batches
        nats_BxL, is_right_BxL = map(np.asarray, answers_of(params, stacked(full)))
        for example, nats_L, is_right_L in zip(examples, nats_BxL.astype(np.float64), is_right_BxL, strict=False):
            nats.append(nats_L @ example.weights_L)
            weights.append(example.weights_L.sum(dtype=np.float64))
            asked_L = example.weights_L > 0
            for group in np.unique(example.groups_L[asked_L]).tolist():
                here_L = asked_L & (example.groups_L == group)
                correct, asked = by_group.get(group, (0, 0))
                by_group[group] = correct + int(is_right_L[here_L].sum()), asked + int(here_L.sum())
        progress.advance(len(examples))
    return ExampleScore(np.array(nats), np.array(weights), dict(sorted(by_group.items())))


class HeldOut:
    """A `training.loop.Evaluation`: loss and accuracy on held-out examples while a run trains."""

    values = VALIDATION

    def __init__(
        self,
        wanted: EvaluationConfig,
        config: StepConfig,
        placed: PlacedModel,
        stream: ExampleStream,
        check: Callable[[], None] = lambda: None,
    ):
        """Compiles now rather than when it is first due: what does not fit is known before anything is trained.

        Args:
          wanted: how often, and how many batches.
          config: the run's.
          placed: its model on its mesh.
          stream: where the examples come from.
          check: called before every batch; raises to leave the rest.
        """
        self._wanted, self._train, self._stream, self._check = wanted, config.train, stream, check
        self._answers_of = ExampleScorer(config, placed, ahead=True)

    def due(self, step: int) -> bool:
        return self._wanted.due(step, self._train.steps)

    def __call__(self, step: int, state: Any) -> dict[str, float]:
        count = self._wanted.batches * self._train.batch_size
        score = score_examples(self._answers_of, state.params, self._stream, count, check=self._check)
        return {"validation_loss": score.loss, "validation_accuracy": score.accuracy}
