"""When a step's update is skipped, decided on the devices; and when skipping has to end, decided from the run's rows.

A number that is no number, once it is in the parameters or in the optimizer's state, stays there. So a step whose loss
or gradient is not finite changes neither. The norm of all gradients stands for the gradients: it is finite only if all
of them are. (Its squares overflow in float32 from about 1e19 on: such gradients, finite or not, are skipped too.)
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from spiral_jax.errors import require


@dataclasses.dataclass(frozen=True)
class DivergenceConfig:
    """What becomes of a run whose numbers are no numbers, or too large.

    The update of a step with a loss or gradients that are not finite is skipped: the step counts, its data is used up
    and the learning rate goes on, but parameters and optimizer state stay as they were.

    Attributes:
      loss_above: a loss above this, in nats per token, is not believed and its step's update skipped as well; None for
        no bound. At the start the loss is about ln(`model.vocab_size`), which the bound has to be above.
      skips_in_a_row: after so many, training goes on with the parameters and optimizer state of the newest checkpoint
        that was saved before them, at the step after the last one tried. The steps between are passed over: they stay
        without effect, and checkpoints list them. Fewer than `checkpoint.keep` times `checkpoint.every_steps`, or that
        checkpoint is gone by then. Steps in `train.skip_steps` do not count.
      returns: times that this is done in a run; the next time, or if there is no such checkpoint, the run ends
        (exit status 44).
    """

    loss_above: float | None = None
    skips_in_a_row: int = 10
    returns: int = 3

    def __post_init__(self):
        bound = self.loss_above
        ok = bound is None or (bound > 0 and math.isfinite(bound))
        require(ok, "divergence.loss_above", bound, "a positive number")
        require(self.skips_in_a_row >= 1, "divergence.skips_in_a_row", self.skips_in_a_row, "1 or more")
        require(self.returns >= 0, "divergence.returns", self.returns, "0 or more")


def is_sound(
    config: DivergenceConfig, mesh: Mesh | AbstractMesh, loss: jax.Array, gradient_norm: jax.Array
) -> jax.Array:
    """Whether a step's update may be applied: the same answer on every device.

    Args:
      config: `loss_above`.
      mesh: of the step.
      loss: summed over all devices.
      gradient_norm: of the gradients that are applied, likewise.
    """
    sound = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
    if config.loss_above is not None:
        sound &= loss <= config.loss_above
    if mesh.size == 1:
        return sound
    # Sums over all devices are made several times, once on every device that holds a copy. If an error makes one copy
    # NaN, all devices have to skip: on different sides of a branch they would wait for each other's collectives.
    agree = jax.shard_map(
        lambda sound: jax.lax.pmin(sound, mesh.axis_names),
        mesh=mesh,
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    return agree(sound.astype(jnp.int32)) == 1


def is_listed(step: jax.Array, skip_steps: Sequence[int]) -> jax.Array:
    """Whether a step, counted from 1, is one of those of `train.skip_steps`."""
    return jnp.any(step == np.array(skip_steps, np.int32))


def reason(row: Mapping[str, Any], config: DivergenceConfig, skip_steps: Sequence[int]) -> str:
    """Why a step's update was skipped, in words.

    Args:
      row: the step's, with `step`, `loss` and `gradient_norm`.
      config: the run's.
      skip_steps: likewise.
    """
    loss, norm = row["loss"], row["gradient_norm"]
    if row["step"] in skip_steps:
        return "train.skip_steps names it"
    if not math.isfinite(loss):
        return f"its loss is {loss}"
    if not math.isfinite(norm):
        return f"the norm of its gradients is {norm}"
    if config.loss_above is not None and loss > config.loss_above:
        return f"its loss {loss:.4f} is above divergence.loss_above {config.loss_above}"
    return "on some device its loss or gradients are not finite"


class Skips:
    """What a run's rows say of skipped updates. All processes read the same rows and come to the same answers.

    Attributes:
      in_a_row: skipped one after the other, up to the newest row.
      good: step of the newest checkpoint that was not saved amid skips; None for none.
      passed_over: pairs (first, last) of steps without effect since a return to a checkpoint.
    """

    def __init__(self, config: DivergenceConfig, skip_steps: Sequence[int], saved: Mapping[str, Any] | None = None):
        """`saved` is what `to_json` gave for the checkpoint that a run goes on from."""
        saved = saved or {"in_a_row": 0, "good": None, "passed_over": []}
        self._config, self._listed = config, frozenset(skip_steps)
        self.in_a_row: int = saved["in_a_row"]
        self.good: int | None = saved["good"]
        self.passed_over: list[tuple[int, int]] = [(first, last) for first, last in saved["passed_over"]]

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Takes the row of the next step."""
        step = row["step"]
        is_passed_over = bool(self.passed_over) and step <= self.passed_over[-1][1]
        if not is_passed_over and step not in self._listed:
            self.in_a_row = self.in_a_row + 1 if row["skipped"] else 0

    def then(self, record: Callable[[dict[str, Any]], None] | None) -> Callable[[dict[str, Any]], None]:
        """Takes a row and hands it on, if there is a `record`."""

        def take(row: dict[str, Any]) -> None:
            self(row)
            if record is not None:
                record(row)

        return take

    def too_many(self) -> bool:
        """Whether it is time to return to a checkpoint."""
        return self.in_a_row >= self._config.skips_in_a_row

    def may_return(self) -> bool:
        """Whether that may be done once more."""
        return len(self.passed_over) < self._config.returns

    def saving(self, step: int) -> None:
        """A checkpoint of this step is being saved."""
        if self.in_a_row == 0:
            self.good = step

    def returned(self, saved: int, step: int) -> None:
        """Training goes on after `step` with the arrays of the checkpoint of step `saved`."""
        self.passed_over.append((saved + 1, step))
        self.in_a_row = 0

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"in_a_row": self.in_a_row, "good": self.good, "passed_over": [list(pair) for pair in self.passed_over]}
