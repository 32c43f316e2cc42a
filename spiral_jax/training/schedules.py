"""The learning rate over a run: linear warm-up, then a schedule (docs/spec.md section 5)."""

import dataclasses
import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import optax

from spiral_jax.errors import SpiralError, require
from spiral_jax.registry import Registry

if TYPE_CHECKING:
    from spiral_jax.training.config import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Base of all schedules: what part of the peak a step after warm-up has.

    Attributes:
      config: its fields.
      steps: of the run.
    """

    config: "OptimizerConfig"
    steps: int

    def factor(self, k: jax.Array) -> jax.Array:
        """The learning rate of step k over the peak; k is float32, from 0 to steps - 1."""
        raise NotImplementedError

    def check(self) -> None:
        """Whether warm-up and schedule fit into the run.

        Raises:
          SpiralError: naming the fields that do not.
        """
        warmup, steps = self.config.warmup_steps, self.steps
        require(warmup is None or warmup <= steps, "optimizer.warmup_steps", warmup, f"at most train.steps, {steps}")

    def stable_until(self) -> int:
        """First step whose learning rate depends on how many follow: until there a run may become longer or shorter."""
        return 0


schedules: Registry[type[Schedule]] = Registry("optimizer.schedule", Schedule)


@schedules.register("cosine")
class Cosine(Schedule):
    """From the peak to the final rate over all steps after warm-up, along half a cosine."""

    def factor(self, k):
        W, final = self.config.resolved_warmup(self.steps), self.config.final_fraction
        progress = jnp.clip((k + 1 - W) / max(self.steps - W, 1), 0, 1)
        return final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * progress))


@schedules.register("wsd")
class WarmupStableDecay(Schedule):
    """At the peak, then linearly to the final rate over the last `decay_fraction` of the steps."""

    def factor(self, k):
        stable = self.stable_until()
        progress = jnp.clip((k + 1 - stable) / max(self.steps - stable, 1), 0, 1)
        return 1 - (1 - self.config.final_fraction) * progress

    def check(self):
        super().check()
        config, stable = self.config, self.stable_until()
        if config.warmup_steps is not None:
            allowed = f"at most {stable}, where optimizer.decay_fraction begins the decay"
            require(config.warmup_steps <= stable, "optimizer.warmup_steps", config.warmup_steps, allowed)
        elif config.warmup_fraction + config.decay_fraction > 1:
            raise SpiralError(
                f"optimizer.warmup_fraction {config.warmup_fraction} and optimizer.decay_fraction "
                f"{config.decay_fraction} overlap; allowed: at most 1 together"
            )

    def stable_until(self):
        return self.steps - math.ceil(self.config.decay_fraction * self.steps)


@schedules.register("constant")
class Constant(Schedule):
    """At the peak."""

    def factor(self, k):
        return jnp.float32(1)

    def stable_until(self):
        return self.steps


def learning_rate(config: "OptimizerConfig", steps: int) -> optax.Schedule:
    """Step k to learning rate: peak (k + 1) / W for k < W, then the schedule; k runs from 0 to steps - 1."""
    W, schedule = config.resolved_warmup(steps), schedules[config.schedule](config, steps)

    def rate(step):
        k = jnp.asarray(step, jnp.float32)
        return config.peak_learning_rate * jnp.where(k < W, (k + 1) / max(W, 1), schedule.factor(k))

    return rate
