"""What was measured on one chip beside what was predicted of it."""

import json
import os
from pathlib import Path
from typing import Any

# Measured over predicted, where a prediction counts as true.
STEP_SECONDS, PEAK_BYTES, CONSTANT = (0.75, 1.33), (0.9, 1.1), (0.75, 1.33)
Row = tuple[str, ...]
OK, NOT = "as expected", "NOT as expected"


def main(measured: str, predicted: str) -> int:
    """Prints the comparison of two files.

    Returns:
      0 if every section ran, passed, and was as predicted; else 1.

    Raises:
      OSError, ValueError: one of them cannot be read, or is something else.
    """
    found, predictions = _load(measured, "sections"), _load(predicted, "points")
    kind = found["sections"]["device"]["measured"]["device_kind"]
    print(f"{kind}, commit {found['commit'] or 'unknown'}, size {found['size']}")
    versions = {point["versions"]["libtpu"] for of in predictions["points"].values() for point in of.values()}
    ours = found["sections"]["device"]["measured"].get("versions", {}).get("libtpu")
    print(f"measured with libtpu {ours}, predicted with {', '.join(sorted(versions))}")
    rows, verdicts = compare(found, predictions)
    if rows:
        print_table([("", "measured", "predicted", "ratio", "verdict"), *rows])
        print()
    print_table([("section", "verdict", "why"), *((name, verdict, why) for name, (verdict, why) in verdicts.items())])
    return 0 if all(verdict == OK for verdict, _ in verdicts.values()) else 1


def compare(found: dict[str, Any], predictions: dict[str, Any]) -> tuple[list[Row], dict[str, tuple[str, str]]]:
    """The lines of the table of numbers, and each section's verdict with a reason."""
    generation = found["sections"]["device"]["measured"].get("generation")
    points = predictions["points"].get(generation or "", {})
    rows: list[Row] = []
    verdicts: dict[str, tuple[str, str]] = {}
    for name, section in found["sections"].items():
        verdict, why = (OK, "") if section["status"] == "passed" else (NOT, _reason(section))
        measured = section["measured"]
        expected: list[tuple[str, Any, Any, tuple[float, float]]] = []
        if section["status"] in ("passed", "failed") and name.startswith("point-"):
            point = points.get(name.removeprefix("point-"))
            if measured.get("is_rehearsal") or point is None:
                verdict, why = NOT, why or f"no prediction for {'a rehearsal' if generation is None else generation}"
            else:
                expected = [
                    (f"{name} s/step", measured["step_seconds"], point["step_seconds"], STEP_SECONDS),
                    (f"{name} peak GiB", _gib(measured["peak_bytes"]), _gib(point["peak_bytes"]), PEAK_BYTES),
                ]
        elif name == "speed" and section["status"] in ("passed", "failed"):
            for what, constant in predictions["constants"].get(generation, {}).items():
                if what in measured:
                    expected.append((what, measured[what]["constant"], constant, CONSTANT))
        for what, value, guess, (low, high) in expected:
            ratio = value / guess if value else None
            row_ok = ratio is not None and low <= ratio <= high
            rows.append((what, _show(value), _show(guess), _show(ratio), OK if row_ok else NOT))
            if not row_ok and verdict == OK:
                verdict, why = NOT, f"{what} is {_show(ratio)} of the prediction; allowed: {low} to {high}"
        verdicts[name] = (verdict, why)
    return rows, verdicts


def _reason(section: dict[str, Any]) -> str:
    """Why a section has not passed, in a line."""
    failed = [check for check in section["checks"] if not check["ok"]]
    if section.get("why"):
        return f"{section['status']}: {section['why']}"
    check = failed[0]
    more = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
    return f"{check.get('why') or '{what} is {found}; allowed: {allowed}'.format(**check)}{more}"


def _load(path: str, key: str) -> dict[str, Any]:
    found = json.loads(Path(os.path.expanduser(path)).read_text(encoding="utf-8"))
    if not isinstance(found, dict) or found.get("format") != 1 or key not in found:
        raise ValueError(f"{path} is something else; allowed: a file with format 1 and {key}")
    return found


def print_table(rows: list[Row]) -> None:
    """Columns as wide as they need to be."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _gib(size: float | None) -> float | None:
    return None if size is None else size / 2**30


def _show(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
