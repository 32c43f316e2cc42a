"""Studies: what they will take, their runs, where they stand, and what came of them.

python -m experiments.study plan main_table --edition=full        runs, tokens, FLOPs, hours; starts nothing
python -m experiments.study run main_table                        one run after another, here; again to go on
python -m experiments.study launch main_table --edition=full ...  on TPU slices, through tpu/
python -m experiments.study status main_table                     what is there and what is missing
python -m experiments.study report main_table                     Markdown, CSV and HTML from the records

A study is a file in experiments/studies/ (docs/studies.md).
"""

import argparse
import fnmatch
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import logging

from experiments import matching
from experiments.child import ROOT, Stopped
from experiments.design import Run, Study, is_over, load
from experiments.elsewhere import check_overrides, job_name
from experiments.record import RESULTS, folder_of
from experiments.runner import ASKED, OK, Places, Runner, outcome
from spiral_jax.data.storage import reachable_path
from spiral_jax.errors import SpiralError, require
from spiral_jax.evaluation import catalogue
from spiral_jax.hardware import parse_slice
from spiral_jax.progress import duration
from tpu.job import Parser, match

# FLOP/s of small models on two cores, by a trial of main_table's (800 steps of its vanilla in 3 minutes).
CPU_FLOPS = 1.2e11
# Of each run beside its steps on two cores: starting, compiling, evaluating.
CPU_START_SECONDS = 45
VERBS = ("plan", "run", "launch", "status", "report")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status, as of every verb of the framework."""
    jax.config.update("jax_platforms", "cpu")  # whatever computes is a child, and devices are theirs
    logging.set_verbosity(logging.ERROR)  # of orbax, as in every verb
    try:
        return _main(list(sys.argv[1:] if arguments is None else arguments))
    except SpiralError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print("stopped; the same command goes on", file=sys.stderr)
        return 128 + stopped.number
    except KeyboardInterrupt:
        return 130


def _main(arguments: list[str]) -> int:
    parser = Parser(
        prog="python -m experiments.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=VERBS, metavar="VERB")
    parser.add_argument("study", metavar="STUDY", help="name of a file in experiments/studies/, or a path")
    parser.add_argument("--edition", default="small", help="small (two cores) or full (TPU slices)")
    parser.add_argument("--only", default="", help="names of runs, apart by commas; * and ? stand for anything")
    parser.add_argument("--slice", default="", help="plan, launch: TPU slice, as v5p:4x4x4; default: the study's")
    parser.add_argument("--work", default="runs/studies", help="run: folder of what is needed until records are there")
    parser.add_argument("--results", default=str(RESULTS), help="folder of records and reports")
    parser.add_argument("--bucket", default="", help="run: score and record what launch trained there; launch: where")
    parser.add_argument("--tasks_data", default="", help="run: folder with the papers' tasks; default: the hub")
    parser.add_argument("--commit", action="store_true", help="run: commit each record to git as soon as it is written")
    values, rest = parser.parse_known_args(arguments)
    strange = [flag for flag in rest if values.verb != "launch" and not is_override(flag, values.verb)]
    if strange:
        raise SpiralError(f"{strange[0]} is no flag of {values.verb}; allowed: those that --help lists")
    study = load(values.study, values.edition)
    if values.slice:
        parse_slice(values.slice, "--slice")
    places = Places(
        Path(values.work).resolve() / study.name / study.edition,
        folder_of(study.name, study.edition, Path(values.results).resolve()),
        values.study,
        values.bucket.rstrip("/"),
        values.tasks_data,
    )
    runner = Runner(study, places, lambda line: print(line, flush=True), values.commit, rest)
    names = selected(study, values.only)
    match values.verb:
        case "plan":
            return plan(study, names, values.slice or study.slices[0])
        case "run":
            if places.bucket:
                check_bucket(places.bucket)
            check_overrides(study, rest, trains=not places.bucket)
            check_tasks(study, values.tasks_data)
            for line in matching.check(study):
                print(line, flush=True)
            return runner.run(names)
        case "launch":
            return launch(study, runner, names, values.slice or study.slices[0], rest)
        case "status":
            return status(study, runner, names)
    from experiments.report.write import write_report  # draws, which the other verbs do without

    print(f"wrote {write_report(study, places.records, places.study)}, and README.md, CSV and PNG files beside it")
    return OK


def check_bucket(bucket: str) -> None:
    """Raises SpiralError unless there is such a bucket, which may be used from here."""
    match("--bucket", bucket)
    reachable_path("--bucket", f"{bucket}/{RESULTS.name}")  # which folder does not matter: the bucket is asked


def is_override(flag: str, verb: str) -> bool:
    return verb == "run" and flag.startswith("--config.")


def check_tasks(study: Study, tasks_data: str) -> None:
    """Raises SpiralError if the tasks that the runs are asked cannot be opened."""
    require(bool(study.shots) or not tasks_data, "--tasks_data", tasks_data, "none, as this study asks no tasks")
    if study.shots:
        catalogue.check_extra(f"{study.name} {study.edition}")
        catalogue.resolve(ASKED, tasks_data, field="--tasks")


def selected(study: Study, only: str) -> list[str]:
    """Names of the runs that `--only` asks for.

    Raises:
      SpiralError: it names none.
    """
    names = [run.name for run in study.runs()]
    patterns = [pattern for pattern in only.split(",") if pattern]
    for pattern in patterns:
        require(bool(fnmatch.filter(names, pattern)), "--only", pattern, f"names of runs, as {', '.join(names[:8])}")
    return [name for name in names if not patterns or any(fnmatch.fnmatchcase(name, p) for p in patterns)]


def plan(study: Study, names: Sequence[str], slice: str) -> int:
    """Prints a line per run, and sums; nothing is compiled."""
    lines = matching.check(study)
    runs = [run for run in study.runs() if run.name in names]
    here = study.edition == "small"
    width = max(len(run.name) for run in runs)
    print(f"{study.name} {study.edition}: {study.question}")
    print(f"{'run':<{width}}  {'stage':<5}  {'parameters':>13}  {'tokens':>15}  {'FLOPs':>9}  "
          f"{'hours here' if here else f'{slice}, chip-hours':>22}")  # fmt: skip
    sums, left_out = [0.0, 0.0, 0.0], 0
    for run in runs:
        config = run.arm.config
        tokens, flops, hours = matching.tokens(config), matching.train_flops(config), _hours(run, here, slice)
        left_out += hours is None
        sums = [a + b for a, b in zip(sums, (tokens, flops, hours or 0.0), strict=True)]
        print(f"{run.name:<{width}}  {run.stage:<5}  {config.model.non_embedding_parameters:>13,}  {tokens:>15,}  "
              f"{flops:>9.2e}  {_hours_shown(hours, here):>22}")  # fmt: skip
    print(f"{'all':<{width}}  {len(runs):<5}  {'':>13}  {round(sums[0]):>15,}  {sums[1]:>9.2e}  "
          f"{_hours_shown(sums[2], here):>22}")  # fmt: skip
    print(f"seeds {', '.join(map(str, study.seeds))}; trials of learning rates "
          f"{', '.join(f'{rate:g}' for rate in study.learning_rates) or 'none: each arm has its own'}")  # fmt: skip
    for gate in study.gates:
        print(f"gate {gate.run}: up to {gate.most_nats:.4g} nats before others start ({gate.why})")
    print("\n".join(lines))
    if left_out:
        print(f"{left_out} of {len(runs)} runs do not divide over {slice}, and are not in the hours of all")
    how = "an estimate for two cores, from FLOPs alone" if here else "predicted: no run of it was on a TPU"
    print(f"hours are {how}; parameters are non-embedding")
    return OK


def _hours(run: Run, here: bool, slice: str) -> float | None:
    if here:
        return (matching.train_flops(run.arm.config) / CPU_FLOPS + CPU_START_SECONDS) / 3600
    return matching.predicted_chip_hours(run.arm.config, slice)


def _hours_shown(hours: float | None, here: bool) -> str:
    if hours is None:
        return "does not divide"
    return f"{hours:.2f}" if here else f"{hours:,.0f}"


def status(study: Study, runner: Runner, names: Sequence[str]) -> int:
    """Prints a line per run, and what the trials say."""
    done = runner.records()
    runs = [run for run in study.runs(done.values()) if run.name in names]
    width, seconds = max(len(run.name) for run in runs), 0.0
    for run in runs:
        record = done.get(run.name)
        seconds += record.seconds.train if record else 0.0
        print(f"{run.name:<{width}}  {outcome(record) if record else runner.begun(run)}")
    for arm in study.arms if study.learning_rates else ():
        tuned = study.tuned(arm, done.values())
        edge = ", at the edge of those tried" if tuned and tuned.at_edge else ""
        print(f"learning rate of {arm.name}: {f'{tuned.learning_rate:g}{edge}' if tuned else 'not known yet'}")
    over = sum(run.name in done and is_over(done[run.name]) for run in runs)
    print(f"{over} of {len(runs)} runs are over; {duration(seconds)} of training")
    return OK


def launch(study: Study, runner: Runner, names: Sequence[str], slice: str, flags: Sequence[str]) -> int:
    """Hands the runs that have no record to `tpu.launch`, as jobs within one budget of chip-hours.

    Args:
      study: to launch.
      runner: of it.
      names: of runs.
      slice: to run on.
      flags: of `tpu.launch babysit`, as --zone and --max_chip_hours, and `--config.FIELD=VALUE` for all runs.

    Raises:
      SpiralError: a flag that is not allowed, or runs whose learning rate is not known.
    """
    from tpu import several
    from tpu.code import pack

    matching.check(study)
    check_overrides(study, [flag for flag in flags if flag.startswith("--config.")], trains=True)
    match("--bucket", runner.places.bucket)
    called = runner.places.study
    travels = not called.endswith(".py") or called in pack(ROOT).files
    require(travels, "the study", called, f"one of this tree, as a path from {ROOT}, that git does not ignore")
    done = runner.records()
    jobs = []
    for run in study.runs(done.values()):
        if run.name not in names or (run.name in done and is_over(done[run.name])):
            continue
        held = runner.held(run.name, done)
        if held or run.learning_rate is None:
            print(f"{run.name}: not launched, as {held or f'the trials of {run.arm.name} have no result'}")
            continue
        jobs.append({"name": job_name(study, run), "flags": [f"--accelerator={slice}", *runner.configured(run)]})
    if not jobs:
        print("nothing to launch")
        return OK
    runner.places.work.mkdir(parents=True, exist_ok=True)
    path = runner.places.work / "jobs.json"
    path.write_text(json.dumps(jobs, indent=2) + "\n", encoding="utf-8")
    print(f"{len(jobs)} runs in {path}", flush=True)
    return several.main([f"--jobs={path}", f"--bucket={runner.places.bucket}", *flags])


if __name__ == "__main__":
    sys.exit(main())
