"""Runs tasks of the LM Evaluation Harness. Only this module imports it (extra `harness`): import it where it is used.

Two further functions of the harness are used by name in tasks/wikitext.yaml.
"""

import contextlib
import hashlib
import json
import logging
import os
import random
import sys
from collections.abc import Callable, Sequence
from typing import Any

import lm_eval
import numpy as np
from etils import epath
from lm_eval.api.group import Group
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.task import Task
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable, make_table

from spiral_jax.data import atomic
from spiral_jax.data.json_files import finite
from spiral_jax.data.storage import expanded
from spiral_jax.data.tokenizers import Tokenizer
from spiral_jax.errors import SpiralError
from spiral_jax.evaluation.catalogue import PAPER, TASKS_FOLDER, is_file
from spiral_jax.evaluation.encoding import encode_documents, encode_pairs, encode_prompts
from spiral_jax.evaluation.generation import Generator
from spiral_jax.evaluation.generation_settings import GenerationSettings
from spiral_jax.evaluation.scoring import Scorer
from spiral_jax.parallel.processes import ALONE, Processes

# Resamples behind the standard error of a perplexity; the harness's 100,000 take it minutes on one core.
_BOOTSTRAP_ITERATIONS = 1000


class SpiralLM(LM):
    """A model as the harness wants it: texts in, log-probabilities or texts out.

    On several processes each runs the harness with the same requests, and their devices compute every batch together.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        scorer: Scorer,
        generator: Generator,
        params: Any,
        processes: Processes = ALONE,
    ):
        """Ties together what is needed to answer requests; `params` may be replaced between evaluations.

        So may `check`, which is called between batches, and raises to leave the rest.
        """
        super().__init__()
        self._processes = processes
        self.params = params
        self.check: Callable[[], None] = lambda: None
        self._tokenizer = tokenizer
        self._scorer = scorer
        self._generator = generator

    @property
    def max_length(self) -> int:
        return self._scorer.max_length

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Log-probability of each continuation after its context, and whether greedy decoding would give it."""
        encoded = encode_pairs(self._tokenizer, [request.args for request in requests])
        self._check_same([array for request in encoded for array in request])
        results = self._scorer(self.params, encoded, self._report, self.check)
        return [(result.logp, result.greedy) for result in results]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Log-probability of each whole text, after a separator."""
        encoded = encode_documents(self._tokenizer, [request.args[0] for request in requests])
        self._check_same([array for request in encoded for array in request])
        return [result.logp for result in self._scorer(self.params, encoded, self._report, self.check)]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The greedy continuation of each context up to a stop text, a separator or so many tokens."""
        settings = [GenerationSettings.of(request.args[1], self.max_length) for request in requests]
        prompts = encode_prompts(self._tokenizer, [request.args[0] for request in requests])
        self._check_same(prompts)
        texts: list[str] = [""] * len(requests)
        for max_new_tokens in {setting.max_new_tokens for setting in settings}:
            chosen = [i for i, setting in enumerate(settings) if setting.max_new_tokens == max_new_tokens]
            generated = self._generator(
                self.params,
                [prompts[i] for i in chosen],
                max_new_tokens=max_new_tokens,
                is_done=[settings[i].is_done(self._tokenizer) for i in chosen],
                report=self._report,
                check=self.check,
            )
            for i, ids in zip(chosen, generated, strict=True):
                texts[i] = settings[i].text(self._tokenizer, ids)
        return texts

    def _check_same(self, arrays: Sequence[np.ndarray]) -> None:
        """Raises SpiralError if process 0 asks something else: the processes would wait for each other for ever."""
        if not self._processes.several:
            return
        digest = hashlib.sha256()
        for array in arrays:
            digest.update(b"%d:" % len(array) + np.asarray(array, np.int64).tobytes())
        if self._processes.from_main("the requests of a task", digest.hexdigest) != digest.hexdigest():
            raise SpiralError(
                f"--tasks: the data on process {self._processes.id} is not that of process 0; allowed: the same on "
                "every process"
            )

    def _report(self, line: str) -> None:
        self._processes.say(line, file=sys.stderr)


def load_tasks(
    names: Sequence[str], tasks_data: str, max_length: int, num_fewshot: int | None = None
) -> list[Task | Group]:
    """Opens tasks and their data.

    Args:
      names: what `catalogue.resolve` made of the user's.
      tasks_data: folder with the data files; "" for the Hugging Face hub.
      max_length: the longest input of the model to come.
      num_fewshot: as for `run`.

    Raises:
      SpiralError: an unknown task, data that is missing or broken or too little, or a task that the model cannot do.
    """
    with _contained():
        # As the harness does before it opens tasks: some of them shuffle their choices.
        random.seed(DEFAULT_RANDOM_SEED)
        np.random.seed(DEFAULT_OTHER_SEED)
        if tasks_data:
            folder = str(expanded("--tasks_data", tasks_data).resolve())
            manager = TaskManager(
                include_path=str(TASKS_FOLDER), include_defaults=False, metadata={"tasks_data": folder}
            )
        else:
            manager = TaskManager()
        tasks = [task for name in names for task in _load(manager, name, tasks_data)]
    for task in _leaves(tasks):
        if task.OUTPUT_TYPE == "generate_until":
            try:
                GenerationSettings.of(task.config.generation_kwargs or {}, max_length)
            except SpiralError as error:
                raise SpiralError(f"--tasks: {task.task_name}: {error}") from None
        _check_examples(task, num_fewshot)
    return tasks


def _check_examples(task: Task, num_fewshot: int | None) -> None:
    """Raises SpiralError if the data has fewer solved examples than are to stand before a question."""
    own = task.config.num_fewshot or 0
    wanted = own if num_fewshot is None or task.config.num_fewshot == 0 else num_fewshot  # the harness's rule
    if not wanted:
        return
    rows = len(task.sampler.df)
    most = rows - 1 if task.fewshot_cfg.split == task.config.test_split else rows  # never the item itself
    if wanted > most:
        raise SpiralError(
            f"--num_fewshot is {wanted}; allowed: 0 to {max(most, 0)} for {task.task_name}, of whose {rows} rows the "
            "examples are taken"
        )


def run(
    lm: SpiralLM,
    tasks: Sequence[Task | Group],
    *,
    num_fewshot: int | None,
    limit: int = 0,
    standard_errors: bool = True,
    about: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Runs tasks.

    Args:
      lm: the model.
      tasks: from `load_tasks`; may be run again.
      num_fewshot: solved examples before each question; None for a task's own number.
      limit: documents of each task; 0 for all.
      standard_errors: whether to estimate them, by resampling where there is no formula.
      about: entries for the results' `config`.

    Returns:
      The harness's results, as its own JSON files hold them.
    """
    # The harness resamples in forked processes, which JAX's threads do not survive.
    os.environ["DISABLE_MULTIPROC"] = "1"
    with _contained(), contextlib.redirect_stdout(sys.stderr):
        results = lm_eval.simple_evaluate(
            lm,
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit or None,
            bootstrap_iters=_BOOTSTRAP_ITERATIONS if standard_errors else 0,
            log_samples=False,
            # Only names are looked up in it, and there are none.
            task_manager=TaskManager(include_defaults=False),
        )
    results["config"] |= about or {}
    return results


def as_text(results: dict[str, Any]) -> str:
    """The harness's table, the papers' metrics, and the remarks."""
    lines = [make_table(results).strip()]
    if results.get("groups"):
        lines += ["", make_table(results, "groups").strip()]
    paper = results.get("paper") or {}
    if paper:
        lines += ["", "as the papers report it"]
        lines += [f"  {task:<18} {entry['metric']:<8} {entry['value']:.4f}" for task, entry in paper.items()]
        if len(paper) > 1:
            mean = sum(entry["value"] for entry in paper.values()) / len(paper)
            name = "mean" if len(paper) == len(PAPER) else f"mean of {len(paper)} of {len(PAPER)}"
            lines.append(f"  {name:<18} {'':<8} {mean:.4f}")
    return "\n".join([*lines, *(f"note: {remark}" for remark in results.get("notes", []))])


def as_json(results: dict[str, Any]) -> str:
    return json.dumps(finite(results), indent=2, default=handle_non_serializable, ensure_ascii=False)


def save(results: dict[str, Any], path: epath.Path) -> None:
    """Writes the results as JSON.

    Raises:
      SpiralError: a place that cannot be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_text(path, as_json(results) + "\n")
    except OSError as error:
        raise SpiralError(f"--output: {path} cannot be written ({error.strerror})") from None


def _load(manager: TaskManager, name: str, tasks_data: str) -> list[Task | Group]:
    if name not in manager.task_index and not is_file(name):
        raise SpiralError(
            f"--tasks is {name!r}; allowed: paper, a name that `lm_eval ls tasks` lists, or a YAML file of your own"
        )
    try:
        loaded = manager.load([name])
    except SpiralError:
        raise
    except Exception as error:  # of any of the libraries that read a task's data
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        hint = f"the data in {tasks_data}" if tasks_data else "its data; without a connection, give --tasks_data=DIR"
        raise SpiralError(f"--tasks: {name} cannot be opened ({reason}); check {hint}") from error
    group = loaded.get("groups", {}).get(name)
    return [group] if group is not None else list(loaded["tasks"].values())


def _leaves(tasks: Sequence[Task | Group]) -> list[Task]:
    return [leaf for task in tasks for leaf in (task.get_all_tasks() if isinstance(task, Group) else [task])]


@contextlib.contextmanager
def _contained():
    """Around the harness: it logs a great deal, and it seeds random generators that are not its own."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]
    states = random.getstate(), np.random.get_state()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        random.setstate(states[0])
        np.random.set_state(states[1])
