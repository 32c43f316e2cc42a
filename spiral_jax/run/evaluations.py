"""A run's evaluations while it trains: which it has, which it owes, and what becomes of the run if one fails."""

from collections.abc import Callable, Sequence
from typing import Any

from etils.epath import Path

from spiral_jax.data.prepared import PreparedData
from spiral_jax.errors import SpiralError, Unreachable
from spiral_jax.evaluation.config import VALIDATION
from spiral_jax.evaluation.held_out import HeldOut
from spiral_jax.evaluation.task_evaluation import OpenTasks, TaskEvaluation, TasksOfRun
from spiral_jax.evaluation.validation import Validation
from spiral_jax.parallel.placed_model import PlacedModel
from spiral_jax.parallel.processes import Processes
from spiral_jax.run.config import RunConfig
from spiral_jax.run.metrics import read_row, rows_of
from spiral_jax.training.loop import Evaluation, Stopped


class Contained:
    """A `training.loop.Evaluation` that stops the run if it fails: the state is saved, and then the failure raised.

    Attributes:
      values: what the names of its values begin with.
      failure: what it raised; None if nothing.
    """

    def __init__(self, evaluation: Evaluation, several: bool):
        """`several` processes save together: they cannot after what may have happened on one of them alone."""
        self.values = evaluation.values
        self.failure: Exception | None = None
        self._evaluation, self._several = evaluation, several

    def due(self, step: int) -> bool:
        return self._evaluation.due(step)

    def __call__(self, step: int, state: Any) -> dict[str, Any]:
        try:
            return self._evaluation(step, state)
        except Stopped:
            raise
        except Exception as failure:
            on_all = isinstance(failure, SpiralError) and not isinstance(failure, Unreachable)
            if self._several and not on_all:
                raise
            self.failure = failure
            raise Stopped from failure


def evaluations_of(
    config: RunConfig,
    data: PreparedData,
    tasks: OpenTasks | None,
    placed: PlacedModel,
    processes: Processes,
    check: Callable[[], None],
) -> list[Contained]:
    """What a run is evaluated on while it trains; compiled now as far as its shapes are known.

    Args:
      config: the run's.
      data: the run's.
      tasks: of the harness; None for none.
      placed: its model on its mesh.
      processes: the run's.
      check: called between batches; raises to leave the rest.
    """
    found: list[Evaluation] = []
    if data.validation is not None:
        found.append(Validation(config.evaluation, config, placed, data.validation, data.tokenizer, check))
    if data.examples is not None:
        found.append(HeldOut(config.evaluation, config, placed, data.examples, check))
    if tasks is not None:
        of_run = TaskEvaluation(tasks, config, placed, data.tokenizer, processes)
        found.append(TasksOfRun(config.evaluation, config.train.steps, of_run, check, processes))
    return [Contained(evaluation, processes.several) for evaluation in found]


def owed(config: RunConfig, workdir: Path, data: PreparedData, step: int, processes: Processes) -> frozenset[str]:
    """What was due after the step that a run goes on from, and is not in its row: the run was stopped before that.

    Returns:
      `values` of the evaluations.
    """
    due = config.evaluation.missing(step, config.train.steps, ())
    if data.validation is None and data.examples is None:
        due.discard(VALIDATION)
    if not step or not due:  # most starts: then no rows are read
        return frozenset()
    row = processes.from_main("the newest row", lambda: read_row(rows_of(workdir), step))
    if row is None:  # nothing to add them to
        return frozenset()
    return frozenset(due & config.evaluation.missing(step, config.train.steps, row))


def catch_up(evaluations: Sequence[Contained], step: int, state: Any, take: Callable[[dict[str, Any]], None]) -> bool:
    """Runs what is owed for the step that a run goes on from.

    Args:
      evaluations: those owed.
      step: steps done.
      state: after them.
      take: takes the values of all, for the row of the step.

    Returns:
      False if one was left, or failed: then nothing was taken.
    """
    values: dict[str, Any] = {}
    try:
        for evaluation in evaluations:
            values |= evaluation(step, state)
    except Stopped:
        return False
    if values:
        take(values)
    return True
