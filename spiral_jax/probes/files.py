"""Findings as files: NumPy arrays for programs, CSV for spreadsheets."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spiral_jax.probes.heads import window
from spiral_jax.probes.measure import Findings

ARRAYS = "probes.npz"
TABLES = ("heads.csv", "updates.csv", "cka.csv", "singular_values.csv", "weights.csv")


def write_findings(findings: Findings, folder: Path) -> None:
    """Writes `ARRAYS` and `TABLES` into a folder that exists.

    Raises:
      OSError: they cannot be written.
    """
    np.savez(folder / ARRAYS, allow_pickle=False, **arrays(findings))
    heads, updates, cka, values, weights = TABLES
    columns = (
        "iteration",
        "chunk",
        "layer",
        "head",
        *findings.metrics,
        *(f"dynamic_{name}" for name in findings.metrics),
    )
    _write(folder / heads, columns, _heads(findings))
    _write(folder / updates, ("block", "relative_update"), zip(findings.blocks, findings.update_R, strict=True))
    _write(folder / cka, ("state", "other", "cka_rbf", "cka_linear"), _pairs(findings))
    ranks = (
        (state, rank, value)
        for state, value_R in zip(findings.states, findings.singular_values_SxR, strict=True)
        for rank, value in enumerate(value_R)
    )
    _write(folder / values, ("state", "rank", "value"), ranks)
    means = (
        (*name.rsplit(".", 1), index, mean)
        for name, mean_W in findings.weights.items()
        for index, mean in enumerate(mean_W)
    )
    _write(folder / weights, ("weight", "where", "index", "mean"), means)


def arrays(findings: Findings) -> dict[str, Any]:
    """The arrays of `ARRAYS`, by name; none is an array of objects."""
    levels = findings.config.schedule
    return {
        "chunk_T": np.array([level.chunk for level in levels]),
        "length_T": np.array([level.num_chunks(findings.length) for level in levels]),
        "window_T": np.array([window(level) for level in levels]),
        **{f"{name}_TxCxH": value_TxCxH for name, value_TxCxH in findings.metrics.items()},
        **{f"uniform_{name}_T": value_T for name, value_T in findings.uniform.items()},
        **{f"dynamic_{name}_CxH": is_dynamic_CxH for name, is_dynamic_CxH in findings.dynamic.items()},
        "blocks_R": np.array(findings.blocks),
        "update_R": findings.update_R,
        "states_S": np.array(findings.states),
        "cka_rbf_SxS": findings.cka_rbf_SxS,
        "cka_linear_SxS": findings.cka_linear_SxS,
        "singular_values_SxR": findings.singular_values_SxR,
        **{f"{name}_W": mean_W for name, mean_W in findings.weights.items()},
    }


def _heads(findings: Findings) -> Iterable[Sequence]:
    T, C, H = findings.entropy_TxCxH.shape
    for t, layer, head in np.ndindex(T, C, H):
        values = [value_TxCxH[t, layer, head] for value_TxCxH in findings.metrics.values()]
        is_dynamic = [int(is_dynamic_CxH[layer, head]) for is_dynamic_CxH in findings.dynamic.values()]
        yield t, findings.config.chunks[t], layer, head, *values, *is_dynamic


def _pairs(findings: Findings) -> Iterable[Sequence]:
    for i, state in enumerate(findings.states):
        for j, other in enumerate(findings.states):
            yield state, other, findings.cka_rbf_SxS[i, j], findings.cka_linear_SxS[i, j]


def _write(path: Path, columns: Sequence[str], rows: Iterable[Sequence]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for row in rows:
            writer.writerow([f"{value:.6g}" if isinstance(value, float) else value for value in row])
