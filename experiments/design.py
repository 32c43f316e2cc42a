"""What a study declares before anything runs, and the runs that follow from it.

A study is a file in `experiments/studies/` with a function `get_study(edition)`. It names arms, which are
configurations; what is compared first and how those two are matched; the trials of learning rates, the same for every
arm; the seeds, which all arms share, so that runs of one seed read the same batches; and gates.
"""

import dataclasses
import functools
import hashlib
import importlib.util
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import ml_collections

from experiments.record import Entry, Record, Stage
from spiral_jax.errors import SpiralError, guarded, require
from spiral_jax.run import own_code
from spiral_jax.run.config import MUTABLE, RunConfig, flatten

Edition = Literal["small", "full"]
Matched = Literal["parameters", "flops", "seconds"]
EDITIONS: tuple[Edition, ...] = get_args(Edition)
STUDIES = Path(__file__).parent / "studies"

# Where tokens lie, which their hashes say better, and what changes how a run runs, not what comes of it.
PLACES = ("data.paths", "data.exclude", "data.validation_paths", "data.stores", "data.validation_store")
# Loss above which training goes back changes what comes of a run, although a run may be resumed with another.
HOW = tuple(field for field in MUTABLE if field != "divergence.")
OF_THE_RUN = ("seed", "optimizer.peak_learning_rate")
OF_THE_ARM = ("model.", "train.steps", "data.examples")
_NAME = r"[a-z0-9][-a-z0-9_.]{0,39}"


@dataclasses.dataclass(frozen=True)
class Arm:
    """One of the things that are compared.

    Attributes:
      name: as it begins the names of its runs.
      values: its configuration, as an experiment file makes it; seed and trials' learning rates are set by the runs.
      factors: see `Record.factors`.
    """

    name: str
    values: ml_collections.ConfigDict
    factors: Mapping[str, Entry] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def config(self) -> RunConfig:
        """Raises SpiralError for a configuration that is not allowed."""
        try:
            return RunConfig.from_dict(self.values.to_dict())
        except SpiralError as error:
            raise SpiralError(f"arm {self.name}: {error}") from None


@dataclasses.dataclass(frozen=True)
class Contrast:
    """Two arms whose difference is the question.

    Attributes:
      arm: that is expected to be the better one.
      against: the baseline.
      matched: what both have the same of: non-embedding `parameters`, training `flops`, or predicted `seconds`.
      tolerance: the most that they may differ in that, as a share of the baseline's.
      slice: for `seconds`: of which TPU slice, as `v5e:4x4`.
    """

    arm: str
    against: str
    matched: Matched = "parameters"
    tolerance: float = 0.01
    slice: str = ""


@dataclasses.dataclass(frozen=True)
class Gate:
    """A run that comes first and has to look right before any other starts.

    Attributes:
      run: its name.
      most_nats: on the validation text, at its end.
      why: this number.
    """

    run: str
    most_nats: float
    why: str


@dataclasses.dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
      name: of the run, its folder and its record.
      arm, seed, stage: see `Record`.
      learning_rate: the peak; None while the trials that decide it have not ended.
    """

    name: str
    arm: Arm
    seed: int
    stage: Stage
    learning_rate: float | None


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What the trials of an arm say.

    Attributes:
      learning_rate: the best one.
      at_edge: whether it is the first or last of several, so that a better one may lie outside.
    """

    learning_rate: float
    at_edge: bool


@dataclasses.dataclass(frozen=True)
class Study:
    """An edition of a study, declared whole before anything runs.

    Attributes:
      name: the file's.
      edition: `small` for two cores, `full` for TPU slices.
      question: in a sentence.
      arms: what is compared, in the order of reports.
      primary: the contrast that the study is about.
      others: contrasts that are looked at as well, which makes them exploratory.
      learning_rates: tried with every arm, rising; empty if each arm's own is taken untried.
      tuning_seed: of the trials; none of `seeds`, so that the choice does not flatter the results.
      seeds: of the runs that count.
      gates: what has to look right first.
      slices: TPU slices that seconds are predicted for; the first is that of `plan` and `launch`.
      shots: numbers of solved examples with which the runs that count are asked the papers' tasks (extra harness).
      kept: names of runs whose directories stay after their records are written, as for probes.
      exploratory: whether nothing in it is more than something to test, the primary contrast included.
    """

    name: str
    edition: Edition
    question: str
    arms: tuple[Arm, ...]
    primary: Contrast
    others: tuple[Contrast, ...] = ()
    learning_rates: tuple[float, ...] = ()
    tuning_seed: int = 0
    seeds: tuple[int, ...] = (1, 2, 3)
    gates: tuple[Gate, ...] = ()
    slices: tuple[str, ...] = ("v5e:4x4",)
    shots: tuple[int, ...] = ()
    kept: tuple[str, ...] = ()
    exploratory: bool = False

    def __post_init__(self):
        names = [arm.name for arm in self.arms]
        for name in names:
            require(re.fullmatch(_NAME, name) is not None, "an arm's name", name, "lower-case letters, digits, -_.")
            require(names.count(name) == 1, "an arm's name", name, "each once")
        for contrast in (self.primary, *self.others):
            for name in (contrast.arm, contrast.against):
                require(name in names, "a contrast's arm", name, ", ".join(names))
        rates = list(self.learning_rates)
        require(rates == sorted(set(rates)), "learning_rates", rates, "rising ones, each once")
        require(bool(self.seeds) and len(set(self.seeds)) == len(self.seeds), "seeds", self.seeds, "some, each once")
        clash = bool(rates) and self.tuning_seed in self.seeds
        require(not clash, "tuning_seed", self.tuning_seed, f"none of the seeds {self.seeds}")
        runs = {run.name: run for run in self.runs()}
        for field, given in (("a gate's run", [gate.run for gate in self.gates]), ("kept", self.kept)):
            for name in given:
                require(name in runs, field, name, f"a run's name, as {next(iter(runs))}")
        for gate in self.gates:
            waits = bool(rates) and runs[gate.run].stage == "seed"
            require(not waits, "a gate's run", gate.run, "a trial of a learning rate, as all other runs wait for those")

    def arm(self, name: str) -> Arm:
        """Raises SpiralError if there is none of that name."""
        found = {arm.name: arm for arm in self.arms}
        require(name in found, "the arm", name, ", ".join(found))
        return found[name]

    def runs(self, records: Iterable[Record] = ()) -> list[Run]:
        """All runs in their order: gates, then the trials, then seed by seed all arms, so that pairs are whole soon.

        Args:
          records: of trials that have ended, which decide the learning rates of the runs that count.
        """
        records = list(records)
        runs = [
            Run(f"{arm.name}-lr{rate:g}", arm, self.tuning_seed, "tune", rate)
            for rate in self.learning_rates
            for arm in self.arms
        ]
        for seed in self.seeds:
            for arm in self.arms:
                tuned = self.tuned(arm, records)
                runs.append(Run(f"{arm.name}-seed{seed}", arm, seed, "seed", tuned.learning_rate if tuned else None))
        gates = {gate.run for gate in self.gates}
        return sorted(runs, key=lambda run: run.name not in gates)

    def tuned(self, arm: Arm, records: Iterable[Record]) -> Tuned | None:
        """The learning rate with the lowest validation loss; None while a trial has no record, or if all failed."""
        if not self.learning_rates:
            return Tuned(arm.config.optimizer.peak_learning_rate, at_edge=False)
        trials = {r.learning_rate: r for r in records if r.arm == arm.name and r.stage == "tune" and is_over(r)}
        if not set(self.learning_rates) <= trials.keys():
            return None
        nats = {rate: validation_nats(trials[rate]) for rate in self.learning_rates}
        best = min(nats, key=nats.__getitem__)
        if nats[best] == float("inf"):
            return None
        at_edge = len(nats) > 1 and best in (self.learning_rates[0], self.learning_rates[-1])
        return Tuned(best, at_edge)


def load(study: str, edition: str) -> Study:
    """A study's edition.

    Args:
      study: the name of a file in `experiments/studies/`, or the path of one elsewhere.
      edition: `small` or `full`.

    Raises:
      SpiralError: no such study or edition, or a file that fails.
    """
    known = sorted(path.stem for path in STUDIES.glob("*.py") if not path.stem.startswith("_"))
    path = Path(study) if study.endswith(".py") else STUDIES / f"{study}.py"
    is_there = path.is_file() and (study.endswith(".py") or study in known)
    require(is_there, "the study", study, f"{', '.join(known)}, or a file")
    require(edition in EDITIONS, "--edition", edition, ", ".join(EDITIONS))
    with guarded(str(path), str(path.resolve())):
        spec = importlib.util.spec_from_file_location(f"study_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found = module.get_study(edition)
    require(isinstance(found, Study), f"{path}: what get_study gives", found, "a Study")
    require(found.name == path.stem, f"{path}: name", found.name, f"{path.stem!r}, as the file's")
    return found


def is_over(record: Record) -> bool:
    """Whether the run need not be run again: one that failed may go better the next time."""
    return record.status != "failed"


def validation_nats(record: Record) -> float:
    """Nats per token on the validation text; infinite where the run has none."""
    return record.evaluation["validation"].nats if "validation" in record.evaluation else float("inf")


def shaping(config: RunConfig) -> dict[str, Any]:
    """Dotted fields that shape what comes of a run and differ from their defaults, as JSON has them.

    A field that names something of the user's own is followed by its file's hash, as `model.topology.file`.
    """
    defaults, values = flatten(RunConfig().to_dict()), flatten(config.to_dict())
    changed = {name: value for name, value in values.items() if value != defaults[name]}
    changed |= {f"{field}.file": digest[:16] for field, digest in own_code.hashes(config.to_dict()).items()}
    return json.loads(json.dumps({n: v for n, v in sorted(changed.items()) if not n.startswith((*PLACES, *HOW))}))


def comparable_hash(config: RunConfig) -> str:
    """Hash of what all arms of a study have to have in common: see `Record.config_hash`."""
    common = {n: v for n, v in shaping(config).items() if n not in OF_THE_RUN and not n.startswith(OF_THE_ARM)}
    return hashlib.sha256(json.dumps(common).encode()).hexdigest()[:16]


def run_config(run: Run) -> RunConfig:
    """The configuration of a run whose learning rate is known."""
    assert run.learning_rate is not None
    config = run.arm.config
    optimizer = dataclasses.replace(config.optimizer, peak_learning_rate=run.learning_rate)
    return dataclasses.replace(config, seed=run.seed, optimizer=optimizer)


def difference(record: Record, run: Run) -> str:
    """In what a record is not of this run as the study declares it now: a field, what it was and what it is; or ""."""
    if run.learning_rate is not None and record.learning_rate != run.learning_rate:
        return f"optimizer.peak_learning_rate was {record.learning_rate:g} and is {run.learning_rate:g}"
    wanted = shaping(run_config(dataclasses.replace(run, learning_rate=record.learning_rate)))
    found = first_difference(json.loads(json.dumps(record.config)), wanted)
    return "{} was {} and is {}".format(*found) if found else ""


def first_difference(was: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first field in which two configurations, as `shaping` gives them, differ: its name, what it was and is."""
    for name in sorted(was.keys() | now.keys()):
        if not name.startswith((*PLACES, *HOW)) and was.get(name) != now.get(name):
            return name, was.get(name, "the default"), now.get(name, "the default")
    return None
