"""When and how much a run is evaluated while it trains."""

import dataclasses

from spiral_jax.errors import require


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation on the validation store, and with tasks of the LM Evaluation Harness.

    Attributes:
      every_steps: steps between evaluations; the last step is always evaluated. 0 for that one only.
      batches: batches of `train.batch_size` windows per evaluation, from the start of the store; 0 for all of it.
        Bits per byte then take the store's mean bytes per token. With `data.examples` of held-out ones, 1 or more.
      tasks: tasks of the harness (extra `harness`), or `paper` for the papers' nine, or YAML files of tasks of your
        own; their numbers go into the rows of metrics.jsonl as `task/NAME/METRIC`.
      tasks_every_steps: steps between runs of `tasks`; they always run after the last step. 0 for that one only.
      tasks_data: folder with the tasks' data files, named as in spiral_jax/evaluation/tasks; empty for the Hugging
        Face hub.
      num_fewshot: solved examples before each question of `tasks`.
      tasks_limit: documents of each task, from its start; 0 for all of them.
    """

    every_steps: int = 1000
    batches: int = 0
    tasks: tuple[str, ...] = ()
    tasks_every_steps: int = 0
    tasks_data: str = ""
    num_fewshot: int = 0
    tasks_limit: int = 0

    def __post_init__(self):
        for field in ("every_steps", "batches", "tasks_every_steps", "num_fewshot", "tasks_limit"):
            require(getattr(self, field) >= 0, f"evaluation.{field}", getattr(self, field), "0 or more")
        if self.tasks_every_steps and not self.tasks:
            require(False, "evaluation.tasks_every_steps", self.tasks_every_steps, "0 without evaluation.tasks")

    def due(self, step: int, last_step: int) -> bool:
        """Whether the validation store is scored after a step."""
        return _due(self.every_steps, step, last_step)

    def tasks_due(self, step: int, last_step: int) -> bool:
        """Whether `tasks` run after a step."""
        return bool(self.tasks) and _due(self.tasks_every_steps, step, last_step)


def _due(every: int, step: int, last_step: int) -> bool:
    """Every so many steps, 0 for never, and after the last one."""
    return (every > 0 and step % every == 0) or step == last_step
