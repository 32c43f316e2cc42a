"""Local data files as the documents of the harness's tasks; the YAML files in tasks/ refer to these functions."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spiral_jax.data.plain_text import decoded, lines_of
from spiral_jax.errors import SpiralError
from spiral_jax.evaluation.catalogue import find_file

# Of rows of HellaSwag as they were published, and as others hand them on.
_ORIGINAL = ("ctx_a", "ctx_b", "activity_label", "endings", "label")
_MADE = ("query", "endings", "label")


def load(*, tasks_data: str, file: str | Sequence[str], fields: Sequence[str] = (), **_) -> dict[str, Any]:
    """A task's data: the split `test` as a `datasets.Dataset` in memory. Takes the task's `metadata`.

    Raises:
      SpiralError: no such file, one that cannot be read, or one of `fields` that a row lacks.
    """
    path, rows = _read_rows(file, tasks_data)
    _check_fields(path, rows, fields)
    return {"test": _dataset(rows)}


def load_hellaswag(*, tasks_data: str, file: str | Sequence[str], **_) -> dict[str, Any]:
    """HellaSwag with the fields `query`, `choices` and `label`, which the harness makes of the original ones.

    Rows with the original fields are processed by the harness itself. Rows whose `query` was made before (label, colon,
    context) lack two things, which are put back: marks had become full stops even after a full stop, and a last
    sentence that is only begun (`ctx_b`) is capitalised by the harness.

    Raises:
      SpiralError: as `load`.
    """
    path, rows = _read_rows(file, tasks_data)
    if "ctx_a" in rows[0]:
        from lm_eval.tasks.hellaswag.utils import process_docs

        _check_fields(path, rows, _ORIGINAL)
        return {"test": process_docs(_dataset(rows))}
    _check_fields(path, rows, _MADE)
    made = [{"query": hellaswag_query(row["query"]), "label": int(row["label"]),
             "choices": [_without_double_stops(ending) for ending in row["endings"]]} for row in rows]  # fmt: skip
    return {"test": _dataset(made)}


def _dataset(rows: list[dict[str, Any]]) -> Any:
    import datasets

    return datasets.Dataset.from_list(rows)


def _read_rows(file: str | Sequence[str], tasks_data: str) -> tuple[Path, list[dict[str, Any]]]:
    """The first of the files that is there, and what it holds."""
    path = find_file(file, tasks_data)
    if path is None:
        raise SpiralError(f"--tasks_data is {tasks_data!r}, which has no {file}; allowed: a folder that has it")
    rows = wikitext_pages(_read(path)) if path.suffix == ".raw" else _json_lines(path)
    if not rows:
        raise SpiralError(f"{path} has no rows; allowed: at least one")
    return path, rows


def hellaswag_query(text: str) -> str:
    """A context in which marks were replaced, and `ctx_b` not capitalised, as the harness would have made it."""
    text = _without_double_stops(text)
    before, stop, last = text.rpartition(". ")
    if stop and last[:1].islower() and not re.search(r"[.!?][\"']?$", last):
        return before + stop + last.capitalize()
    return text


def wikitext_pages(text: str) -> list[dict[str, str]]:
    """WikiText cut before every heading of the first level (`= Title =`), as EleutherAI/wikitext_document_level is."""
    pages: list[str] = []
    lines: list[str] = []
    for line in text.replace("\r\n", "\n").split("\n"):
        heading = line.strip()
        first_level = heading.startswith("= ") and heading.endswith(" =")
        if first_level and not heading.startswith("= =") and not heading.endswith("= ="):
            if "".join(lines).strip():
                pages.append("\n".join(lines))
            lines = []
        lines.append(line)
    return [{"page": page} for page in [*pages, "\n".join(lines)]]


def _without_double_stops(text: str) -> str:
    return re.sub(r"(?<!\.)\.\.(?!\.)", ".", text)


def _check_fields(path: Path, rows: Sequence[dict[str, Any]], fields: Sequence[str]) -> None:
    """Raises SpiralError for a row without one of the fields: a template would write `None` in its place."""
    for number, row in enumerate(rows, start=1):
        missing = [field for field in fields if row.get(field) is None]
        if missing:
            raise SpiralError(f"{path}: row {number} has no {missing[0]!r}; allowed: rows with {', '.join(fields)}")


def _json_lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(lines_of(_read(path)), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise SpiralError(f"{path}: line {number} is {line[:40]!r}; allowed: a JSON object per line")
        rows.append(row)
    return rows


def _read(path: Path) -> str:
    try:
        return decoded(path.read_bytes())
    except (OSError, UnicodeDecodeError) as error:
        raise SpiralError(f"{path} cannot be read ({error})") from error
