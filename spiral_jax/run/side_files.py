"""The files of a run that nothing is computed from: a damaged one never stops a resume, and no row of it is lost."""

from collections.abc import Callable
from typing import Any

from etils.epath import Path

from spiral_jax.data.bucket import refusals
from spiral_jax.data.json_files import read_json
from spiral_jax.errors import SpiralError, Unreachable
from spiral_jax.run.aside import set_aside

WANDB_ID = "wandb_id"


def mend(workdir: Path) -> list[str]:
    """Sets aside the side files of a run that cannot be read, after which a start writes them anew.

    `metrics.jsonl` is mended by the line (`run.metrics`). What a start writes without reading it before (`config.json`,
    `parameters.txt`, the tokenizer) needs no mending.

    Args:
      workdir: of the run.

    Returns:
      A line for each.

    Raises:
      SpiralError: one cannot be moved, or a bucket does not answer.
    """
    lines = []
    for name, check in _CHECKS.items():
        path = workdir / name
        try:
            damage = _damage(path, check)
        except Unreachable:
            raise
        except SpiralError as error:
            damage = str(error).removeprefix(f"{path} ").partition("; allowed")[0]
        except ValueError:
            damage = "is no text"
        if damage is not None:
            place = set_aside(path, workdir)
            lines.append(f"note: {path} is damaged ({damage}); it is now {place}, and written anew")
    return lines


def _damage(path: Path, check: Callable[[Path], str | None]) -> str | None:
    with refusals(path, lambda why: f"{path} cannot be read ({why})"):
        return check(path) if path.exists() else None


def is_wandb_id(text: str) -> bool:
    """Whether W&B may have given a run this name."""
    return 0 < len(text) <= 128 and text.isprintable() and text == text.strip() and not set(text) & set("/\\#?%:;,'")


def _json_is(allowed: str, ok: Callable[[Any], bool]) -> Callable[[Path], str | None]:
    return lambda path: None if ok(read_json(path)) else f"is not {allowed}"


def _wandb_id(path: Path) -> str | None:
    return None if is_wandb_id(path.read_text(encoding="utf-8")) else "is no id of W&B's"


def _is_file(path: Path) -> str | None:
    return None if path.is_file() else "is no file"


def _is_places(places: Any) -> bool:
    if not isinstance(places, dict) or not isinstance(places.get("validation", 0), str | None):
        return False
    train = places.get("train")
    return isinstance(train, list) and all(isinstance(place, str) for place in train)


def _is_code(code: Any) -> bool:
    return isinstance(code, dict) and all(
        isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("name", "file", "sha256"))
        for entry in code.values()
    )


def _is_starts(starts: Any) -> bool:
    return isinstance(starts, list) and all(isinstance(start, dict) for start in starts)


# Each says what is wrong, None for nothing, or raises where the file cannot be read at all.
_CHECKS: dict[str, Callable[[Path], str | None]] = {
    "environment.json": _json_is("a list of starts", _is_starts),
    "data.json": _json_is("the places of stores", _is_places),
    "own_code.json": _json_is("what is kept of the user's own files", _is_code),
    WANDB_ID: _wandb_id,
    "config.json": _is_file,
    "parameters.txt": _is_file,
    "metrics.jsonl": _is_file,
}
