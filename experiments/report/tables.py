"""The tables of a report, as values."""

import math
import statistics

from experiments.record import Record
from experiments.report import paper
from experiments.report.document import Cell, Column, Table
from experiments.report.evidence import TEXT, Arm, Evidence
from experiments.report.findings import COSTS, AtLeast, Cost, Finding, Missing, OnTheCurve, cost_of, gain, pairs
from experiments.statistics import Interval


def command_of(run: str, evidence: Evidence) -> str:
    """What makes a run of this study, whether it has a record or not."""
    study = evidence.study
    if run in evidence.records:
        return evidence.records[run].command
    return f"python -m experiments.study run {evidence.called} --edition={study.edition} --only={run}"


def _commands(arm: Arm, evidence: Evidence) -> str:
    names = [f"{arm.name}-seed{seed}" for seed in arm.seeds]
    return "; ".join(command_of(name, evidence) for name in names)


def main_table(found: list[Finding], evidence: Evidence) -> Table:
    """Table 1: every arm, with the paper's numbers beside ours and the differences."""
    rows, of_pair = [], pairs(found, evidence)
    has_floor = any(arm.floor is not None for arm in evidence.arms.values())
    for arm in evidence.arms.values():
        row: dict[str, Cell] = {"arm": arm.name, "seeds": f"{len(arm.runs)} of {len(arm.seeds)}"}
        # Absolute numbers are of the paper's models alone; of others only differences can stand beside its own.
        is_theirs = evidence.study.edition == "full" and "budget" not in arm.factors
        theirs = paper.row_of(arm.factors) if is_theirs else {}
        if arm.runs:
            row |= _counts(arm.any_run())
            row["learning_rate"] = f"{arm.any_run().learning_rate:g}{' (edge)' if arm.edge else ''}"
        losses = arm.nats()
        if losses:
            nats = statistics.fmean(losses)
            spread = statistics.stdev(losses) if len(losses) > 1 else "one seed"
            row |= {"nats": nats, "perplexity": math.exp(nats), "spread": spread}
            if arm.floor is not None:
                row["above_floor"] = nats - arm.floor
        if has_floor and arm.floor is None:
            row["above_floor"] = "-"
        finding = next((finding for finding in found if finding.contrast.arm == arm.name), None)
        row |= {"against": finding.contrast.against} | _difference(finding) if finding else {"against": "-"}
        if finding:
            pair = next(pair for pair in of_pair.values() if finding in pair)
            row |= {f"equal_{of}": _gain(gain(of, pair, evidence), of) for of in MATCHINGS}
        else:
            row |= {"mean": "-", "interval": "-", "label": "-"}
        row |= _beside_the_paper(arm, theirs)
        row["command"] = _commands(arm, evidence)
        rows.append(row)
    columns = [
        Column("arm", "arm"),
        Column("seeds", "seeds"),
        Column("total_millions", "parameters, M", ".2f"),
        Column("non_embedding_millions", "non-embedding, M", ".2f"),
        Column("train_flops", "training FLOPs", ".3g"),
        Column("tokens_millions", "tokens, M", ",.1f"),
        Column("learning_rate", "peak learning rate"),
        Column("nats", "nats per token", ".4f"),
        *[Column("above_floor", "above the floor, nats", ".4f")] * has_floor,
        Column("spread", "s over seeds", ".4f"),
        Column("perplexity", "perplexity", ".2f"),
        Column("against", "against"),
        Column("mean", "difference, nats", "+.4f"),
        Column("interval", "95 % interval"),
        Column("label", "label"),
    ]
    given = {key for row in rows for key in row}
    for name, title, form in _paper_columns():
        if f"{name}_paper" in given:
            columns += [
                Column(f"{name}_ours", f"{title}, ours", form),
                Column(f"{name}_paper", f"{title}, paper", form),
                Column(f"{name}_difference", "difference", f"+{form}"),
            ]
    note = (
        "Loss on held-out text, mean over seeds and over all tokens; s is the standard deviation over seeds. `(edge)`: "
        "the learning rate is the lowest or highest that was tried. `against`: the first contrast of this arm; the CSV "
        "file also has what it gains at equal FLOPs and seconds, which the table above has for all contrasts."
    )
    if has_floor:
        note += " The floor is what the true distribution costs on the same text: it is known where a grammar made it."
    if not any(key.endswith("_paper") for key in given):
        note += " None of these models is one of the paper's; its differences stand beside ours with the contrasts."
    return Table("main_table", "Table 1: all arms", note, tuple(columns), tuple(rows))


def _paper_columns() -> list[tuple[str, str, str]]:
    return [
        ("total_millions", "parameters, M", ".1f"),
        ("non_embedding_millions", "non-embedding, M", ".1f"),
        ("prefill_teraflop", "prefill TFLOP", ".2f"),
        *((name, title, ".2f") for name, title in paper.COLUMNS.items()),
    ]


def _counts(run: Record) -> dict[str, Cell]:
    return {
        "total_millions": run.parameters.total / 1e6,
        "non_embedding_millions": run.parameters.non_embedding / 1e6,
        "train_flops": run.flops.total,
        "tokens_millions": run.tokens / 1e6,
    }


def _beside_the_paper(arm: Arm, theirs: dict[str, str]) -> dict[str, Cell]:
    ours: dict[str, float] = {}
    if arm.runs:
        run = arm.any_run()
        # Training is three times a prefill, here of sequences as long as the paper's.
        ours["prefill_teraflop"] = run.flops.per_token * 4096 / 3 / 1e12
        ours["total_millions"] = run.parameters.total / 1e6
        ours["non_embedding_millions"] = run.parameters.non_embedding / 1e6
    if losses := arm.nats():
        ours["pile"] = math.exp(statistics.fmean(losses))  # what full editions are validated on
    of_runs = [paper.of_tasks(run.tasks) for run in arm.runs.values()]
    for name in dict.fromkeys(name for found in of_runs for name in found):
        ours[name] = statistics.fmean(found[name] for found in of_runs if name in found)
    row: dict[str, Cell] = {}
    for name, _, _ in _paper_columns():
        if name in theirs:
            mine, of_paper = ours.get(name, math.nan), float(theirs[name])
            row |= {f"{name}_ours": mine, f"{name}_paper": of_paper, f"{name}_difference": mine - of_paper}
    return row


def accuracy(run: Record) -> float:
    """Share of correct answers, mean over the study's own tasks, or else over the paper's without examples; or nan."""
    shares = []
    for depths in run.by_depth.values():
        if asked := sum(count for _, count in depths.values()):
            shares.append(sum(correct for correct, _ in depths.values()) / asked)
    return statistics.fmean(shares) if shares else paper.of_tasks(run.tasks).get("zero_shot", math.nan) / 100


def contrasts(found: list[Finding], evidence: Evidence) -> Table:
    """Every contrast with its interval and label."""
    rows = []
    for finding in found:
        contrast = finding.contrast
        row: dict[str, Cell] = {
            "arm": contrast.arm,
            "against": contrast.against,
            "matched": matched(finding),
            "remarks": "; ".join(finding.remarks),
        }
        row |= _difference(finding)
        row |= {f"ratio_{of}": ratio for of, ratio in finding.ratios.items()}
        row |= {f"seed_{seed}": nats for seed, nats in finding.of_seeds.items()}
        sizes = _papers_differences(finding, evidence)
        row["paper"] = _range(list(sizes.values())) if sizes else "-"
        row["command"] = "; ".join(
            _commands(evidence.arms[name], evidence) for name in (contrast.arm, contrast.against)
        )
        rows.append(row)
    columns = (
        Column("arm", "arm"),
        Column("against", "against"),
        Column("matched", "matched in"),
        Column("pairs", "pairs"),
        Column("mean", "difference, nats", "+.4f"),
        Column("interval", "95 % interval"),
        Column("document_error", "error from documents", ".4f"),
        Column("label", "label"),
        Column("paper", "paper's difference, nats"),
        Column("ratio_flops", "FLOPs, x", ".2f"),
        Column("ratio_measured", "measured seconds, x", ".2f"),
        Column("ratio_predicted", "predicted seconds, x", ".2f"),
        Column("remarks", "remarks"),
    )
    note = (
        "Difference in nats per token: negative where `arm` is better. The interval is a paired t interval over seeds "
        "of per-document differences; `error from documents` is the standard error that the choice of documents adds "
        "within one seed. `x`: how much of it `arm` took, `against` being 1. The paper's differences are logarithms of "
        "ratios of its Pile perplexities: at our size where it has it, at 410M for its table 2, otherwise at all four."
    )
    return Table("contrasts", "Contrasts", note, columns, tuple(rows))


def _difference(finding: Finding) -> dict[str, Cell]:
    """What a contrast came to, as cells of a row."""
    interval = finding.interval
    said: dict[str, Cell] = {"label": f"{finding.label}{' (primary)' if finding.primary else ''}"}
    if isinstance(interval, Missing):
        return said | {"interval": f"missing: {interval.why}"}
    return said | {
        "pairs": interval.seeds,
        "mean": interval.mean,
        "low": interval.low if math.isfinite(interval.low) else math.nan,
        "high": interval.high if math.isfinite(interval.high) else math.nan,
        "interval": ends(interval.low, interval.high),
        "document_error": interval.document_error,
    }


def _papers_differences(finding: Finding, evidence: Evidence) -> dict[str, float]:
    ours, theirs = (evidence.arms[name] for name in (finding.contrast.arm, finding.contrast.against))
    return paper.differences(ours.factors, theirs.factors, finding.contrast.matched)


def matched(finding: Finding) -> str:
    """In what the sides of a contrast are equal, in words."""
    return COSTS[cost_of(finding.contrast)] + (f" on {finding.contrast.slice}" if finding.contrast.slice else "")


def ends(low: float, high: float) -> str:
    """An interval as people read it."""
    return "one seed has none" if math.isinf(low) else f"{low:+.4f} to {high:+.4f}"


def _range(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:+.3f}" if low == high else f"{low:+.3f} to {high:+.3f}"


MATCHINGS: tuple[Cost, ...] = ("parameters", "flops", "predicted", "measured")


def matchings(found: list[Finding], evidence: Evidence) -> Table:
    """What is gained at equal parameters, compute and seconds, side by side."""
    rows = []
    for (ours, theirs), pair in pairs(found, evidence).items():
        row: dict[str, Cell] = {"arm": ours, "against": theirs}
        for of in MATCHINGS:
            row[of] = _gain(gain(of, pair, evidence), of)
        rows.append(row)
    columns = (
        Column("arm", "arm"),
        Column("against", "against"),
        *(Column(of, f"equal {COSTS[of]}") for of in MATCHINGS),
    )
    note = (
        "Difference in nats per token at equal cost, negative where `arm` is better, with its interval. `at least`: no "
        "pair is equal in this, but the better arm took less of it, and more training would not have made it worse. "
        "`by the curve`: against a power law through the other family's runs, with the law's 95 % band. Predicted "
        f"seconds are those of {evidence.study.slices[0]}, by roofline; measured ones those of the machine named above."
    )
    return Table("matchings", "Gain at equal parameters, compute and seconds", note, columns, tuple(rows))


def _gain(gained: Finding | AtLeast | OnTheCurve | Missing, of: Cost) -> str:
    match gained:
        case Finding(interval=Interval() as interval):
            declared = cost_of(gained.contrast) == of
            claim = gained.label if declared or gained.label == "not resolved" else "exploratory"
            return f"{interval.mean:+.4f} ({ends(interval.low, interval.high)}), {claim}"
        case AtLeast(finding=Finding(interval=Interval() as interval)):
            claim = gained.finding.label if gained.finding.label == "not resolved" else "exploratory"
            return f"at least {interval.mean:+.4f} (with {gained.ratio:.2f} x the {COSTS[of]}), {claim}"
        case OnTheCurve():
            is_open = gained.seeds < 2 or gained.low <= 0 <= gained.high
            claim = "not resolved" if is_open else "exploratory"
            return f"{gained.nats:+.4f} ({ends(gained.low, gained.high)}) by the curve, {claim}"
        case Missing():
            return f"missing: {gained.why}"
    raise AssertionError(gained)


def ablation(found: list[Finding], evidence: Evidence) -> Table:
    """Table 2: what each change costs, beside the paper's."""
    of_change = {finding.contrast.against: finding for finding in found}
    table, rows = paper.ablation(), []
    for arm in evidence.arms.values():
        change = arm.factors["change"]
        row: dict[str, Cell] = {"change": str(change), "nats": statistics.fmean(arm.nats()) if arm.nats() else math.nan}
        finding = of_change.get(arm.name)
        if finding and isinstance(finding.interval, Interval):
            interval = finding.interval  # of main against the change; here it is the change against main
            row |= {
                "difference": -interval.mean,
                "interval": ends(-interval.high, -interval.low),
                "label": finding.label,
            }
        elif finding:
            row |= {"label": "missing"}
        else:
            row |= {"difference": "main", "interval": "-", "label": "-"}
        if change in table:
            row["paper"] = float(table[change]["pile"])
            row["paper_difference"] = math.log(float(table[change]["pile"]) / float(table["main"]["pile"]))
        row["command"] = _commands(arm, evidence)
        rows.append(row)
    columns = (
        Column("change", "change"),
        Column("nats", "nats per token", ".4f"),
        Column("difference", "difference to main, nats", "+.4f"),
        Column("interval", "95 % interval"),
        Column("label", "label"),
        Column("paper", "paper, Pile perplexity", ".2f"),
        Column("paper_difference", "paper's difference, nats", "+.4f"),
    )
    note = (
        "Positive: the change makes it worse. The paper's differences are logarithms of ratios of perplexities at 410M."
    )
    return Table("ablation", "Table 2: one thing changed", note, columns, tuple(rows))


def learning_rates(evidence: Evidence) -> Table:
    """What every trial of a learning rate ended with."""
    rows = []
    for arm in evidence.arms.values():
        row: dict[str, Cell] = {"arm": arm.name}
        for rate in evidence.study.learning_rates:
            trial = arm.trials.get(rate)
            if trial is not None:
                done = TEXT in trial.evaluation and trial.status == "finished"
                row[f"{rate:g}"] = trial.evaluation[TEXT].nats if done else trial.status
        row["chosen"] = f"{arm.any_run().learning_rate:g}" if arm.runs else math.nan
        row["edge"] = f"the {arm.edge}: a better one may lie beyond" if arm.edge else "no" if arm.runs else math.nan
        rows.append(row)
    rates = [Column(f"{rate:g}", f"{rate:g}", ".4f") for rate in evidence.study.learning_rates]
    note = (
        f"Nats per token at seed {evidence.study.tuning_seed}, which is none of the seeds that count; every arm has "
        "the same trials. A best one at the edge of the grid is said here and in the remarks of its contrasts."
    )
    columns = (Column("arm", "arm"), *rates, Column("chosen", "chosen"), Column("edge", "at the edge of the grid"))
    return Table("learning_rates", "Trials of learning rates", note, columns, tuple(rows))


def depths(evidence: Evidence) -> Table:
    """Accuracy by depth of what an answer depends on: arms and tasks below each other."""
    rows = []
    for arm in evidence.arms.values():
        for task in sorted({task for run in arm.runs.values() for task in run.by_depth}):
            row: dict[str, Cell] = {"arm": arm.name, "task": task, "seeds": len(arm.runs)}
            for depth, shares in by_depth(arm, task).items():
                row[depth] = 100 * statistics.fmean(shares)
                row[f"{depth}_spread"] = 100 * statistics.stdev(shares) if len(shares) > 1 else math.nan
            rows.append(row)
    names = sorted({key for row in rows for key in row} - {"arm", "task", "seeds"}, key=_number)
    columns = [Column(name, name, ".1f") for name in names if not name.endswith("_spread")]
    asked = {(row["task"], key) for row in rows for key in row}
    for row in rows:  # a depth that a task does not have is not missing
        row |= {column.key: "-" for column in columns if (row["task"], column.key) not in asked}
    note = "Correct answers in per cent by depth, mean over seeds; the CSV file also has the standard deviations."
    fixed = (Column("arm", "arm"), Column("task", "task"), Column("seeds", "seeds"))
    return Table("by_depth", "Accuracy by depth", note, (*fixed, *columns), tuple(rows))


def by_depth(arm: Arm, task: str) -> dict[str, list[float]]:
    """Shares of correct answers by depth, one of each run, in the order of depth."""
    shares: dict[str, list[float]] = {}
    for run in arm.runs.values():
        for depth, (correct, count) in run.by_depth.get(task, {}).items():
            if count:
                shares.setdefault(depth, []).append(correct / count)
    return dict(sorted(shares.items(), key=lambda item: _number(item[0])))


def _number(name: str) -> tuple[float, str]:
    return (float(name), "") if name.replace(".", "", 1).isdigit() else (math.inf, name)


def runs(evidence: Evidence) -> Table:
    """Every run that was declared: how it ended, what it took, and the command that makes it."""
    rows = []
    for run in evidence.study.runs():
        record = evidence.records.get(run.name)
        row: dict[str, Cell] = {"run": run.name, "stage": run.stage, "seed": run.seed}
        row["command"] = f"`{command_of(run.name, evidence)}`"
        row["status"] = f"{record.status} {record.reason}".strip() if record else "missing"
        if record:
            row |= {
                "learning_rate": record.learning_rate,
                "nats": record.evaluation[TEXT].nats if TEXT in record.evaluation else math.nan,
                "measured": record.seconds.train or math.nan,
                "commit": record.code.commit,
                "package": record.code.package,
                "machine": record.machine,
            }
        rows.append(row)
    columns = (
        Column("run", "run"),
        Column("stage", "stage"),
        Column("seed", "seed"),
        Column("learning_rate", "peak learning rate", "g"),
        Column("status", "how it ended"),
        Column("nats", "nats per token", ".4f"),
        Column("measured", "measured seconds", ",.0f"),
        Column("command", "command"),
    )
    note = "The records, with per-document losses, lie in `records/` beside this page."
    return Table("runs", "Every run", note, columns, tuple(rows))
