"""Which records count for which arm, and why the others do not."""

import collections
import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from experiments import design, record
from experiments.design import Study
from experiments.record import Entry, Record

TEXT = "validation"  # what contrasts are about
Edge = Literal["", "lowest", "highest"]


@dataclasses.dataclass(frozen=True)
class Arm:
    """What there is of an arm.

    Attributes:
      name, factors: as declared.
      seeds: declared ones.
      runs: finished ones that count, by seed.
      trials: of learning rates, by rate, finished or not.
      failed: runs and trials that did not finish.
      edge: whether the runs' learning rate is the lowest or highest of several that were tried.
    """

    name: str
    factors: Mapping[str, Entry]
    seeds: tuple[int, ...]
    runs: dict[int, Record]
    trials: dict[float, Record]
    failed: tuple[Record, ...]
    edge: Edge

    @property
    def missing_seeds(self) -> tuple[int, ...]:
        """Declared seeds without a run that counts."""
        return tuple(seed for seed in self.seeds if seed not in self.runs)

    @property
    def diverged(self) -> tuple[int, ...]:
        """Seeds that count whose runs diverged: those left are not any seeds."""
        return tuple(sorted(run.seed for run in self.failed if run.stage == "seed" and run.status == "diverged"))

    @property
    def family(self) -> str:
        """What the arm is whatever its size and budget; the name of one that does not say."""
        return str(self.factors.get("family", self.name))

    @property
    def floor(self) -> float | None:
        """What the true distribution costs on the held-out text, in nats per token, where a grammar made it."""
        return float(self.factors["floor_nats"]) if "floor_nats" in self.factors else None

    @property
    def task(self) -> str:
        """What it is trained on, in a study of several tasks; losses on different ones are not compared."""
        return str(self.factors.get("task", ""))

    def any_run(self) -> Record:
        """One of `runs`, for what all of them share, as counts."""
        return next(iter(self.runs.values()))

    def nats(self) -> list[float]:
        """Loss on the validation text by each run, in nats per token."""
        return [run.evaluation[TEXT].nats for run in self.runs.values() if TEXT in run.evaluation]

    def measured_seconds(self) -> float:
        """Of training, mean over the runs; nan without any."""
        return _mean([run.seconds.train for run in self.runs.values()])

    def predicted_seconds(self, on_slice: str) -> float:
        """Of training on a slice; nan where nothing says."""
        return _mean([run.seconds.predicted.get(on_slice) or 0 for run in self.runs.values()])


def _mean(seconds: list[float]) -> float:
    known = [value for value in seconds if value > 0]
    return statistics.fmean(known) if known else math.nan


@dataclasses.dataclass(frozen=True)
class Evidence:
    """The records of a study's edition, sorted out.

    Attributes:
      study: as declared.
      called: the study as command lines name it: by its name, or by the path of its file.
      arms: by name, in the declared order, also those without a run.
      records: those that count, by name of the run.
      left_out: a line for every file and record that counts for nothing.
      remarks: lines about what is uneven among those that count.
    """

    study: Study
    called: str
    arms: dict[str, Arm]
    records: dict[str, Record]
    left_out: tuple[str, ...]
    remarks: tuple[str, ...]


def gather(study: Study, folder: Path, called: str = "") -> Evidence:
    """Reads the records of a folder; one that cannot be read, or belongs to other runs than these, is named.

    Args:
      study: an edition of a study.
      folder: with the records; it may be missing.
      called: the study on the command line, if that is not its name.
    """
    records, left_out = record.read_all(folder)
    names = {run.name for run in study.runs()}
    ours = []
    for one in records:
        if (one.study, one.edition) != (study.name, study.edition):
            left_out.append(f"{one.run}: is of {one.study} {one.edition}, not of {study.name} {study.edition}")
        elif one.run not in names:
            left_out.append(f"{one.run}: is no run of this study as it is declared now")
        else:
            ours.append(one)
    ours, others = _same_origin(ours)
    left_out += others
    counting = {}
    declared = {run.name: run for run in study.runs(ours)}
    for one in ours:
        if other := design.difference(one, declared[one.run]):
            left_out.append(f"{one.run}: was run with another configuration ({other})")
        else:
            counting[one.run] = one
    arms = {arm.name: _arm(study, arm, list(counting.values())) for arm in study.arms}
    return Evidence(
        study, called or study.name, arms, counting, tuple(left_out), tuple(_remarks(list(counting.values())))
    )


def _same_origin(records: list[Record]) -> tuple[list[Record], list[str]]:
    """Records of the code and data that most have (of as many, the first by name), and a line for each other one.

    Data are compared between runs of one configuration hash that read data of the same names, as a study may have
    several tasks. A run that did not finish has no hashes of its data, and is not asked for them.
    """
    left_out = []
    groups: tuple[tuple[str, Callable[[Record], str], Callable[[Record], tuple]], ...] = (
        ("code", _code, lambda one: ()),
        ("data", _data, lambda one: (one.config_hash, *sorted(one.data))),
    )
    for what, origin, group in groups:
        kept = []
        usual = {
            name: collections.Counter(found for one in records if group(one) == name and (found := origin(one)))
            for name in {group(one) for one in records}
        }
        for one in records:
            ranked = usual[group(one)].most_common(1)
            if not ranked or origin(one) in ("", ranked[0][0]):
                kept.append(one)
            else:
                found = f"{origin(one)}, not {ranked[0][0]} as {ranked[0][1]} others"
                left_out.append(f"{one.run}: was run with other {what} ({found})")
        records = kept
    return records, left_out


def _code(one: Record) -> str:
    return one.code.package


def _data(one: Record) -> str:
    return ", ".join(f"{name} {value}" for name, value in sorted(one.data.items()))


def _arm(study: Study, arm: design.Arm, records: list[Record]) -> Arm:
    mine = [one for one in records if one.arm == arm.name]
    runs = {one.seed: one for one in mine if one.stage == "seed" and one.status == "finished"}
    rates = {one.learning_rate for one in runs.values()}
    edge: Edge = ""
    if len(study.learning_rates) > 1 and rates:
        edge = "lowest" if study.learning_rates[0] in rates else "highest" if study.learning_rates[-1] in rates else ""
    return Arm(
        arm.name,
        arm.factors,
        study.seeds,
        dict(sorted(runs.items())),
        {one.learning_rate: one for one in mine if one.stage == "tune"},
        tuple(one for one in mine if one.status != "finished"),
        edge,
    )


def _remarks(records: list[Record]) -> list[str]:
    records = [one for one in records if one.status == "finished"]
    remarks = []
    machines = sorted({one.machine for one in records})
    if len(machines) > 1:
        remarks.append(f"Measured seconds are of {len(machines)} machines and not comparable: {'; '.join(machines)}.")
    for package in sorted({name for one in records for name in one.versions}):
        versions = sorted({one.versions.get(package, "none") for one in records})
        if len(versions) > 1:
            remarks.append(f"Runs had several versions of {package}: {', '.join(versions)}.")
    return remarks
