"""The train loop: dispatch a step, then read the metrics of the one before."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


@dataclasses.dataclass
class _Pending:
    """A dispatched step whose metrics are still on the device."""

    step: int
    metrics: Mapping[str, Any]
    input_wait: float
    extra: dict[str, Any]
    step_time: float | None = None


class Recorder:
    """Turns device metrics into rows, one step late, so that the device never waits for a read.

    Reading a step's metrics waits for that step. `record` is therefore called for step n - 1 when step n has been
    dispatched, or by `flush` when nothing follows.
    """

    def __init__(self, record: Callable[[dict[str, Any]], None]):
        """`record` takes a row: `step`, `step_time` and `input_wait` in seconds, and the step's metrics as floats."""
        self._record = record
        self._pending: _Pending | None = None
        self._clock = time.perf_counter()

    def dispatched(self, step: int, metrics: Mapping[str, Any], input_wait: float) -> None:
        """Step `step` is on its way: now the one before may be read."""
        self.flush()
        self._pending = _Pending(step, metrics, input_wait, {})

    def add(self, values: Mapping[str, Any]) -> None:
        """Adds values to the row of the step dispatched last."""
        assert self._pending is not None, "no step has been dispatched"
        self._pending.extra.update(values)

    def flush(self) -> None:
        """Reads and records the step dispatched last."""
        if self._pending is None:
            return
        row, self._pending = self._pending, None
        metrics = {name: np.asarray(value).tolist() for name, value in jax.device_get(row.metrics).items()}
        if row.step_time is None:
            row.step_time = self._lap()
        self._record(
            {"step": row.step, **metrics, "step_time": row.step_time, "input_wait": row.input_wait, **row.extra}
        )

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around work that is not training: its time is no step's."""
        if self._pending is not None and self._pending.step_time is None:
            jax.block_until_ready(self._pending.metrics)  # waits, but reads nothing
            self._pending.step_time = self._lap()
        yield
        self._clock = time.perf_counter()

    def _lap(self) -> float:
        """Seconds since the step before was finished."""
        before, self._clock = self._clock, time.perf_counter()
        return self._clock - before


class Stopped(Exception):
    """An evaluation was left, as all processes have agreed to stop."""


class AgreedStop:
    """Lets all processes stop, or save, after the same step, whichever of them is asked to.

    After every step the processes compare on the devices what each was asked. The answer is read one step late, as the
    metrics are, so that nothing waits for it: the step after the one in which a process was asked is the last.

    Attributes:
      signal: what `requested` was on some process; None while it was so on none.
    """

    def __init__(
        self, requested: Callable[[], int | None], mesh: Mesh, save_requested: Callable[[], bool] = lambda: False
    ):
        """`requested` gives the number of the signal that asked this process to stop, or None.

        `save_requested` says on process 0, once, that the state is to be saved.
        """
        self.signal: int | None = None
        self._requested, self._save_requested, self._save = requested, save_requested, False
        self._by_device = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._shape = (mesh.size, 2)
        self._largest = jax.jit(lambda x_Dx2: jnp.max(x_Dx2, 0), out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._answer: jax.Array | None = None

    def __call__(self) -> bool:
        """After a step, or a batch of an evaluation, on every process: the same answer on all of them."""
        asked = self._requested() or 0, int(jax.process_index() == 0 and self._save_requested())
        if jax.process_count() > 1:
            numbers = np.broadcast_to(np.asarray(asked, np.int32), self._shape)
            asked_Dx2 = jax.make_array_from_callback(self._shape, self._by_device, numbers.__getitem__)
            before, self._answer = self._answer, self._largest(asked_Dx2)
            signal, save = (0, 0) if before is None else np.asarray(before)
            asked = int(signal), int(save)
        self.signal = asked[0] or None
        self._save |= bool(asked[1])
        return self.signal is not None

    def check(self) -> None:
        """The same between two batches of an evaluation.

        Raises:
          Stopped: to leave it.
        """
        if self():
            raise Stopped

    def take_save(self) -> bool:
        """Whether it was agreed to save, since this was asked last."""
        save, self._save = self._save, False
        return save


class Evaluation(Protocol):
    """Something to find out about a model after some of its steps.

    Attributes:
      values: what the names of its values begin with.
    """

    values: str

    def due(self, step: int) -> bool:
        """Whether after this step."""

    def __call__(self, step: int, state: Any) -> dict[str, Any]:
        """Values for the step's row; the state is that after the step."""


class Saving(Protocol):
    """What is kept after some steps, and when the loop is asked to stop."""

    def due(self, step: int) -> bool:
        """Whether after this step."""

    def __call__(self, step: int, state: Any) -> None:
        """Keeps the state after the step."""


class Returning(Protocol):
    """What to do when a state is beyond hope."""

    def due(self) -> bool:
        """Whether the rows up to that of the step before the last one dispatched say so."""

    def __call__(self, step: int, state: Any) -> Any:
        """Another state to go on with after this step, the last one dispatched."""


def fit(
    state: Any,
    steps: range,
    *,
    train_step: Callable[[Any, Any], tuple[Any, Mapping[str, Any]]],
    batches: Iterator[Any],
    recorder: Recorder,
    evaluations: Sequence[Evaluation],
    saving: Saving,
    returning: Returning | None = None,
    before_step: Callable[[int], None] = lambda step: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[Any, int]:
    """Runs steps, counted from 1.

    Args:
      state: before the first step; donated.
      steps: which to run.
      train_step: (state, batch) to (state, metrics), asynchronous.
      batches: device batches, the first one for the first step.
      recorder: takes the metrics.
      evaluations: run after the steps for which they are due; their values go into the step's row. One that raises
        `Stopped` is left, and the state saved at once.
      saving: run after the steps for which it is due, and when stopping early.
      returning: asked after every step whether to go on with another state.
      before_step: called before a step is dispatched (profiling).
      should_stop: asked after every step; True saves, before any evaluation, and returns.

    Returns:
      The state and the number of the last step done.
    """
    step = steps.start - 1
    for step in steps:
        before_step(step)
        start = time.perf_counter()
        batch = next(batches)
        input_wait = time.perf_counter() - start
        state, metrics = train_step(state, batch)
        recorder.dispatched(step, metrics, input_wait)
        if returning is not None and returning.due():
            with recorder.paused():
                state = returning(step, state)
        stop = should_stop()
        due = [] if stop else [evaluation for evaluation in evaluations if evaluation.due(step)]
        if due:
            with recorder.paused():
                try:
                    for evaluation in due:
                        recorder.add(evaluation(step, state))
                except Stopped:
                    stop = True
        if stop or saving.due(step):
            # The row goes out with the checkpoint: a run resumed from here has every step before it on record.
            with recorder.paused():
                recorder.flush()
                saving(step, state)
        if stop:
            break
    recorder.flush()
    return state, step
