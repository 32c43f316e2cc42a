"""The pictures of a report. matplotlib (extra `plot`) is used without pyplot: no display, no global state."""

import io
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from experiments.report.document import Figure
from experiments.report.evidence import TEXT, Arm, Evidence
from experiments.report.findings import COSTS, Cost, Finding, cost, frontier, power_law
from experiments.report.tables import accuracy, by_depth, matched
from experiments.statistics import Interval, PowerLaw, pareto
from spiral_jax.errors import SpiralError

NATS = "loss on held-out text, nats per token"
DPI = 110
_PAPERS_BEST_RATIOS = (0.3, 0.4)


def _figure(width: float = 8.0, height: float = 4.8) -> Any:
    try:
        from matplotlib.figure import Figure as Canvas
    except ImportError:
        raise SpiralError("the report's figures need matplotlib: pip install 'spiral_jax[plot]'") from None
    return Canvas(figsize=(width, height), layout="constrained")


def _png(canvas: Any) -> bytes:
    file = io.BytesIO()
    # Without the version of matplotlib in it, so that equal pictures are equal files.
    canvas.savefig(file, format="png", dpi=DPI, metadata={"Software": None})
    return file.getvalue()


def series(arm: Arm) -> str:
    """What an arm is one point of: arms of a family, on one task, are of one colour."""
    family = f"ratio {arm.factors['ratio']:g}" if "ratio" in arm.factors else arm.family
    return f"{arm.task} {family}".strip()


class Colours:
    """A colour for each series of a study, the same in every figure."""

    def __init__(self, evidence: Evidence):
        names = dict.fromkeys(map(series, evidence.arms.values()))
        few = [f"C{i}" for i in range(10)]
        if len(names) > len(few):
            from matplotlib import colormaps

            few = list(colormaps["viridis"](np.linspace(0, 0.95, len(names))))
        self._of = dict(zip(names, few, strict=False))

    def __getitem__(self, arm: Arm) -> Any:
        return self._of[series(arm)]


def all_figures(found: list[Finding], evidence: Evidence) -> tuple[list[Figure], list[str]]:
    """The figures for which there are numbers, and a line for each other one that says what is missing."""
    colours, figures, missing = Colours(evidence), [], []
    drawings: list[Callable[[], Figure | str]] = [
        lambda: contrasts(found),
        lambda: loss_curves(evidence, colours),
        lambda: learning_rates(evidence, colours),
        lambda: loss_against_flops(evidence, colours),
        lambda: pareto_fronts(evidence, colours),
        lambda: recurrence_ratio(evidence),
        lambda: accuracy_against_parameters(evidence, colours),
        lambda: accuracy_by_depth(evidence, colours),
    ]
    for draw in drawings:
        drawn = draw()
        if isinstance(drawn, Figure):
            figures.append(drawn)
        else:
            missing.append(drawn)
    return figures, missing


def contrasts(found: list[Finding]) -> Figure | str:
    """Every contrast's interval, with the seeds that it is made of."""
    there = [finding for finding in found if isinstance(finding.interval, Interval)]
    if not there:
        return "differences between arms: no contrast has a pair of runs"
    canvas = _figure(8.5, 1.5 + 0.5 * len(there))
    axes = canvas.add_subplot()
    for place, finding in enumerate(reversed(there)):
        interval = finding.interval
        assert isinstance(interval, Interval)
        colour = {"replicated": "tab:green", "exploratory": "tab:blue"}.get(finding.label, "tab:gray")
        if interval.seeds > 1:
            axes.plot([interval.low, interval.high], [place, place], color=colour, linewidth=2.5, solid_capstyle="butt")
        axes.plot(list(finding.of_seeds.values()), [place + 0.2] * interval.seeds, "|", color="black", markersize=6)
        axes.plot([interval.mean], [place], "o", color=colour)
        axes.annotate(
            finding.label, (1.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=9, color=colour
        )
    names = [f"{f.contrast.arm} - {f.contrast.against}{' (primary)' if f.primary else ''}\n{matched(f)}" for f in there]
    axes.set_yticks(range(len(there)), reversed(names), fontsize=8)
    axes.set_ylim(-0.6, len(there) - 0.4)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.grid(axis="x", alpha=0.3)
    axes.set(xlabel="difference in loss, nats per token (left of 0: the first arm is better)")
    axes.set_title("What differs, and how surely")
    note = "Bars are 95 % paired t intervals over seeds, dots their means, strokes the single seeds."
    return Figure("contrasts", "Differences between arms", note, _png(canvas))


def loss_curves(evidence: Evidence, colours: Colours) -> Figure | str:
    """Training loss against tokens, seed by seed."""
    arms = [arm for arm in evidence.arms.values() if any(run.curve for run in arm.runs.values())]
    if not arms:
        return "loss curves: no run has one"
    canvas = _figure()
    axes = canvas.add_subplot()
    ends, starts, styles = [], [], _styles(arms)
    for arm in arms:
        for number, run in enumerate(run for run in arm.runs.values() if run.curve):
            curve = np.array(run.curve, dtype=float).reshape(-1, 3)
            window = max(1, len(curve) // 20)
            smooth = np.convolve(curve[:, 2], np.full(window, 1 / window), mode="valid")
            tokens = curve[window - 1 :, 1]
            label = arm.name if number == 0 else None
            axes.plot(tokens / 1e6, smooth, styles[arm.name], color=colours[arm], alpha=0.75, linewidth=1, label=label)
            ends.append(smooth[-1])
            starts.append(smooth[len(smooth) // 8])
    floors = {arm.task: arm.floor for arm in arms if arm.floor is not None}
    for task, floor in floors.items():
        axes.axhline(floor, color="black", linewidth=1, linestyle=":", label=f"least that {task} can cost")
    axes.set_ylim(min(*ends, *floors.values()) - 0.1, max(*starts, max(ends) + 0.1))
    axes.set(xlabel="tokens, millions", ylabel="training loss, nats per token", title="Loss curves")
    _finish(axes)
    note = "A line is a seed, smoothed over a twentieth of the run; the first eighth lies above the picture."
    if floors:
        note += " The dotted floor is what the true distribution costs on the held-out text."
    return Figure("loss_curves", "Training loss against tokens", note, _png(canvas))


def _styles(arms: list[Arm]) -> dict[str, str]:
    """A line style for each arm that tells it from others of its series."""
    seen: dict[str, int] = {}
    styles = {}
    for arm in arms:
        number = seen.setdefault(series(arm), 0)
        seen[series(arm)] += 1
        styles[arm.name] = ("-", "--", "-.", ":")[number % 4]
    return styles


def _finish(axes: Any) -> None:
    axes.grid(alpha=0.3)
    entries = len(axes.get_legend_handles_labels()[1])
    if entries > 8:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7)
    elif entries:
        axes.legend(fontsize=8)


def learning_rates(evidence: Evidence, colours: Colours) -> Figure | str:
    """Loss of the trials against the learning rate."""
    rates, lines = evidence.study.learning_rates, []
    for arm in evidence.arms.values():
        done = [(rate, arm.trials[rate].evaluation[TEXT].nats) for rate in rates
                if rate in arm.trials and TEXT in arm.trials[rate].evaluation]  # fmt: skip
        if done:
            lines.append((arm, done))
    if not lines:
        return "loss against the learning rate: no trials of it"
    canvas = _figure(7, 4.2)
    axes = canvas.add_subplot()
    for arm, done in lines:
        axes.plot(*zip(*done, strict=True), "o-", color=colours[arm], label=arm.name)
    axes.set_xscale("log")
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    title = f"Trials of the learning rate, seed {evidence.study.tuning_seed}"
    axes.set(xlabel="peak learning rate", ylabel=NATS, title=title)
    _finish(axes)
    note = "A lowest point at the left or right end may not be the best there is."
    return Figure("learning_rates", "Loss against the learning rate", note, _png(canvas))


def _with_losses(evidence: Evidence) -> list[Arm]:
    return [arm for arm in evidence.arms.values() if arm.nats()]


def loss_against_flops(evidence: Evidence, colours: Colours) -> Figure | str:
    """Loss against training FLOPs, with each series' power law and its band."""
    arms = _with_losses(evidence)
    if not arms:
        return "loss against FLOPs: no run was evaluated"
    canvas = _figure()
    axes = canvas.add_subplot()
    notes = []
    for name in dict.fromkeys(map(series, arms)):
        mine = [arm for arm in arms if series(arm) == name]
        for arm in mine:
            axes.plot(
                [cost(arm, "")["flops"]] * len(arm.nats()), arm.nats(), "o", color=colours[arm], markersize=4, alpha=0.7
            )
        law = power_law(*frontier(mine, "flops", ""))
        label = name
        if isinstance(law, PowerLaw):
            x = np.geomspace(*_span([cost(arm, "")["flops"] for arm in mine]), 100)
            axes.fill_between(x, *law.band(x), color=colours[mine[0]], alpha=0.15, linewidth=0)
            axes.plot(x, law.at(x), color=colours[mine[0]], linewidth=1.2)
            label = f"{name}: exponent {law.exponent:.3f} ({law.exponent_low:.3f} to {law.exponent_high:.3f})"
            notes.append(f"{name}: {law.points} points{f', floor {law.floor:.2f} nats' if law.floor else ''}")
        axes.plot([], [], "o-", color=colours[mine[0]], label=label)
    axes.set_xscale("log")
    axes.set(xlabel="training FLOPs", ylabel=NATS, title="Loss against training FLOPs")
    _finish(axes)
    fitted = (
        f"Lines are power laws through the best size of each budget, bands are at 95 % ({'; '.join(notes)})."
        if notes
        else "No power law: no family has three budgets."
    )
    return Figure("loss_flops", "Loss against training FLOPs", f"A dot is a seed. {fitted}", _png(canvas))


def _span(values: Sequence[float]) -> tuple[float, float]:
    return min(values) / 1.3, max(values) * 1.3


def pareto_fronts(evidence: Evidence, colours: Colours) -> Figure | str:
    """Loss against each cost, with the arms that no other beats joined."""
    every, on_slice = _with_losses(evidence), evidence.study.slices[0]
    if len(every) < 2:
        return "Pareto front: fewer than two arms were evaluated"
    titles: dict[Cost, str] = {of: COSTS[of] for of in ("parameters", "flops", "measured", "predicted")}
    titles["predicted"] += f"\non {on_slice}"
    known = [of for of in titles if not any(math.isnan(cost(arm, on_slice)[of]) for arm in every)]
    tasks = list(dict.fromkeys(arm.task for arm in every))
    canvas = _figure(3.4 * len(known), 4.4 * len(tasks))
    for place, (task, of) in enumerate(itertools.product(tasks, known)):
        axes = canvas.add_subplot(len(tasks), len(known), place + 1)
        arms = [arm for arm in every if arm.task == task]
        losses = [statistics.fmean(arm.nats()) for arm in arms]
        costs = [cost(arm, on_slice)[of] for arm in arms]
        front = pareto(costs, losses)
        axes.plot(
            [costs[i] for i in front], [losses[i] for i in front], color="gray", linewidth=1, drawstyle="steps-post"
        )
        for arm, x, loss in zip(arms, costs, losses, strict=True):
            axes.plot([x], [loss], "o", color=colours[arm])
            if len(arms) <= 8:
                axes.annotate(arm.name, (x, loss), xytext=(5, 3), textcoords="offset points", fontsize=7)
        if max(costs) > 8 * min(costs):
            axes.set_xscale("log")
            axes.tick_params(axis="x", which="minor", labelbottom=False)
        else:
            axes.ticklabel_format(axis="x", style="sci", scilimits=(-2, 4), useMathText=True)
        axes.margins(x=0.25, y=0.12)
        axes.set(xlabel=titles[of], ylabel=NATS if of == known[0] else "", title=task)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        if len(arms) > 8 and of == known[-1]:
            for name in dict.fromkeys(map(series, arms)):
                one = next(arm for arm in arms if series(arm) == name)
                axes.plot([], [], "o", color=colours[one], label=name)
            axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    canvas.suptitle("Pareto fronts: loss against what it costs", fontsize=11)
    note = "Means over seeds. The grey line joins the arms that no other beats in both: lower left is better."
    return Figure("pareto", "Pareto fronts", note, _png(canvas))


def recurrence_ratio(evidence: Evidence) -> Figure | str:
    """Loss against the share of layers that are in the loop, one line a budget."""
    arms = [arm for arm in _with_losses(evidence) if "ratio" in arm.factors]
    if not arms:
        return "recurrence-ratio curve: no arm of this study has a `ratio`"
    canvas = _figure()
    axes = canvas.add_subplot()
    axes.axvspan(*_PAPERS_BEST_RATIOS, color="tab:olive", alpha=0.15, label="best in the paper, 410M")
    for budget in dict.fromkeys(arm.factors.get("budget", "") for arm in arms):
        mine = sorted((arm for arm in arms if arm.factors.get("budget", "") == budget), key=_ratio)
        spread = [statistics.stdev(arm.nats()) if len(arm.nats()) > 1 else 0 for arm in mine]
        means = [statistics.fmean(arm.nats()) for arm in mine]
        label = f"{budget:.2g} FLOPs" if isinstance(budget, float) else str(budget)
        axes.errorbar(list(map(_ratio, mine)), means, spread, fmt="o-", capsize=3, label=label)
    axes.set(xlabel="layers in the loop / all layers", ylabel=NATS, title="Recurrence ratio at equal FLOPs")
    _finish(axes)
    note = "Means over seeds; bars are standard deviations over seeds."
    return Figure("recurrence_ratio", "Loss against the recurrence ratio", note, _png(canvas))


def _ratio(arm: Arm) -> float:
    return float(arm.factors["ratio"])


def accuracy_against_parameters(evidence: Evidence, colours: Colours) -> Figure | str:
    """Accuracy, mean over tasks, against non-embedding parameters."""
    points = []
    for arm in evidence.arms.values():
        shares = [100 * share for run in arm.runs.values() if not math.isnan(share := accuracy(run))]
        if shares:
            points.append((arm, shares))
    if not points:
        return "accuracy against parameters: no run was asked anything"
    canvas = _figure(7, 4.4)
    axes = canvas.add_subplot()
    for name in dict.fromkeys(series(arm) for arm, _ in points):
        mine = [
            (arm.any_run().parameters.non_embedding / 1e6, statistics.fmean(shares))
            for arm, shares in points
            if series(arm) == name
        ]
        one = next(arm for arm, _ in points if series(arm) == name)
        axes.plot(*zip(*sorted(mine), strict=True), "o-", color=colours[one], label=name)
    for arm, shares in points:
        x = [arm.any_run().parameters.non_embedding / 1e6] * len(shares)
        axes.plot(x, shares, "_", color=colours[arm], markersize=9)
    axes.set(xlabel="non-embedding parameters, millions", ylabel="correct answers, per cent")
    axes.set_title("Accuracy against parameters")
    _finish(axes)
    note = "Mean over tasks; dots are means over seeds, strokes the single seeds."
    return Figure("accuracy_parameters", "Accuracy against parameters", note, _png(canvas))


def accuracy_by_depth(evidence: Evidence, colours: Colours) -> Figure | str:
    """Accuracy against dependency depth, a panel a task."""
    arms = [arm for arm in evidence.arms.values() if any(run.by_depth for run in arm.runs.values())]
    tasks = sorted({task for arm in arms for run in arm.runs.values() for task in run.by_depth})
    if not tasks:
        return "accuracy by depth: no run has any"
    canvas = _figure(5.0 * len(tasks) + 1.5, 4.4)
    for place, task in enumerate(tasks):
        axes = canvas.add_subplot(1, len(tasks), place + 1)
        for arm in arms:
            shares = by_depth(arm, task)
            if shares:
                means = [100 * statistics.fmean(of_seeds) for of_seeds in shares.values()]
                spread = [100 * statistics.stdev(one) if len(one) > 1 else 0 for one in shares.values()]
                depths = [float(depth) if depth.isdigit() else depth for depth in shares]
                axes.errorbar(depths, means, spread, fmt="o-", capsize=3, color=colours[arm], label=arm.name)
        of = "level of the grammar" if task == "cfg3b" else "depth"
        axes.set(xlabel=of, ylabel="correct answers, per cent" if place == 0 else "", title=task)
        _finish(axes)
    note = "Means over seeds; bars are standard deviations over seeds."
    return Figure("by_depth", "Accuracy by depth of dependency, or level of the grammar", note, _png(canvas))
