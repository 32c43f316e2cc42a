"""What a run reports while it trains: JSON lines first, TensorBoard and W&B if asked for, a line on the terminal."""

import dataclasses
import functools
import importlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from etils.epath import Path

from spiral_jax.data import atomic
from spiral_jax.data.bucket import is_bucket, is_folder, read_all, remove
from spiral_jax.data.json_files import finite
from spiral_jax.errors import SpiralError, require
from spiral_jax.progress import duration
from spiral_jax.run.aside import DAMAGED
from spiral_jax.run.failures import first_words
from spiral_jax.run.row_file import RowFile
from spiral_jax.run.row_parts import ATTEMPTS, RowParts
from spiral_jax.run.side_files import WANDB_ID
from spiral_jax.run.tensorboard import Board
from spiral_jax.run.wandb_rows import WandbRows


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

    def __init__(
        self,
        workdir: Path,
        config: LoggingConfig,
        *,
        last_step: int = 0,
        about: Mapping[str, Any] = MappingProxyType({}),
        check: Callable[[], None] = lambda: None,
    ):
        """Opens the file and drops rows of steps after `last_step`, so that no step appears twice after a resume.

        Args:
          workdir: the run's directory.
          config: what to write where.
          last_step: the step the run continues from.
          about: what the run is made of, for W&B.
          check: called before anything is written later than in a call, which it may prevent.

        Raises:
          SpiralError: an extra that is not installed; or W&B refuses a run that is new to it.
        """
        self._path = rows_of(workdir)
        self._failed = False
        self._mirrors: list[_Mirror] = []
        if config.tensorboard:
            tensorboardx = _optional("tensorboardX", "tensorboard", "logging.tensorboard")
            board = Board(tensorboardx, workdir / "tensorboard", last_step + 1)
            self._mirrors.append(_Mirror("TensorBoard", lambda row: board.write(row["step"], _flat(row)), board.close))
        if config.wandb:
            self._mirrors += _wandb_mirrors(workdir, config.wandb, about)
        for line in drop_rows_after(self._path, last_step):
            _say(line)
        self._check = check
        self._rows = self._open()

    def _open(self) -> RowParts | RowFile:
        return RowParts(self._path, self._check) if is_bucket(self._path) else RowFile(self._path)

    def write(self, row: Mapping[str, Any]) -> None:
        """Writes one row; `step` is its key, values are JSON values. A disk that refuses it stops no training."""
        # JSON has no NaN: if a value is no finite number, it is written as null.
        values = finite(dict(row))
        self._rows.write(values)
        failure = self._rows.failure
        if failure is not None and not self._failed:
            _say(
                f"note: {self._path}: cannot be written ({failure}); training goes on, and the rows are written once "
                "they can be"
            )
        elif self._failed and failure is None:
            _say(f"note: {self._path}: written again, every row of it")
        self._failed = failure is not None
        for mirror in self._mirrors:
            mirror.write(values)

    def complete(self, step: int, values: Mapping[str, Any]) -> None:
        """Adds values to the row of a step that was written by another writer, before this one writes any.

        Raises:
          SpiralError: the disk refuses.
        """
        self._rows.close()
        found = finite(dict(values))
        add_to_row(self._path, step, found)
        self._rows = self._open()
        for mirror in self._mirrors:
            mirror.write({"step": step, **found})

    def flush(self) -> str | None:
        """What was written is on the bucket; on a disk it is there at once, or as soon as that is not full.

        Returns:
          Why the bucket does not have it, after minutes; None if it has.
        """
        if not isinstance(self._rows, RowParts):
            return None
        self._rows.flush(ATTEMPTS)
        return self._rows.failure

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


def _wandb_mirrors(workdir: Path, project: str, about: Mapping[str, Any]) -> list[_Mirror]:
    """The mirror in W&B; none if W&B refuses a run that it has taken before, which goes on without it."""
    wandb = _optional("wandb", "wandb", "logging.wandb")
    is_new = not (workdir / WANDB_ID).exists()
    try:
        rows = WandbRows(wandb, workdir, project, about)
    except Exception as error:
        if is_new:
            remove(workdir / WANDB_ID)
            raise SpiralError(
                f"logging.wandb is {project!r}, where W&B takes no run ({first_words(error)}); allowed: a project that "
                'can be reached, WANDB_MODE=offline in the environment, or ""'
            ) from error
        _say(f"note: W&B takes no rows now ({first_words(error)}); metrics.jsonl has them")
        return []
    return [_Mirror("W&B", lambda row: rows.write(row["step"], _flat(row)), rows.close)]


def check_extras(config: LoggingConfig) -> None:
    """Raises SpiralError if a destination's package is missing, before anything expensive has run."""
    if config.tensorboard:
        _optional("tensorboardX", "tensorboard", "logging.tensorboard")
    if config.wandb:
        _optional("wandb", "wandb", "logging.wandb")


def rows_of(workdir: Path) -> Path:
    """Where a run's rows are: a file, and on a bucket, where nothing can be appended, a folder of parts."""
    return workdir / ("metrics" if is_bucket(workdir) else "metrics.jsonl")


def read_rows(path: Path, since: int = 0) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl or of a folder of parts, none if it is missing; lines that hold none are left out.

    Args:
      path: `rows_of` a run.
      since: parts that end before this step may be left out.
    """
    return [row for _, lines in _files(path, since) for line in lines if (row := _row(line)) is not None]


def read_row(path: Path, step: int) -> dict[str, Any] | None:
    """The row of a step; None if there is none."""
    return next((row for row in reversed(read_rows(path, step)) if row["step"] == step), None)


def drop_rows_after(path: Path, last_step: int) -> list[str]:
    """Drops the rows of steps after `last_step`, so that no step appears twice after a resume; others keep every bit.

    Broken lines go to WORKDIR/damaged/metrics.jsonl.lines, wherever they are in a file, and of parts if they are in one
    that such a step may be in. If the last one has no end, it was cut short by a kill, and is dropped.

    Args:
      path: `rows_of` a run.
      last_step: the step the run continues from.

    Returns:
      A line for every file with broken ones.

    Raises:
      SpiralError: the disk refuses.
    """
    said = []
    for file, lines in _files(path, last_step):
        rows = [_row(line) for line in lines]
        kept = [line for line, row in zip(lines, rows, strict=True) if row is not None and row["step"] <= last_step]
        broken = [n for n, (line, row) in enumerate(zip(lines, rows, strict=True), 1) if row is None and line.strip()]
        if broken and broken[-1] == len(lines) and not lines[-1].endswith(b"\n"):
            broken.pop()
        if broken:
            place = _keep_broken(path.parent, file, [lines[n - 1] for n in broken])
            numbers = ", ".join(map(str, broken[:5])) + (" ..." if len(broken) > 5 else "")
            which = f"line {numbers} is" if len(broken) == 1 else f"lines {numbers} are"
            said.append(f"note: {file}: {which} damaged and now in {place}; {len(kept)} rows are kept")
        content = b"".join(line.rstrip(b"\n") + b"\n" for line in kept)
        if not content and is_bucket(file):
            with atomic.written(file):
                remove(file)
        elif content != b"".join(lines):
            atomic.write_bytes(file, content)
    return said


def add_to_row(path: Path, step: int, values: dict[str, Any]) -> None:
    """Adds JSON values to the row of a step; the others keep every bit.

    Raises:
      SpiralError: the disk refuses.
    """
    for file, lines in _files(path, step):
        rows = [_row(line) for line in lines]
        if any(row is not None and row["step"] == step for row in rows):
            completed = [
                json.dumps(row | values, allow_nan=False).encode() + b"\n" if row and row["step"] == step else line
                for row, line in zip(rows, lines, strict=True)
            ]
            atomic.write_bytes(file, b"".join(completed))


def _keep_broken(workdir: Path, file: Path, lines: Sequence[bytes]) -> Path:
    """Adds lines to those that were set aside of a file before."""
    place = workdir / DAMAGED / f"{file.name}.lines"
    content = b"".join(line.rstrip(b"\n") + b"\n" for line in lines)
    with atomic.written(place):
        if is_bucket(place):
            place.write_bytes((place.read_bytes() if place.exists() else b"") + content)
        else:
            place.parent.mkdir(exist_ok=True)
            with place.open("ab") as opened:
                opened.write(content)
    return place


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
        parts.append(f"validation {row['validation_loss']:.4f} nats per token, {validation_measure(row)}")
    parts.append(f"ETA {duration(seconds_left)}" if step < total_steps else "done")
    return "  ".join(parts)


def validation_measure(row: Mapping[str, Any]) -> str:
    """What the validation of a row found besides its loss: of text bits per byte, of examples the right answers."""
    if "validation_accuracy" in row:
        return f"{row['validation_accuracy']:.1%} right"
    return f"{row['validation_bits_per_byte']:.4f} bits per byte"


def _files(path: Path, since: int = 0) -> list[tuple[Path, list[bytes]]]:
    """The files of `rows_of` a run that may hold steps from `since` on, in their order, each with its lines.

    Of parts those that end before are not read: after some weeks they are tens of thousands.
    """
    if is_folder(path):
        files = sorted(file for file in path.iterdir() if file.suffix == ".jsonl")
    else:
        files = [path] if path.exists() else []
    begun = [file.name for file in files if file.stem.isdigit() and int(file.stem) <= since]
    ended = set(begun[:-1])
    files = [file for file in files if file.name not in ended]
    contents = read_all(files) if is_bucket(path) else [file.read_bytes() for file in files]
    return [(file, _lines(content)) for file, content in zip(files, contents, strict=True)]


def _lines(content: bytes) -> list[bytes]:
    *lines, last = content.split(b"\n")
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
