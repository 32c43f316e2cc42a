"""Writes the report of a study's edition from its records: Markdown, CSV, pictures, and all of it as one HTML page.

Study and records -> `evidence` (what counts) -> `findings` (contrasts, intervals, labels) -> `tables` and `figures` ->
a document -> `pages` (Markdown, HTML, CSV). docs/reports.md says what stands in it and by which rules.
"""

from pathlib import Path

from experiments.design import Study
from experiments.report import tables
from experiments.report.document import Block, Bullets, Document, Figure, Heading, Paragraph, Table
from experiments.report.evidence import TEXT, Evidence, gather
from experiments.report.figures import all_figures
from experiments.report.findings import Finding, findings
from experiments.report.pages import markdown, page, table_csv
from experiments.statistics import SEEDS_TO_REPLICATE, Interval
from spiral_jax.data import atomic
from spiral_jax.errors import require

MOST_BYTES = 1_000_000


def write_report(study: Study, records: Path, called: str = "") -> Path:
    """Writes a folder `report` beside the one of the records, in place of an earlier one.

    The same records give the same bytes.

    Args:
      study: an edition of a study.
      records: folder of its records, of which there may be none, some or all.
      called: the study on the command line, if that is not its name.

    Returns:
      The HTML page, `index.html`; beside it lie `README.md`, a CSV file for each table and a PNG file for each figure.

    Raises:
      SpiralError: matplotlib is not installed, or something cannot be written.
    """
    document = make_document(gather(study, records, called))
    contents = {"README.md": markdown(document).encode("utf-8"), "index.html": page(document).encode("utf-8")}
    for block in document.blocks:
        if isinstance(block, Table):
            contents[f"{block.name}.csv"] = table_csv(block).encode("utf-8")
        elif isinstance(block, Figure):
            contents[f"{block.name}.png"] = block.png
    for name, content in contents.items():
        require(len(content) < MOST_BYTES, name, f"{len(content)} bytes", f"under {MOST_BYTES}")
    folder = records.parent / "report"
    with atomic.whole_folder(folder) as partial:
        for name, content in contents.items():
            (partial / name).write_bytes(content)
    return folder / "index.html"


def make_document(evidence: Evidence) -> Document:
    """What the records say, for any way of showing it."""
    study, found = evidence.study, findings(evidence)
    figures, without = all_figures(found, evidence)
    drawn = {figure.name: figure for figure in figures}

    def section(title: str, *parts: Block | str) -> list[Block]:
        """Of blocks and names of figures those that there are; nothing if there is none."""
        there = [drawn.get(part) if isinstance(part, str) else part for part in parts]
        blocks = [part for part in there if part is not None]
        return [Heading(title), *blocks] if blocks else []

    factors = {name for arm in evidence.arms.values() for name in arm.factors}
    has_depth = any(run.by_depth for arm in evidence.arms.values() for run in arm.runs.values())
    blocks = [
        *_summary(found, evidence),
        *section("Contrasts", tables.contrasts(found, evidence), "contrasts"),
        *section("Equal parameters, compute and seconds", tables.matchings(found, evidence), "pareto"),
        *section("All arms", tables.main_table(found, evidence), "loss_curves"),
        *(section("What each part does", tables.ablation(found, evidence)) if "change" in factors else []),
        *section("Loss against training FLOPs", "loss_flops"),
        *section("Recurrence ratio", "recurrence_ratio"),
        *section("Accuracy", *([tables.depths(evidence)] if has_depth else []), "by_depth", "accuracy_parameters"),
        *(section("Learning rates", tables.learning_rates(evidence), "learning_rates") if study.learning_rates else []),
        *_what_is_not_there(found, without, evidence),
        *section("Runs and their commands", tables.runs(evidence)),
    ]
    return Document(f"{study.name}, {study.edition} edition", tuple(blocks))


def claim(finding: Finding) -> str:
    """A contrast as a sentence."""
    contrast, interval = finding.contrast, finding.interval
    pair = f"`{contrast.arm}` against `{contrast.against}` at equal {tables.matched(finding)}"
    if not isinstance(interval, Interval):
        return f"{pair}: missing, {interval.why}."
    seeds = (
        "1 seed" if interval.seeds == 1 else f"{interval.seeds} seeds, 95 % {tables.ends(interval.low, interval.high)}"
    )
    says = f"{pair}: {interval.mean:+.4f} nats per token ({seeds}): {finding.label}"
    if finding.label != "not resolved":
        says += f"; `{contrast.arm}` is {'better' if interval.mean < 0 else 'worse'}"
    return f"{says}.{' But: ' if finding.remarks else ''}{'; '.join(finding.remarks)}{'.' if finding.remarks else ''}"


def _summary(found: list[Finding], evidence: Evidence) -> list[Block]:
    study = evidence.study
    names = [run.name for run in study.runs()]
    done = sum(name in evidence.records and evidence.records[name].status == "finished" for name in names)
    machines = sorted({one.machine for one in evidence.records.values()})
    commits = sorted({one.code.commit[:12] for one in evidence.records.values()} - {""})
    lines = [
        f"Runs: {done} of {len(names)} finished. Seeds: {', '.join(map(str, study.seeds))}, each with one data order.",
        f"Machine: {'; '.join(machines) or 'none yet'}.",
        f"Code: commit {', '.join(commits) or 'unknown'}; what runs import was the same in all that count.",
        f"This page: `{_command(evidence)}`; every run's command stands at the end, and in each CSV file.",
    ]
    if study.exploratory:
        lines.append("The study is exploratory as a whole: nothing in it is more than something to test.")
    rules = (
        "Labels. `replicated`: the study's primary contrast, declared before its runs, at least "
        f"{SEEDS_TO_REPLICATE} paired seeds, interval without 0. `exploratory`: without 0, but not that. "
        "`not resolved`: the interval holds 0, or there is one seed. A label does not say which side is better."
    )
    return [
        Paragraph(study.question),
        Paragraph(f"Declared first, as the primary contrast: {claim(found[0])}"),
        Bullets(tuple(lines), ""),
        Paragraph(rules),
    ]


def _command(evidence: Evidence) -> str:
    return f"python -m experiments.study report {evidence.called} --edition={evidence.study.edition}"


def _what_is_not_there(found: list[Finding], without: list[str], evidence: Evidence) -> list[Block]:
    study = evidence.study
    against = [
        claim(finding)
        for finding in found
        if isinstance(finding.interval, Interval) and (finding.label == "not resolved" or finding.interval.mean > 0)
    ]
    failed = [
        f"`{one.run}` {one.status}: {one.reason or 'no reason given'}"
        for one in evidence.records.values()
        if one.status != "finished"
    ]
    missing = [
        f"`{run.name}`: `{tables.command_of(run.name, evidence)}`"
        for run in study.runs()
        if run.name not in evidence.records
    ]
    grid = ", ".join(f"{rate:g}" for rate in study.learning_rates)
    edges = [
        f"`{arm.name}`: the best learning rate is the {arm.edge} of {grid}"
        for arm in evidence.arms.values()
        if arm.edge
    ]
    gates = []
    for gate in study.gates:
        one = evidence.records.get(gate.run)
        if one is None:
            came = "missing"
        elif TEXT not in one.evaluation:
            came = f"{one.status}, not passed"
        else:
            nats = one.evaluation[TEXT].nats
            came = f"{nats:.4f}, {'passed' if nats <= gate.most_nats else 'not passed'}"
        gates.append(f"`{gate.run}`: at most {gate.most_nats:.4f} nats ({gate.why}): {came}")
    return [
        Heading("Negative and open results"),
        Bullets(tuple(against), "None: every contrast that has runs is resolved, and as expected."),
        Heading("Runs that did not finish, and runs that are missing"),
        Bullets((*failed, *missing), "None."),
        Heading("Left out: damaged records, and those of other code, data or configuration"),
        Bullets(evidence.left_out, "None."),
        Heading("Uneven"),
        Bullets(
            (*edges, *evidence.remarks),
            "Nothing: no learning rate at the edge of its grid, one machine, one set of versions.",
        ),
        Heading("Gates"),
        Bullets(tuple(gates), "None were declared."),
        Heading("Figures without numbers"),
        Bullets(tuple(f"missing: {line}" for line in without), "None."),
    ]
