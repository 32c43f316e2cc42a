"""When and how much a run is evaluated while it trains."""

import dataclasses
from collections.abc import Iterable

from spiral_jax.errors import require

# What the names of an evaluation's values begin with, in rows of metrics.
VALIDATION, TASKS = "validation_", "task/"


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation on the validation store, and with tasks of the LM Evaluation Harness.

    Attributes:
      every_steps: steps between evaluations; the last step is always evaluated. 0 for that one only.
      batches: batches of `train.batch_size` windows per evaluation, from the start of the store; 0 for all of it. Of
        a part, bits per byte are estimated with the store's mean bytes per token. With `data.examples`, 1 or more.
      tasks: tasks of the harness (extra `harness`), or `paper` for the papers' nine, or YAML files of tasks of your
        own; their numbers go into the rows of metrics.jsonl as `task/NAME/METRIC`.
      tasks_every_steps: steps between runs of `tasks`; they always run after the last step. 0 for that one only.
      tasks_data: folder with the tasks' data files, named as in spiral_jax/evaluation/tasks; empty for the Hugging
        Face hub.
      num_fewshot: solved examples before each question of `tasks`; None for each task's own number, or none.
      tasks_limit: documents of each task, from its start; 0 for all of them.
    """

    every_steps: int = 1000
    batches: int = 0
    tasks: tuple[str, ...] = ()
    tasks_every_steps: int = 0
    tasks_data: str = ""
    num_fewshot: int | None = None
    tasks_limit: int = 0

    def __post_init__(self):
        for field in ("every_steps", "batches", "tasks_every_steps", "num_fewshot", "tasks_limit"):
            value = getattr(self, field)
            require(value is None or value >= 0, f"evaluation.{field}", value, "0 or more")
        if self.tasks_every_steps and not self.tasks:
            require(False, "evaluation.tasks_every_steps", self.tasks_every_steps, "0 without evaluation.tasks")

    def due(self, step: int, last_step: int) -> bool:
        """Whether the validation store is scored after a step."""
        return _due(self.every_steps, step, last_step)

    def tasks_due(self, step: int, last_step: int) -> bool:
        """Whether `tasks` run after a step."""
        return bool(self.tasks) and _due(self.tasks_every_steps, step, last_step)

    def missing(self, step: int, last_step: int, names: Iterable[str]) -> set[str]:
        """Of `VALIDATION` and `TASKS` those that are due after a step and with which none of the names begins."""
        due = {VALIDATION: self.due(step, last_step), TASKS: self.tasks_due(step, last_step)}
        there = {begin for begin in due for name in names if name.startswith(begin)}
        return {begin for begin, is_due in due.items() if is_due} - there


def _due(every: int, step: int, last_step: int) -> bool:
    """Every so many steps, 0 for never, and after the last one."""
    return (every > 0 and step % every == 0) or step == last_step
