"""What a run reports while it trains: JSON lines first, TensorBoard and W&B if asked for, a line on the terminal."""

import dataclasses
import importlib
import json
import time
from collections.abc import Mapping
from typing import Any

from etils.epath import Path

from spiral_jax.data import atomic
from spiral_jax.data.json_files import finite
from spiral_jax.errors import SpiralError, require
from spiral_jax.progress import duration


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
    """What is written where.

    Attributes:
      every_steps: steps between rows of metrics.jsonl; evaluated steps and the last one always have one.
      seconds: time between lines on the terminal.
      tensorboard: also write TensorBoard events (extra `tensorboard`).
      wandb: W&B project to log to (extra `wandb`); empty for none.
      peak_flops: FLOP/s of one device that MFU is measured against; None to look it up by device kind.
    """

    every_steps: int = 1
    seconds: float = 10.0
    tensorboard: bool = False
    wandb: str = ""
    peak_flops: float | None = None

    def __post_init__(self):
        require(self.every_steps >= 1, "logging.every_steps", self.every_steps, "1 or more")
        require(self.seconds >= 0, "logging.seconds", self.seconds, "0 or more")
        require(self.peak_flops is None or self.peak_flops > 0, "logging.peak_flops", self.peak_flops, "more than 0")


class MetricsWriter:
    """Appends rows to WORKDIR/metrics.jsonl, one per step, and mirrors them elsewhere if asked to."""

    def __init__(self, workdir: Path, config: LoggingConfig, *, last_step: int = 0):
        """Opens the file and drops rows of steps after `last_step`, so that no step appears twice after a resume.

        Args:
          workdir: the run's directory.
          config: what to write where.
          last_step: the step the run continues from.

        Raises:
          SpiralError: an extra that is not installed.
        """
        self._path = workdir / "metrics.jsonl"
        self._mirrors = []
        if config.tensorboard:
            tensorboardx = _optional("tensorboardX", "tensorboard", "logging.tensorboard")
            board = tensorboardx.SummaryWriter(str(workdir / "tensorboard"), purge_step=last_step + 1)
            self._mirrors.append((lambda row: _to_tensorboard(board, row), board.close))
        if config.wandb:
            wandb = _optional("wandb", "wandb", "logging.wandb")
            run = wandb.init(project=config.wandb, dir=str(workdir), id=_wandb_id(workdir), resume="allow")
            self._mirrors.append((lambda row: run.log(_flat(row), step=row["step"]), run.finish))
        _drop_rows_after(self._path, last_step)
        self._file = self._path.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        """Writes one row; `step` is its key, values are JSON values."""
        # JSON has no NaN: if a value is no finite number, it is written as null.
        row = finite(dict(row))
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        for write, _ in self._mirrors:
            write(row)

    def close(self) -> None:
        self._file.close()
        for _, close in self._mirrors:
            close()


def check_extras(config: LoggingConfig) -> None:
    """Raises SpiralError if a destination's package is missing, before anything expensive has run."""
    if config.tensorboard:
        _optional("tensorboardX", "tensorboard", "logging.tensorboard")
    if config.wandb:
        _optional("wandb", "wandb", "logging.wandb")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl, none if it is missing; a last line cut short by a crash is left out."""
    rows: list[dict[str, Any]] = []
    if not path.exists():
        return rows
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def step_line(row: Mapping[str, Any], total_steps: int, seconds_left: float) -> str:
    """A row as a line on the terminal: step, loss, speed, time left."""
    step = row["step"]
    parts = [
        f"step {step:>{len(str(total_steps))}}/{total_steps}",
        f"loss {row['loss']:.4f}",
        f"lr {row['learning_rate']:.2e}",
        f"{row['tokens_per_second']:,.0f} tokens/s",
    ]
    if "mfu" in row:
        parts.append(f"MFU {row['mfu']:.1%}")
    if "validation_loss" in row:
        parts.append(
            f"validation {row['validation_loss']:.4f} nats/token, {row['validation_bits_per_byte']:.4f} bits/byte"
        )
    parts.append(f"ETA {duration(seconds_left)}" if step < total_steps else "done")
    return "  ".join(parts)


def _drop_rows_after(path: Path, last_step: int) -> None:
    if not path.exists():
        return
    kept = [row for row in read_rows(path) if row["step"] <= last_step]
    atomic.write_text(path, "".join(json.dumps(row) + "\n" for row in kept))


def _optional(module: str, extra: str, field: str):
    try:
        return importlib.import_module(module)
    except ImportError:
        raise SpiralError(f"{field} needs {module}: pip install 'spiral_jax[{extra}]'") from None


def _flat(row: Mapping[str, Any]) -> dict[str, float]:
    """Scalars by name; lists get an index."""
    flat: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, list):
            flat |= _flat({f"{name}/{i}": entry for i, entry in enumerate(value)})
        elif name != "step" and value is not None:
            flat[name] = value
    return flat


def _to_tensorboard(board, row: Mapping[str, Any]) -> None:
    for name, value in _flat(row).items():
        board.add_scalar(name, value, row["step"])


def _wandb_id(workdir: Path) -> str:
    """The same run in W&B whenever the directory is resumed."""
    path = workdir / "wandb_id"
    if not path.exists():
        atomic.write_text(path, f"{workdir.name}-{int(time.time())}")
    return path.read_text(encoding="utf-8")
