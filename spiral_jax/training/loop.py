"""The train loop: dispatch a step, then read the metrics of the one before."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

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
        self._pending.extra |= values

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


class AgreedStop:
    """Lets all processes stop after the same step, whichever of them is asked to.

    After every step the processes compare on the devices what each was asked. The answer is read one step late, as the
    metrics are, so that nothing waits for it: the step after the one in which a process was asked is the last.

    Attributes:
      signal: what `requested` was on some process; None while it was so on none.
    """

    def __init__(self, requested: Callable[[], int | None], mesh: Mesh):
        """`requested` gives the number of the signal that asked this process to stop, or None."""
        self.signal: int | None = None
        self._requested = requested
        self._by_device = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._shape = (mesh.size,)
        self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._answer: jax.Array | None = None

    def __call__(self) -> bool:
        """After a step, on every process: the same answer on all of them."""
        asked = self._requested()
        if jax.process_count() == 1:
            self.signal = asked
            return asked is not None
        numbers = np.full(self._shape, asked or 0, np.int32)
        asked_D = jax.make_array_from_callback(self._shape, self._by_device, numbers.__getitem__)
        before, self._answer = self._answer, self._largest(asked_D)
        self.signal = (None if before is None else int(before)) or None
        return self.signal is not None


def fit(
    state: Any,
    *,
    train_step: Callable[[Any, Any], tuple[Any, Mapping[str, Any]]],
    batches: Iterator[Any],
    first_step: int,
    last_step: int,
    recorder: Recorder,
    evaluate: Callable[[Any], dict[str, Any]],
    evaluate_due: Callable[[int], bool],
    save: Callable[[int, Any], None],
    save_due: Callable[[int], bool],
    before_step: Callable[[int], None] = lambda step: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[Any, int]:
    """Runs steps first_step..last_step (counted from 1).

    Args:
      state: before the first step; donated.
      train_step: (state, batch) to (state, metrics), asynchronous.
      batches: device batches, the first one for `first_step`.
      first_step: first step to run.
      last_step: last step to run.
      recorder: takes the metrics.
      evaluate: state to values for the row of the step just done.
      evaluate_due: step to whether to evaluate after it.
      save: (step, state), called where `save_due` says and when stopping early.
      save_due: step to whether to save after it.
      before_step: called before a step is dispatched (profiling).
      should_stop: asked after every step; True saves and returns.

    Returns:
      The state and the number of the last step done.
    """
    step = first_step - 1
    for step in range(first_step, last_step + 1):
        before_step(step)
        start = time.perf_counter()
        batch = next(batches)
        input_wait = time.perf_counter() - start
        state, metrics = train_step(state, batch)
        recorder.dispatched(step, metrics, input_wait)
        if evaluate_due(step):
            with recorder.paused():
                recorder.add(evaluate(state))
        stop = should_stop()
        if stop or save_due(step):
            # The row goes out with the checkpoint: a run resumed from here has every step before it on record.
            with recorder.paused():
                recorder.flush()
                save(step, state)
        if stop:
            break
    recorder.flush()
    return state, step
