"""Makes a record of what a run left in its directory."""

import ast
import hashlib
import json
import platform
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path

from etils import epath

from experiments.child import ROOT
from experiments.design import Run, Study, comparable_hash, run_config, shaping
from experiments.matching import predicted_seconds, tokens, train_flops
from experiments.record import MOST_DOCUMENTS, Code, Evaluation, Flops, Parameters, Record, Seconds, Status, thinned
from spiral_jax.data.bucket import is_bucket
from spiral_jax.data.json_files import read_json_object
from spiral_jax.errors import Diverged, SpiralError, require
from spiral_jax.evaluation.catalogue import values_of
from spiral_jax.hardware import usable_cores
from spiral_jax.run.directory import validation_store_of
from spiral_jax.run.metrics import read_rows, rows_of
from spiral_jax.run.provenance import last_start, processor
from spiral_jax.run.reading import reading

COMMANDS = ("spiral_jax/train.py", "spiral_jax/evaluate.py")


def record_of(
    study: Study, run: Run, code: Code, command: str, status: Status, reason: str, workdir: epath.Path, folder: Path
) -> Record:
    """The record, as far as the run came.

    Args:
      study: that it is of.
      run: with its learning rate.
      code: that it was made by.
      command: that makes it.
      status: how it ended.
      reason: why, in a line; empty if it finished.
      workdir: of the run.
      folder: with `documents.json`, and a `tasks_file` for each of the study's shots.

    Raises:
      SpiralError: it finished, but something is missing or damaged.
      Diverged: it finished, but what it came to loses more than a number can say.
    """
    config = run_config(run)
    rows = read_rows(rows_of(workdir))
    losses = [(row["step"], row["tokens"], row["loss"]) for row in rows if isinstance(row.get("loss"), int | float)]
    times = [row["step_time"] for row in rows[1:] if isinstance(row.get("step_time"), int | float)]
    start = last_start(workdir / "environment.json") or {"packages": {}, "devices": ""}
    finished = status == "finished"
    return Record(
        study=study.name, edition=study.edition, run=run.name, arm=run.arm.name, factors=dict(run.arm.factors),
        seed=run.seed, stage=run.stage, learning_rate=config.optimizer.peak_learning_rate,
        status=status, reason=reason, command=command, code=code,
        data=data_hashes(workdir) if finished else {},
        config_hash=comparable_hash(config), config=shaping(config),
        machine=("" if is_bucket(workdir) else f"{processor()}, cores used: {usable_cores()}; ")
        + (start["devices"] or "?"),
        versions={name: version for name, version in start["packages"].items() if version}
        | {"python": start.get("python", platform.python_version())},
        parameters=Parameters(config.model.non_embedding_parameters, config.model.total_parameters),
        flops=Flops(config.model.train_flops_per_token(config.train.sequence_length), train_flops(config)),
        tokens=tokens(config),
        seconds=Seconds(
            round(config.train.steps * statistics.median(times), 3) if times else 0.0,
            {slice: predicted_seconds(config, slice) for slice in study.slices},
        ),
        curve=thinned(losses),
        evaluation={"validation": evaluation_of(folder / "documents.json")} if finished else {},
        by_depth=depths_of(folder / "documents.json") if finished else {},
        tasks=tasks_of(folder, study.shots) if finished and run.stage == "seed" else {},
    )  # fmt: skip


def evaluation_of(path: Path) -> Evaluation:
    """What `evaluate --documents` wrote; of very many documents the first are kept.

    Raises:
      SpiralError: it is missing or damaged.
      Diverged: a document's loss is not finite.
    """
    found = read_json_object(path)
    try:
        if None in found["nats"]:
            raise Diverged("its loss on the held-out text is not finite")
        pairs = [(float(x), float(n)) for x, n in zip(found["nats"], found["tokens"], strict=True)]
        pairs = [(x, n) for x, n in pairs if n]  # of examples, the sum of weights: one that asks nothing says nothing
        nats = sum(x for x, _ in pairs) / sum(n for _, n in pairs)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise SpiralError(f"{path} is damaged ({type(error).__name__}: {error})") from None
    kept = pairs[:MOST_DOCUMENTS]
    counts = tuple(int(n) if n.is_integer() else round(n, 6) for _, n in kept)
    return Evaluation(nats, tuple(x / n for x, n in kept), counts)


def depths_of(path: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """Right answers and all, by group, where `evaluate --documents` counted them: {task: {group: (right, all)}}."""
    found = read_json_object(path)
    if "by_group" not in found:
        return {}
    return {found["input"]: {group: (int(n[0]), int(n[1])) for group, n in found["by_group"].items()}}


def tasks_file(folder: Path, shots: int) -> Path:
    """Where a run's answers to the papers' tasks lie, by number of solved examples before each question."""
    return folder / f"tasks-{shots}.json"


def tasks_of(folder: Path, shots: Sequence[int]) -> dict[str, dict[str, float]]:
    """What `evaluate --tasks` wrote, by number of solved examples.

    Raises:
      SpiralError: a file is missing or damaged.
    """
    found = {}
    for number in shots:
        path = tasks_file(folder, number)
        try:
            found[str(number)] = values_of(read_json_object(path))
        except (KeyError, AttributeError) as error:
            raise SpiralError(f"{path} is damaged ({type(error).__name__}: {error})") from None
    return found


def data_hashes(workdir: epath.Path) -> dict[str, str]:
    """Of the training tokens, and of those of the validation text if there is one.

    Raises:
      SpiralError: there is no checkpoint, or it is damaged.
    """
    with reading(workdir) as saved:
        training, task = saved.meta["data"]["fingerprints"], saved.config().data.examples
    if task:
        return {task: training[0][:16]}  # arms may be of several tasks
    both = hashlib.sha256(json.dumps(training).encode()).hexdigest() if len(training) > 1 else training[0]
    hashes = {"train": both[:16]}
    if read_json_object(workdir / "data.json")["validation"]:
        hashes["validation"] = validation_store_of(workdir).fingerprint[:16]
    return hashes


def code_of_tree() -> Code:
    """The tree as it is now."""
    files = package_files()
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    changes = _git("diff", "HEAD", "--", "spiral_jax", "experiments/*.py", "experiments/studies")
    return Code(
        commit=_git("rev-parse", "HEAD").strip(),
        changes=hashlib.sha256(changes.encode()).hexdigest()[:16] if changes.strip() else "",
        package=digest.hexdigest()[:16],
    )


def package_files() -> set[Path]:
    """Files of the package that training and evaluation import, directly or not."""
    found: set[Path] = set()
    waiting = [ROOT / command for command in COMMANDS]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "spiral_jax":
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names if alias.name.split(".")[0] == "spiral_jax"]
            else:
                continue
            for name in names:
                place = ROOT.joinpath(*name.split("."))
                waiting += [file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()]
    return found


def check_comparable(record: Record, others: list[Record]) -> None:
    """Raises SpiralError if a run that finished read other data than those before it that it may be compared with."""
    for other in (other for other in others if other.config_hash == record.config_hash):
        for name, digest in record.data.items():
            was = other.data.get(name, digest)
            require(was == digest, f"{record.run}: its {name} data", digest, f"{was}, as of {other.run}")


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode("utf-8", "replace")
