"""What a run reports while it trains: JSON lines first, TensorBoard and W&B if asked for, a line on the terminal."""

import dataclasses
import functools
import importlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from etils.epath import Path

from spiral_jax.data import atomic
from spiral_jax.data.json_files import finite
from spiral_jax.errors import SpiralError, require
from spiral_jax.progress import duration
from spiral_jax.run.aside import DAMAGED
from spiral_jax.run.failures import first_words
from spiral_jax.run.row_file import RowFile
from spiral_jax.run.tensorboard import Board


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
        self._mirrors: list[_Mirror] = []
        if config.tensorboard:
            tensorboardx = _optional("tensorboardX", "tensorboard", "logging.tensorboard")
            board = Board(tensorboardx, workdir / "tensorboard", last_step + 1)
            self._mirrors.append(_Mirror("TensorBoard", lambda row: board.write(row["step"], _flat(row)), board.close))
        if config.wandb:
            wandb = _optional("wandb", "wandb", "logging.wandb")
            run = wandb.init(project=config.wandb, dir=str(workdir), id=_wandb_id(workdir), resume="allow")
            self._mirrors.append(_Mirror("W&B", lambda row: run.log(_flat(row), step=row["step"]), run.finish))
        for line in drop_rows_after(self._path, last_step):
            _say(line)
        self._rows = RowFile(self._path)

    def write(self, row: Mapping[str, Any]) -> None:
        """Writes one row; `step` is its key, values are JSON values. A disk that refuses it stops no training."""
        # JSON has no NaN: if a value is no finite number, it is written as null.
        values = finite(dict(row))
        failed_before = self._rows.failure is not None
        self._rows.write(values)
        if self._rows.failure is not None and not failed_before:
            _say(
                f"note: {self._path}: cannot be written ({self._rows.failure}); training goes on, and the rows are "
                "written once they can be"
            )
        elif failed_before and self._rows.failure is None:
            _say(f"note: {self._path}: written again, every row of it")
        for mirror in self._mirrors:
            mirror.write(values)

    def close(self) -> None:
        self._rows.close()
        if self._rows.num_unwritten:
            _say(f"note: {self._path}: cannot be written ({self._rows.failure}); its last {self._rows.num_unwritten} "
                 "rows are lost")  # fmt: skip
        for mirror in self._mirrors:
            mirror.close()


class _Mirror:
    """A place where rows go as well; one that fails is left out from then on."""

    def __init__(self, name: str, write: Callable[[dict[str, Any]], None], close: Callable[[], None]):
        self._name, self._write, self._close = name, write, close
        self._works = True

    def write(self, row: dict[str, Any]) -> None:
        self._attempt(functools.partial(self._write, row))

    def close(self) -> None:
        self._attempt(self._close)

    def _attempt(self, work: Callable[[], None]) -> None:
        if not self._works:
            return
        try:
            work()
        except Exception as error:  # of a library that is not needed
            self._works = False
            _say(f"note: {self._name} takes no rows any more ({first_words(error)}); metrics.jsonl has them")


def check_extras(config: LoggingConfig) -> None:
    """Raises SpiralError if a destination's package is missing, before anything expensive has run."""
    if config.tensorboard:
        _optional("tensorboardX", "tensorboard", "logging.tensorboard")
    if config.wandb:
        _optional("wandb", "wandb", "logging.wandb")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl, none if it is missing; lines that hold none are left out."""
    return [row for line in _lines(path) if (row := _row(line)) is not None]


def drop_rows_after(path: Path, last_step: int) -> list[str]:
    """Drops the rows of steps after `last_step`, so that no step appears twice after a resume; others keep every bit.

    Broken lines, wherever they are, go to WORKDIR/damaged/metrics.jsonl.lines. If the last one has no end, it was cut
    short by a kill, and is dropped.

    Args:
      path: the metrics.jsonl of a run.
      last_step: the step the run continues from.

    Returns:
      A line if there were broken ones.

    Raises:
      SpiralError: the disk refuses.
    """
    lines = _lines(path)
    rows = [_row(line) for line in lines]
    kept = [line for line, row in zip(lines, rows, strict=True) if row is not None and row["step"] <= last_step]
    broken = [n for n, (line, row) in enumerate(zip(lines, rows, strict=True), 1) if row is None and line.strip()]
    if broken and broken[-1] == len(lines) and not lines[-1].endswith(b"\n"):
        broken.pop()
    said = []
    if broken:
        place = path.parent / DAMAGED / f"{path.name}.lines"
        with atomic.written(place):
            place.parent.mkdir(exist_ok=True)
            with place.open("ab") as file:
                file.write(b"".join(lines[n - 1].rstrip(b"\n") + b"\n" for n in broken))
        numbers = ", ".join(map(str, broken[:5])) + (" ..." if len(broken) > 5 else "")
        which = f"line {numbers} is" if len(broken) == 1 else f"lines {numbers} are"
        said = [f"note: {path}: {which} damaged and now in {place}; {len(kept)} rows are kept"]
    content = b"".join(line.rstrip(b"\n") + b"\n" for line in kept)
    if content != b"".join(lines):
        atomic.write_bytes(path, content)
    return said


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


def _lines(path: Path) -> list[bytes]:
    if not path.exists():
        return []
    *lines, last = path.read_bytes().split(b"\n")
    return [line + b"\n" for line in lines] + ([last] if last else [])


def _row(line: bytes) -> dict[str, Any] | None:
    """The row that a line holds: an object with a step."""
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return row if isinstance(step, int) and not isinstance(step, bool) else None


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


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


def _wandb_id(workdir: Path) -> str:
    """The same run in W&B whenever the directory is resumed."""
    path = workdir / "wandb_id"
    if not path.exists():
        atomic.write_text(path, f"{workdir.name}-{int(time.time())}")
    return path.read_text(encoding="utf-8")
