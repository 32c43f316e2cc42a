"""What is trained for how long, and by which optimizer: by default the recipe of docs/spec.md section 5."""

import dataclasses
import math
from typing import Literal, get_args

from spiral_jax.errors import require
from spiral_jax.model.config import ModelConfig
from spiral_jax.parallel.mesh import MeshConfig, check_divisible
from spiral_jax.training.divergence import DivergenceConfig
from spiral_jax.training.optimizers import optimizers
from spiral_jax.training.schedules import schedules

Attention = Literal["auto", "xla", "splash", "cudnn", "blocks"]
GatherCore = Literal["iteration", "step"]
# Steps and tokens are counted in int32 on devices, and nobody's batch comes near.
_LARGEST = {"steps": 2**31 - 1, "batch_size": 2**24, "sequence_length": 2**24, "accumulation": 2**24}


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The run's extent.

    Attributes:
      steps: optimizer steps.
      batch_size: sequences per optimizer step over all devices.
      sequence_length: tokens per sequence, L.
      accumulation: micro-batches a step's batch is cut into; gradients are summed in float32.
      loss_block: positions of a sequence whose logits exist at one time.
      attention: what computes it: `splash` (TPU), `cudnn` (GPU, bfloat16), `blocks` (CPU), `xla` (anywhere;
        materialises the L x L scores), or `auto` for the best of them that the devices have.
      gather_core: with `mesh.fsdp` above 1, a layer of the shared core is gathered whenever an `iteration` runs it, as
        other layers are; or the core once per `step` and kept: it is sent, and its gradients are, once instead of once
        per iteration, for the memory of all its matrices in the compute dtype and of their gradients in float32.
      skip_steps: steps, counted from 1, whose update is skipped whatever their numbers are: data and learning rate go
        on, parameters and optimizer state stay. When a run is resumed, those to come may change.
    """

    steps: int = 120_818
    batch_size: int = 512
    sequence_length: int = 4096
    accumulation: int = 1
    loss_block: int = 512
    attention: Attention = "auto"
    gather_core: GatherCore = "iteration"
    skip_steps: tuple[int, ...] = ()

    def __post_init__(self):
        for field, choices in (("attention", get_args(Attention)), ("gather_core", get_args(GatherCore))):
            require(getattr(self, field) in choices, f"train.{field}", getattr(self, field), ", ".join(choices))
        for field in ("steps", "batch_size", "sequence_length", "accumulation", "loss_block"):
            require(getattr(self, field) >= 1, f"train.{field}", getattr(self, field), "1 or more")
        ok = all(1 <= step <= self.steps for step in self.skip_steps)
        require(ok, "train.skip_steps", self.skip_steps, f"numbers from 1 to train.steps, {self.steps}")
        for field, largest in _LARGEST.items():
            require(getattr(self, field) <= largest, f"train.{field}", getattr(self, field), f"up to {largest}")

    @property
    def micro_batch_size(self) -> int:
        """Sequences over all devices that are worked on at one time: what fits in training fits in evaluation."""
        return self.batch_size // self.accumulation

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.sequence_length


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its learning rate.

    Attributes:
      name: `adamw`; `muon`, which orthogonalises the updates of matrices and leaves the rest to AdamW; or one of your
        own (docs/topologies.md).
      peak_learning_rate: reached at the end of warm-up.
      schedule: `cosine` falls to the final rate over all steps; `wsd` (warm-up, stable, decay) stays at the peak and
        falls linearly over the last `decay_fraction` of the steps; `constant` stays at the peak; or one of your own.
      warmup_steps: steps of linear warm-up; None for ceil(`warmup_fraction` of the steps).
      warmup_fraction: see `warmup_steps`.
      decay_fraction: part of the steps that `wsd` decays over.
      final_fraction: the last step's learning rate over the peak (`cosine`, `wsd`).
      beta1: AdamW's decay of the first moment.
      beta2: AdamW's decay of the second moment.
      epsilon: the term that keeps AdamW's division, and Muon's, finite.
      weight_decay: decoupled, times the learning rate, on matrices and embeddings only.
      muon_momentum: decay of Muon's momentum.
      muon_update_rms: root mean square of Muon's update of a matrix, before the learning rate. 0.2 is about AdamW's, so
        that its learning rates and decay carry over; 0 scales by sqrt(max(1, outputs / inputs)) instead, as the first
        Muon did.
      clip_norm: largest global norm of the gradient; 0 turns clipping off.
    """

    name: str = "adamw"
    peak_learning_rate: float = 6e-4
    schedule: str = "cosine"
    warmup_steps: int | None = None
    warmup_fraction: float = 0.01
    decay_fraction: float = 0.2
    final_fraction: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.01
    muon_momentum: float = 0.95
    muon_update_rms: float = 0.2
    clip_norm: float = 1.0

    def __post_init__(self):
        optimizers.check(self.name)
        schedules.check(self.schedule)
        warmup = self.warmup_steps
        require(warmup is None or warmup >= 0, "optimizer.warmup_steps", warmup, "0 or more")
        for field in ("warmup_fraction", "decay_fraction", "final_fraction"):
            value = getattr(self, field)
            require(0 <= value <= 1, f"optimizer.{field}", value, "0 to 1")
        for field in ("beta1", "beta2", "muon_momentum"):
            value = getattr(self, field)
            require(0 <= value < 1, f"optimizer.{field}", value, "0 or more and less than 1")
        for field in ("peak_learning_rate", "epsilon"):
            value = getattr(self, field)
            require(value > 0 and math.isfinite(value), f"optimizer.{field}", value, "a positive number")
        for field in ("weight_decay", "clip_norm", "muon_update_rms"):
            value = getattr(self, field)
            require(value >= 0 and math.isfinite(value), f"optimizer.{field}", value, "0 or more")

    def resolved_warmup(self, steps: int) -> int:
        """W, steps of warm-up in a run of `steps`."""
        return self.warmup_steps if self.warmup_steps is not None else math.ceil(self.warmup_fraction * steps)

    def stable_until(self, steps: int) -> int:
        """First step whose learning rate depends on how many steps follow, in a run of `steps`."""
        return schedules[self.schedule](self, steps).stable_until()


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """What decides a training step: the part of a run's configuration that programs and their costs are made of."""

    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    divergence: DivergenceConfig = DivergenceConfig()

    @property
    def brings_targets(self) -> bool:
        """Whether batches have targets and weights of their own, `data.examples.Examples` instead of windows."""
        return False

    def check_mesh(self, num_devices: int) -> tuple[int, int, int]:
        """Devices along (data, fsdp, tensor).

        Raises:
          SpiralError: a mesh that does not fit the devices, or a batch or model that does not divide over it.
        """
        shape = self.mesh.shape(num_devices)
        check_divisible(shape, self.model, self.train.batch_size, self.train.accumulation)
        return shape
