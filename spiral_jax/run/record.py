"""A run's rows: completed with what follows from a step's number and time, written, and shown."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from spiral_jax.data.pipeline import WindowOrder
from spiral_jax.hardware import peak_bytes, peak_flops
from spiral_jax.progress import Progress
from spiral_jax.run.config import RunConfig
from spiral_jax.run.metrics import MetricsWriter, step_line
from spiral_jax.training.divergence import reason
from spiral_jax.training.loop import Evaluation


class Record:
    """Takes a `Recorder`'s rows on the process that writes."""

    def __init__(
        self,
        writer: MetricsWriter,
        config: RunConfig,
        order: WindowOrder,
        start_step: int,
        evaluations: Sequence[Evaluation],
        check: Callable[[], None] = lambda: None,
    ):
        """Starts the clock.

        Args:
          writer: of the run's rows, behind that of `start_step`.
          config: the run's.
          order: which windows a step takes.
          start_step: the step the run continues from.
          evaluations: of which a step has the values: its row is written whatever `logging.every_steps` says.
          check: called before rows are written, which it may prevent.
        """
        self._check = check
        self._config, self._order, self._evaluations = config, order, evaluations
        self._writer = writer
        # By the clock since now: evaluations and checkpoints take their time, too.
        self._progress = Progress("steps", config.train.steps, seconds=config.logging.seconds)
        self._progress.skip(start_step)
        self._first_step = start_step + 1

    def __call__(self, row: dict[str, Any]) -> None:
        self._check()
        row, step = complete_row(self._config, self._order, row), row["step"]
        is_evaluated = any(evaluation.due(step) for evaluation in self._evaluations)
        is_last = step == self._config.train.steps
        if is_last or is_evaluated or row.get("skipped") or step % self._config.logging.every_steps == 0:
            self._writer.write(row)
        self._progress.done = step
        if row.get("skipped"):
            why = reason(row, self._config.divergence, self._config.train.skip_steps)
            print(f"step {step}: its update was skipped, as {why}", flush=True)
        if self._progress.is_due(at_once=is_last or step == self._first_step or "validation_loss" in row):
            print(step_line(row, self._config.train.steps, self._progress.seconds_left()), flush=True)

    def complete(self, values: dict[str, Any]) -> None:
        """Adds values to the row of the step that the run continues from, before the first row."""
        self._check()
        self._writer.complete(self._first_step - 1, values)

    def flush(self) -> str | None:
        """Before a checkpoint: a run that is resumed there has the rows of all steps before it, or it says why not."""
        return self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def complete_row(config: RunConfig, order: WindowOrder, row: dict) -> dict:
    """Adds what follows from a step's number and time: tokens, epochs, speed, MFU."""
    tokens_per_second = config.train.tokens_per_step / row["step_time"]
    row |= {
        "tokens": row["step"] * config.train.tokens_per_step,
        "tokens_per_second": tokens_per_second,
        "epoch": order.epoch(row["step"]),
    }
    epochs_of_stores = order.epochs_of_sources(row["step"])
    if epochs_of_stores is not None:
        row["epochs_of_stores"] = epochs_of_stores
    peak = config.logging.peak_flops or peak_flops(jax.devices()[0].device_kind)
    if peak is not None:
        for name, causal in (("mfu", True), ("mfu_full_attention", False)):
            flops = config.model.train_flops_per_token(config.train.sequence_length, causal=causal)
            row[name] = flops * tokens_per_second / (peak * jax.device_count())
    memory = peak_bytes(jax.local_devices()[0].memory_stats())
    if memory is not None:
        row["device_memory_bytes"] = memory
    return row
