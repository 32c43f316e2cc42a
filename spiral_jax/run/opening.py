"""What a run stands on, and where it starts."""

from typing import Any, NamedTuple

import jax
from etils.epath import Path
from jax.sharding import Mesh

from spiral_jax.convert.upcycle import fresh_linears, place, upcycled
from spiral_jax.data.pipeline import WindowOrder
from spiral_jax.data.prepared import PreparedData
from spiral_jax.evaluation.task_evaluation import OpenTasks, open_tasks_of_run
from spiral_jax.parallel.processes import Processes
from spiral_jax.run import own_code
from spiral_jax.run.checkpoint import Checkpoints
from spiral_jax.run.config import RunConfig
from spiral_jax.run.directory import check_same_data, read_model, tokenizer_of
from spiral_jax.run.evaluations import owed
from spiral_jax.run.guards import Guards
from spiral_jax.run.inputs import check_data, prepare_data, window_order
from spiral_jax.run.resume import Saved, newest_whole
from spiral_jax.training.step import Program, TrainState, abstract_state


class Opened(NamedTuple):
    """What a run stands on: opened and checked before anything is compiled.

    Attributes:
      data: training and validation text, and the tokenizer.
      order: which windows come when.
      tasks: of the harness, None for none.
      checkpoints: of the run's directory.
      saved: the newest of them that is whole, restored; None if there is none.
      given: parameters to start from, of another model; None for none.
      owed: evaluations after the step of `saved` that were due and not made: their `values`.
    """

    data: PreparedData
    order: WindowOrder
    tasks: OpenTasks | None
    checkpoints: Checkpoints
    saved: Saved | None
    given: dict[str, Any] | None
    owed: frozenset[str]

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.saved.step if self.saved else 0


def open_run(config: RunConfig, workdir: Path, mesh: Mesh, processes: Processes, guards: Guards) -> Opened:
    """Opens what the run stands on, and checks it against its newest checkpoint that is whole.

    Raises:
      SpiralError: a configuration or data that does not continue the run, data that is missing or does not suit it, or
        an `upcycle.source` that does not.
    """
    checkpoints = Checkpoints(workdir, config.checkpoint, processes=processes, before_commit=guards.look_at_claim)
    saved = newest_whole(config, workdir, checkpoints, abstract_state(config, mesh), processes)
    for line in own_code.changes(workdir, config.to_dict()) if saved else ():
        processes.say(line)
    fingerprints = saved.fingerprints if saved else None
    tasks = open_tasks_of_run(config.evaluation, config.train.sequence_length)
    given = None
    if saved is None and config.upcycle.source:
        source = read_model(config.upcycle.source, processes=processes, field="upcycle.source")
        given = upcycled(config.upcycle, config.model, *source)
    guards.watchdog.expect_nothing()  # making stores can take long
    data = prepare_data(config, workdir, fingerprints, processes)
    guards.watchdog.expect("the start", "start_minutes")
    check_data(config, data)
    if fingerprints:
        check_same_data(config.data, data, fingerprints, workdir)
    order = window_order(config, data)
    owes = owed(config, workdir, data, saved.step if saved else 0, processes)
    return Opened(data, order, tasks, checkpoints, saved, given, owes)


def first_state(config: RunConfig, workdir: Path, program: Program, opened: Opened, processes: Processes) -> TrainState:
    """Where the run starts: at its newest checkpoint, at parameters from elsewhere, or at random ones."""
    if opened.saved and opened.step:
        processes.say(f"resuming after step {opened.step} of {config.train.steps}")
        return opened.saved.arrays
    state = program.init(jax.random.key(config.seed))
    if opened.saved:
        state = state.replace(params=opened.saved.arrays)
        processes.say("starting from the imported parameters")
        if tokenizer_of(workdir).fingerprint != opened.data.tokenizer.fingerprint:
            processes.say("note: the data is in another tokenizer's ids than the one imported with them")
    elif opened.given is not None:
        state = state.replace(params=place(opened.given, state.params))
        processes.say(f"starting from the layers of {config.upcycle.source}")
        fresh = fresh_linears(config.model, opened.given)
        if fresh:
            processes.say(f"starting as always, as the source has none like them: {', '.join(fresh)}")
    return state
