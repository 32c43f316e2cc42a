"""Tasks of the LM Evaluation Harness on a model's parameters: opened once, run as often as wanted."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

from spiral_jax.data.tokenizers import Tokenizer
from spiral_jax.errors import SpiralError
from spiral_jax.evaluation import catalogue
from spiral_jax.evaluation.config import TASKS, EvaluationConfig
from spiral_jax.evaluation.generation import Generator
from spiral_jax.evaluation.scoring import Scorer
from spiral_jax.parallel.placed_model import PlacedModel
from spiral_jax.parallel.processes import ALONE, Processes
from spiral_jax.training.config import StepConfig


@dataclasses.dataclass(frozen=True)
class OpenTasks:
    """Tasks with their data.

    Attributes:
      tasks: the harness's objects.
      remarks: how their numbers differ from those on the published data.
      num_fewshot: solved examples before each question; None for a task's own number.
      limit: documents of each task; 0 for all.
    """

    tasks: Sequence[Any]
    remarks: Sequence[str]
    num_fewshot: int | None
    limit: int


def open_tasks(
    names: Sequence[str],
    *,
    tasks_data: str,
    num_fewshot: int | None,
    limit: int,
    max_length: int,
    field: str = "--tasks",
) -> OpenTasks:
    """Opens tasks, before anything is compiled.

    Args:
      names: of tasks; `paper` stands for the papers' nine.
      tasks_data: folder with the data files, and the network is left alone; "" for the Hugging Face hub.
      num_fewshot: solved examples before each question; None for a task's own number.
      limit: documents of each task; 0 for all.
      max_length: the longest input of the model.
      field: what the names were given as.

    Raises:
      SpiralError: the harness is not installed, an unknown task, data that is missing or broken.
    """
    catalogue.check_extra(field)
    resolved, remarks = catalogue.resolve(names, tasks_data, field=field)
    if tasks_data:
        # Read when the libraries are imported, which the next line does.
        os.environ["HF_DATASETS_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"
        remarks += [remark for name in resolved for remark in catalogue.remarks_on(name, num_fewshot)]
    from spiral_jax.evaluation import harness

    try:
        tasks = harness.load_tasks(resolved, tasks_data, max_length, num_fewshot)
    except SpiralError as error:
        message = str(error).replace("--tasks", field)
        if not field.startswith("--"):
            message = message.replace("--num_fewshot", field.replace("tasks", "num_fewshot"))
        raise type(error)(message) from error
    return OpenTasks(tasks, remarks, num_fewshot, limit)


def open_tasks_of_run(wanted: EvaluationConfig, max_length: int) -> OpenTasks | None:
    """What a run's configuration asks for while it trains, of `max_length` tokens; None if nothing."""
    if not wanted.tasks:
        return None
    return open_tasks(
        wanted.tasks,
        tasks_data=wanted.tasks_data,
        num_fewshot=wanted.num_fewshot,
        limit=wanted.tasks_limit,
        max_length=max_length,
        field="evaluation.tasks",
    )


class TaskEvaluation:
    """Runs tasks with one model on its mesh."""

    def __init__(
        self,
        opened: OpenTasks,
        config: StepConfig,
        placed: PlacedModel,
        tokenizer: Tokenizer,
        processes: Processes = ALONE,
    ):
        """Compiles nothing yet. A batch is one of `config`'s micro-batches: what fits in training fits here."""
        from spiral_jax.evaluation import harness

        train = config.train
        extent = {"max_length": train.sequence_length, "batch_size": train.micro_batch_size}
        scorer = Scorer(placed, **extent, block=train.loss_block)
        generator = Generator(placed, **extent, num_ids=tokenizer.vocab_size)
        self._opened = opened
        self._model = {"model": f"spiral_jax {config.model.notation} {config.model.topology}",
                       "model_num_parameters": config.model.total_parameters, "model_dtype": config.model.dtype,
                       **extent}  # fmt: skip
        self._lm = harness.SpiralLM(tokenizer, scorer, generator, None, processes)

    def __call__(self, params: Any, *, standard_errors: bool = True, about: dict[str, Any] | None = None) -> dict:
        """Runs the tasks.

        Args:
          params: the model's.
          standard_errors: whether to estimate them.
          about: further entries for the results' `config`.

        Returns:
          The harness's results; `paper` holds the metrics that the papers report, `notes` what to know about them.
        """
        from spiral_jax.evaluation import harness

        opened, self._lm.params = self._opened, params
        results = harness.run(
            self._lm,
            opened.tasks,
            num_fewshot=opened.num_fewshot,
            limit=opened.limit,
            standard_errors=standard_errors,
            about=self._model | (about or {}),
        )
        self._lm.params = None  # in training they are donated to the next step
        return results | {"paper": catalogue.paper_values(results), "notes": list(opened.remarks)}

    def metrics(self, params: Any, check: Callable[[], None]) -> dict[str, float]:
        """The tasks' numbers for a row of metrics: `task/NAME/METRIC`; `check` may raise between batches."""
        self._lm.check = check
        results = self(params, standard_errors=False)
        return {f"{TASKS}{name}": value for name, value in catalogue.values_of(results).items()}


class TasksOfRun:
    """Tasks while a run trains: a `training.loop.Evaluation`."""

    values = TASKS

    def __init__(
        self,
        wanted: EvaluationConfig,
        last_step: int,
        tasks: TaskEvaluation,
        check: Callable[[], None] = lambda: None,
        processes: Processes = ALONE,
    ):
        """`check` is called between batches, and raises to leave the rest."""
        self._wanted, self._last_step, self._tasks, self._check = wanted, last_step, tasks, check
        self._processes = processes

    def due(self, step: int) -> bool:
        return self._wanted.tasks_due(step, self._last_step)

    def __call__(self, step: int, state: Any) -> dict[str, float]:
        found = self._tasks.metrics(state.params, self._check)
        self._processes.say("  ".join([f"tasks after step {step}:", *(f"{k} {v:.4f}" for k, v in found.items())]))
        return found
