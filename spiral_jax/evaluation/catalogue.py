"""The LM Evaluation Harness without importing it: the papers' tasks, tasks on local files, what results say.

Every YAML file in tasks/ is a task of the harness whose data is a file of `--tasks_data`; under `metadata` it names
that file and says how the numbers differ from those on the published data.
"""

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from spiral_jax.data.storage import expanded
from spiral_jax.errors import SpiralError, require

TASKS_FOLDER = Path(__file__).parent / "tasks"

# The papers' nine tasks, each with the metric that is reported.
PAPER = {
    "lambada_openai": "acc",
    "lambada_standard": "acc",
    "piqa": "acc_norm",
    "hellaswag": "acc_norm",
    "winogrande": "acc",
    "arc_easy": "acc_norm",
    "arc_challenge": "acc_norm",
    "sciq": "acc_norm",
    "mmlu_continuation": "acc",
}
PAPER_GROUP = "paper"


def check_extra(field: str) -> None:
    """Raises SpiralError naming `field` if the harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise SpiralError(f"{field} needs lm_eval: pip install 'spiral_jax[harness]'")


def resolve(names: Sequence[str], tasks_data: str, *, field: str = "--tasks") -> tuple[list[str], list[str]]:
    """Names as a user writes them to names of tasks.

    `paper` stands for the papers' nine tasks; with `tasks_data` for those of them whose file is there.

    Args:
      names: of tasks, or `paper`, or YAML files of tasks of one's own (`.yaml`, `.yml`).
      tasks_data: folder with the data files; "" for the Hugging Face hub, whose tasks are checked when they are loaded.
      field: what the names were given as; the folder's name follows from it.

    Returns:
      The tasks without repetition, and remarks for the report.

    Raises:
      SpiralError: an unknown task, a missing file or folder, or no tasks.
    """
    wanted, remarks = [], []
    for name in names:
        if is_file(name):
            path = expanded(field, name)
            require(path.is_file(), field, name, "a YAML file that exists, or the name of a task")
            wanted.append(str(path.resolve()))
            continue
        if name != PAPER_GROUP:
            wanted.append(name)
            continue
        there = [task for task in PAPER if not tasks_data or (task in local_tasks() and _find(task, tasks_data))]
        left_out = [task for task in PAPER if task not in there]
        if left_out:
            remarks.append(f"{PAPER_GROUP}: left out, as {tasks_data} has no data for them: {', '.join(left_out)}")
        wanted += there
    if tasks_data:
        _check_local(wanted, tasks_data, field)
    if not wanted:
        raise SpiralError(f"{field} has no task with data in {tasks_data or 'it'}; allowed: at least one")
    return list(dict.fromkeys(wanted)), remarks


@functools.cache
def local_tasks() -> dict[str, dict[str, Any]]:
    """The tasks that can run on local files: name to the content of its YAML file."""
    tasks = {}
    for path in sorted(TASKS_FOLDER.glob("*.yaml")):
        task = yaml.load(path.read_text(encoding="utf-8"), _Loader)
        tasks[task["task"]] = task
    return tasks


def is_file(name: str) -> bool:
    """Whether a task is named by its YAML file, which need not be one of ours or of the harness's."""
    return name.endswith((".yaml", ".yml"))


def find_file(candidates: str | Sequence[str], tasks_data: str) -> Path | None:
    """The first of the candidates that is in the folder."""
    candidates = [candidates] if isinstance(candidates, str) else candidates
    paths = [expanded("--tasks_data", tasks_data) / name for name in candidates]
    return next((path for path in paths if path.is_file()), None)


def remarks_on(name: str, num_fewshot: int | None) -> list[str]:
    """How the numbers of a local task differ from those on the published data."""
    if is_file(name):
        return []
    metadata = local_tasks()[name]["metadata"]
    remarks = list(metadata.get("remarks", []))
    if num_fewshot and "fewshot_remark" in metadata:
        remarks.append(metadata["fewshot_remark"])
    return [f"{name}: {remark}" for remark in remarks]


def values_of(results: dict[str, Any]) -> dict[str, float]:
    """The numbers alone in results of the harness: `TASK/METRIC` to value, without standard errors."""
    values = {}
    for task, metrics in results["results"].items():
        for name, value in metrics.items():
            metric, _, filtered = name.partition(",")
            if isinstance(value, float) and not metric.endswith("_stderr"):
                values[f"{task}/{metric}" + (f",{filtered}" if filtered not in ("", "none") else "")] = value
    return values


def paper_values(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Of the papers' tasks, the metric that they report."""
    values = values_of(results)
    found = {task: metric for task, metric in PAPER.items() if f"{task}/{metric}" in values}
    return {task: {"metric": metric, "value": values[f"{task}/{metric}"]} for task, metric in found.items()}


def _check_local(names: Sequence[str], tasks_data: str, field: str) -> None:
    data_field = "--tasks_data" if field.startswith("--") else f"{field}_data"
    if not expanded(data_field, tasks_data).is_dir():
        raise SpiralError(f"{data_field} is {tasks_data!r}, which is no folder; allowed: a folder of data files")
    names = [name for name in names if not is_file(name)]
    for name in names:
        if name not in local_tasks():
            allowed = ", ".join([PAPER_GROUP, *local_tasks()])
            raise SpiralError(f"{field} is {name!r}; allowed with {data_field}: {allowed} (see {TASKS_FOLDER})")
    for name in names:
        if _find(name, tasks_data) is None:
            file = local_tasks()[name]["metadata"]["file"]
            file = file if isinstance(file, str) else " or ".join(file)
            raise SpiralError(
                f"{data_field} is {tasks_data!r}, which has no {file}; allowed: a folder with the data of {name}"
            )


def _find(name: str, tasks_data: str) -> Path | None:
    return find_file(local_tasks()[name]["metadata"]["file"], tasks_data)


class _Loader(yaml.SafeLoader):
    """YAML with the harness's references to functions, left as text."""


_Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
