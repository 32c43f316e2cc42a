"""Contrasts of a study as its records answer them: difference, interval, label, and what each side cost."""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Literal

import numpy as np

from experiments.design import Contrast, is_over
from experiments.report.evidence import TEXT, Arm, Evidence
from experiments.statistics import Interval, Label, PowerLaw, fit_power_law, label, paired_interval, seed_difference
from spiral_jax.errors import SpiralError

# Budgets end at whole steps; two costs further apart than this are not equal.
TOLERANCE = 0.03
_LEAST_WITH_FLOOR = 6  # points of a power law before a floor is fitted, too

Cost = Literal["parameters", "tokens", "flops", "predicted", "measured"]
COSTS: dict[Cost, str] = {
    "parameters": "non-embedding parameters",
    "tokens": "tokens",
    "flops": "training FLOPs",
    "predicted": "predicted seconds",
    "measured": "measured seconds",
}


@dataclasses.dataclass(frozen=True)
class Missing:
    """What is not there, and why not."""

    why: str


@dataclasses.dataclass(frozen=True)
class Finding:
    """One contrast.

    Attributes:
      contrast: as declared.
      primary: whether it is the declared primary one.
      interval: the difference in nats per token, negative where the first arm is better.
      label: of the claim; "missing" where there is no interval.
      of_seeds: the differences by seed.
      ratios: first arm / second by COSTS; nan where unknown.
      remarks: what weakens the claim.
    """

    contrast: Contrast
    primary: bool
    interval: Interval | Missing
    label: Label | Literal["missing"]
    of_seeds: dict[int, float]
    ratios: dict[Cost, float]
    remarks: tuple[str, ...]


def findings(evidence: Evidence) -> list[Finding]:
    """All declared contrasts, the primary one first."""
    study = evidence.study
    return [_finding(contrast, evidence) for contrast in (study.primary, *study.others)]


def _finding(contrast: Contrast, evidence: Evidence) -> Finding:
    study, ours, theirs = evidence.study, evidence.arms[contrast.arm], evidence.arms[contrast.against]
    primary = contrast == study.primary
    differences, remarks = [], []
    for seed in sorted(ours.runs.keys() & theirs.runs.keys()):
        found = [arm.runs[seed].evaluation.get(TEXT) for arm in (ours, theirs)]
        if found[0] is None or found[1] is None:
            remarks.append(f"seed {seed} was not evaluated on both sides")
        elif found[0].tokens != found[1].tokens:
            remarks.append(f"seed {seed} was evaluated on other documents")
        else:
            of_documents = seed_difference(seed, found[0].documents, found[1].documents, found[0].tokens)
            # Documents are kept in float16, and not all of very many: they tell the error, not the difference.
            differences.append(dataclasses.replace(of_documents, nats=found[0].nats - found[1].nats))
    on_slice = contrast.slice or study.slices[0]
    costs = [cost(arm, on_slice) for arm in (ours, theirs)]
    ratios = {of: costs[0][of] / costs[1][of] for of in COSTS}
    if not differences:
        lacking = [arm.name for arm in (ours, theirs) if not arm.runs]
        if lacking:
            why = f"no finished run of {' and '.join(lacking)}"
        else:
            why = "; ".join(remarks) or "no seed that both have"
        return Finding(contrast, primary, Missing(why), "missing", {}, ratios, tuple(remarks))
    interval = paired_interval(differences)
    return Finding(
        contrast,
        primary,
        interval,
        label(interval, primary=primary and not study.exploratory and not ours.diverged and not theirs.diverged),
        {difference.seed: difference.nats for difference in differences},
        ratios,
        (*remarks, *_unevenness(contrast, ours, theirs, ratios, len(study.learning_rates))),
    )


def cost(arm: Arm, on_slice: str) -> dict[Cost, float]:
    """What a run of an arm has and spends; nan where that is unknown."""
    if not arm.runs:
        return dict.fromkeys(COSTS, math.nan)
    run = arm.any_run()
    return {
        "parameters": float(run.parameters.non_embedding),
        "tokens": float(run.tokens),
        "flops": run.flops.total,
        "predicted": arm.predicted_seconds(on_slice),
        "measured": arm.measured_seconds(),
    }


def cost_of(contrast: Contrast) -> Cost:
    """In what the two arms are matched."""
    return "predicted" if contrast.matched == "seconds" else contrast.matched


def equal(ratio: float) -> bool:
    """Whether two costs are as good as equal; not if one is unknown."""
    return abs(ratio - 1) <= TOLERANCE


def _unevenness(contrast: Contrast, ours: Arm, theirs: Arm, ratios: dict[Cost, float], rates: int) -> list[str]:
    """What makes the two sides of a contrast, for which so many learning rates were to be tried, less alike."""
    of, remarks = cost_of(contrast), []
    if math.isnan(ratios[of]):
        remarks.append(f"{COSTS[of]} of one side are unknown")
    elif not equal(ratios[of]):
        remarks.append(f"not matched: {ratios[of]:.2f} x the {COSTS[of]}")
    for arm in (ours, theirs):
        if arm.edge:
            remarks.append(f"the learning rate of {arm.name} is the {arm.edge} tried, a better one may lie beyond")
        if arm.missing_seeds:
            remarks.append(f"{arm.name} lacks seed {', '.join(map(str, arm.missing_seeds))}")
        if arm.diverged:
            seeds = ", ".join(map(str, arm.diverged))
            remarks.append(f"{arm.name} diverged with seed {seeds}: the others are a choice")
    for arm in (ours, theirs):
        tried = sum(map(is_over, arm.trials.values()))
        if tried != rates:
            remarks.append(f"of {rates} learning rates {tried} were tried with {arm.name}")
    return remarks


@dataclasses.dataclass(frozen=True)
class AtLeast:
    """A difference at equal cost of which one side is known: the better arm spent less.

    Attributes:
      finding: the contrast at another matching.
      ratio: of the cost that should be equal, first arm / second.
    """

    finding: Finding
    ratio: float


@dataclasses.dataclass(frozen=True)
class OnTheCurve:
    """A loss beside what another family loses at the same cost, by the power law through that family's arms.

    Attributes:
      nats: ours minus the law; negative where ours is better.
      low, high: with the law's confidence band; the luck of our own seeds is not in it.
      points: of the law.
      seeds: of ours.
    """

    nats: float
    low: float
    high: float
    points: int
    seeds: int


Gain = Finding | AtLeast | OnTheCurve | Missing


def gain(of: Cost, pair: list[Finding], evidence: Evidence) -> Gain:
    """What the first of two families gains at equal cost, by the best evidence that there is.

    In this order: a contrast that is matched in this cost; one that happens to be; of compute and seconds, one whose
    better arm spent less, so that the gain is at least that much, as more training would not have made it worse; the
    other family's power law.

    Args:
      of: the cost.
      pair: contrasts of the two families at one size, in whatever matching.
      evidence: the study's.
    """
    there = [finding for finding in pair if isinstance(finding.interval, Interval)]
    for fits in (lambda finding: cost_of(finding.contrast) == of, lambda finding: equal(finding.ratios[of])):
        for finding in there:
            if fits(finding):
                return finding
    if of not in ("flops", "predicted", "measured"):
        return Missing("no contrast matched in this")
    for finding in there:
        if _is_bound(finding, of):
            return AtLeast(finding, finding.ratios[of])
    ours, theirs = evidence.arms[pair[0].contrast.arm], evidence.arms[pair[0].contrast.against]
    family = [arm for arm in evidence.arms.values() if (arm.family, arm.task) == (theirs.family, theirs.task)]
    found = _on_the_curve(ours, family, of, evidence.study.slices[0])
    ratio = pair[0].ratios[of]
    return Missing(f"{ratio:.2f} x; {found.why}") if isinstance(found, Missing) and ratio == ratio else found


def _is_bound(finding: Finding, of: Cost) -> bool:
    assert isinstance(finding.interval, Interval)
    return finding.interval.mean * (finding.ratios[of] - 1) > 0


def _on_the_curve(arm: Arm, family: list[Arm], of: Cost, on_slice: str) -> OnTheCurve | Missing:
    points, here = frontier(family, of, on_slice), cost(arm, on_slice)[of]
    if not arm.nats() or math.isnan(here):
        return Missing(f"nothing says the {COSTS[of]} of {arm.name}" if arm.runs else f"no finished run of {arm.name}")
    law = power_law(*points)
    if isinstance(law, str):
        return Missing("no pair, and no curve through 3 budgets")
    if not min(points[0]) / 2 <= here <= max(points[0]) * 2:
        return Missing("no pair, and outside the other family's budgets")
    (middle,), ((low,), (high,)) = law.at(np.array([here])), law.band(np.array([here]))
    nats = statistics.fmean(arm.nats())
    return OnTheCurve(nats - float(middle), nats - float(high), nats - float(low), law.points, len(arm.nats()))


def frontier(family: list[Arm], of: Cost, on_slice: str) -> tuple[list[float], list[float]]:
    """What a family's power law is fitted to: for each budget, or number of FLOPs, the best of its arms.

    Args:
      family: arms of several sizes and budgets, with or without runs.
      of: the cost.
      on_slice: for predicted seconds.

    Returns:
      Costs, and losses in nats per token, means over seeds.
    """
    best: dict[float, tuple[float, float]] = {}
    for arm in family:
        here = cost(arm, on_slice)
        if arm.nats() and not math.isnan(here[of]):
            budget = float(arm.factors.get("budget", here["flops"]))
            point = (statistics.fmean(arm.nats()), here[of])
            best[budget] = min(point, best.get(budget, point))
    losses, costs = zip(*best.values(), strict=True) if best else ((), ())
    return list(costs), list(losses)


def power_law(costs: Sequence[float], losses: Sequence[float]) -> PowerLaw | str:
    """The law through a frontier, with a floor where there are points enough for one; or why there is none."""
    try:
        return fit_power_law(costs, losses, with_floor=len(costs) >= _LEAST_WITH_FLOOR)
    except SpiralError as error:
        return str(error)


def pairs(found: list[Finding], evidence: Evidence) -> dict[tuple[str, str], list[Finding]]:
    """Contrasts by what is compared, whatever they are matched in: families at one task, size and budget."""
    grouped: dict[tuple[str, str], list[Finding]] = {}
    for finding in found:
        ours, theirs = evidence.arms[finding.contrast.arm], evidence.arms[finding.contrast.against]
        grouped.setdefault((_kind(ours), _kind(theirs)), []).append(finding)
    return grouped


def _kind(arm: Arm) -> str:
    if "family" not in arm.factors:
        return arm.name
    budget = [f"at {arm.factors['budget']:g} FLOPs"] if "budget" in arm.factors else []
    return " ".join([*(str(arm.factors[name]) for name in ("task", "size", "family") if name in arm.factors), *budget])
