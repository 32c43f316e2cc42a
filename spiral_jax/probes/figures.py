"""Findings as figures: the SpiralFormer paper's figure 4, MeSH's figures 3 to 5, and the weights of routers and chunks.

Matplotlib's object-oriented interface: no pyplot, so no global state and no display.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spiral_jax.errors import SpiralError
from spiral_jax.probes.measure import Findings

HEADS, STATES, WEIGHTS, BESIDE = "heads.png", "states.png", "weights.png", "beside.png"
_TITLES = {"entropy": "key-marginal entropy", "local_mass": "local attention mass"}
_COLORS = {"entropy": "tab:blue", "local_mass": "tab:orange"}


def check_matplotlib() -> None:
    """Raises SpiralError if it is not installed."""
    _figure_class()


def draw_findings(findings: Findings, name: str, folder: Path) -> None:
    """Writes `HEADS`, `STATES` and `WEIGHTS` into a folder that exists.

    Args:
      findings: what to show.
      name: of the model, for the titles.
      folder: where to.

    Raises:
      OSError: they cannot be written.
    """
    of = f"{findings.config.notation} {findings.config.topology}"
    title = f"{name}: {of}, {findings.samples:,} x {findings.length:,} tokens"
    _save(_heads_of([(name, findings)]), folder / HEADS, title)
    _save(_states_of(findings), folder / STATES, title)
    _save(_weights_of(findings), folder / WEIGHTS, title)


def draw_beside(models: Sequence[tuple[str, Findings]], folder: Path) -> None:
    """Writes `BESIDE`: the heads of several models, each with its name, side by side on the same scales."""
    _save(_heads_of(models), folder / BESIDE, "")


def _heads_of(models: Sequence[tuple[str, Findings]]) -> Any:
    """A row for each metric; for each model a column of all heads and one of the dynamic ones."""
    metrics = list(models[0][1].metrics)
    columns = [(name, findings, only) for name, findings in models for only in ("all heads", "dynamic heads")]
    figure = _figure_class()(figsize=(4.2 * len(columns), 7), layout="constrained")
    grid = figure.subplots(len(metrics), len(columns), squeeze=False, sharey="row")
    for row, metric in zip(grid, metrics, strict=True):
        for axes, (name, findings, only) in zip(row, columns, strict=True):
            value_TxN = findings.metrics[metric].reshape(findings.config.num_iterations, -1)
            if only == "dynamic heads":
                value_TxN = value_TxN[:, findings.dynamic[metric].ravel()]
            _distributions(axes, value_TxN, _COLORS[metric])
            uniform_T = findings.uniform[metric]
            axes.plot(range(len(uniform_T)), uniform_T, "--", color="gray", linewidth=1, label="equal weights")
            labels = [f"{t}\nr = {r}" for t, r in enumerate(findings.resolutions)]
            axes.set_xticks(range(len(labels)), labels)
            model = f"{name}\n{findings.config.notation}\n" if len(models) > 1 else ""
            if metric == metrics[0]:
                axes.set_title(f"{model}{only} ({value_TxN.shape[1]})", fontsize="medium")
            axes.grid(axis="y", alpha=0.3)
        row[0].set_ylabel(_TITLES[metric])
    for axes in grid[-1]:
        axes.set_xlabel("iteration")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower right", ncols=2)
    return figure


def _distributions(axes: Any, value_TxN: np.ndarray, color: str) -> None:
    """For each iteration a ridge and a box of its heads, and a line through the means."""
    places = np.arange(len(value_TxN))
    if value_TxN.shape[1] > 1:
        ridges = axes.violinplot(list(value_TxN), places + 0.08, side="high", widths=0.75, showextrema=False)
        for body in ridges["bodies"]:
            body.set(facecolor=color, edgecolor="none", alpha=0.3)
    boxes = axes.boxplot(
        list(value_TxN),
        positions=places,
        widths=0.14,
        patch_artist=True,
        manage_ticks=False,
        flierprops={"markersize": 2},
    )
    for box in boxes["boxes"]:
        box.set(facecolor="white", edgecolor=color)
    axes.plot(places, value_TxN.mean(axis=1), "o-", color="black", markersize=4, linewidth=1.2, label="mean of heads")
    axes.set_xlim(-0.5, len(places) - 0.3)


def _states_of(findings: Findings) -> Any:
    """MeSH's figures 3 to 5: relative updates, CKA, spectra."""
    figure = _figure_class()(figsize=(16, 4.8), layout="constrained")
    updates, alignment, spectra = figure.subplots(1, 3)
    labels = [f"core {t}\nr = {r}" for t, r in enumerate(findings.resolutions)]
    updates.bar(["prelude", *labels, "coda"], findings.update_R, color="tab:blue")
    updates.set(title="size of updates", ylabel="2 |f(h) - h| / (|f(h)| + |h|)", ylim=(0, 2))
    updates.grid(axis="y", alpha=0.3)

    image = _numbers(alignment, findings.cka_rbf_SxS, limits=(0, 1))
    alignment.set_xticks(range(len(findings.states)), findings.states, rotation=45)
    alignment.set_yticks(range(len(findings.states)), findings.states)
    alignment.set(title="CKA of states (RBF kernel)")
    figure.colorbar(image, ax=alignment)

    colors = _shades(len(findings.states))
    for state, value_R, color in zip(findings.states, findings.singular_values_SxR, colors, strict=True):
        # A log scale has no place for zeros.
        spectra.plot(np.arange(1, len(value_R) + 1), np.maximum(value_R, 1e-12), color=color, label=state)
    spectra.set(title="singular values of states", xlabel="rank", ylabel="over the largest", yscale="log")
    spectra.grid(alpha=0.3)
    spectra.legend(fontsize="small")
    return figure


def _weights_of(findings: Findings) -> Any:
    """Routers as tables of where x index; pooling and allocation by place, a line for each iteration."""
    by_name: dict[str, dict[str, np.ndarray]] = {}
    for name, mean_W in findings.weights.items():
        kind, where = name.rsplit(".", 1)
        by_name.setdefault(kind, {})[where] = mean_W
    figure = _figure_class()(figsize=(4.6 * max(len(by_name), 1), 4.4), layout="constrained")
    grid = figure.subplots(1, max(len(by_name), 1), squeeze=False)[0]
    if not by_name:
        grid[0].axis("off")
        grid[0].text(0.5, 0.5, "its operators show no weights", ha="center", transform=grid[0].transAxes)
    for axes, (kind, of_where) in zip(grid, by_name.items(), strict=False):
        if kind in ("pooling", "allocation"):
            for (where, mean_G), color in zip(of_where.items(), _shades(len(of_where)), strict=True):
                label = f"iteration {where}, r = {findings.resolutions[int(where)]}"
                axes.plot(range(len(mean_G)), mean_G * len(mean_G), "o-", markersize=3, color=color, label=label)
            low, high = axes.get_ylim()
            axes.set_ylim(min(low, 0.9), max(high, 1.1))  # a hair's breadth should look like one
            axes.set(title=kind, xlabel="place in the chunk", ylabel="mean weight times chunk size")
            axes.grid(alpha=0.3)
            axes.legend(fontsize="small")
        else:
            width = max(map(len, of_where.values()))
            table = np.full((len(of_where), width), np.nan)
            for row, mean_W in zip(table, of_where.values(), strict=True):
                row[: len(mean_W)] = mean_W
            _numbers(axes, table, limits=(0, 1))
            axes.set_yticks(range(len(of_where)), of_where)
            axes.set_xticks(range(width))
            axes.set(title=f"{kind}: mean weights", ylabel="iteration", xlabel="slot" if width > 1 else "")
    return figure


def _numbers(axes: Any, value_RxC: np.ndarray, limits: tuple[float, float]) -> Any:
    """A table in colours, with the numbers if there is room for them."""
    image = axes.imshow(value_RxC, vmin=limits[0], vmax=limits[1], cmap="viridis", aspect="auto")
    if max(value_RxC.shape) <= 12:
        for (row, column), value in np.ndenumerate(value_RxC):
            color = "black" if value > sum(limits) / 2 else "white"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=color, fontsize="small")
    return image


def _shades(count: int) -> Any:
    """Colours in an order that shows."""
    from matplotlib import colormaps

    return colormaps["viridis"](np.linspace(0, 0.9, count))


def _save(figure: Any, path: Path, title: str) -> None:
    if title:
        figure.suptitle(title)
    with path.open("wb") as file:
        figure.savefig(file, format="png", dpi=120)


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SpiralError("probe needs matplotlib: pip install 'spiral_jax[plot]'") from None
    return Figure
