"""The training program of a run on a mesh: state, its shardings, the compiled steps."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from spiral_jax.data.examples import Examples
from spiral_jax.kernels.choose import backend_for
from spiral_jax.model.spiralformer import SpiralFormer
from spiral_jax.parallel.mesh import replicated
from spiral_jax.parallel.placed_model import PlacedModel, abstract_params_on, place
from spiral_jax.training import fsdp
from spiral_jax.training.config import StepConfig
from spiral_jax.training.divergence import is_listed, is_sound
from spiral_jax.training.loss import mean_example_nats, mean_window_nats
from spiral_jax.training.optimizers import make_optimizer, state_shardings
from spiral_jax.training.schedules import learning_rate


class TrainState(flax.struct.PyTreeNode):
    """All that a step reads and writes, as arrays or, where only its layout matters, as ShapeDtypeStructs.

    Attributes:
      step: optimizer steps done, int32.
      params: the model's parameters.
      opt_state: optax state.
      rng: key data, uint32 [2]; nothing of the recipe draws from it during training.
    """

    step: Any
    params: Any
    opt_state: Any
    rng: Any


@dataclasses.dataclass(frozen=True)
class Program:
    """One run's training on one mesh; `make_program` builds it for commands and compilers alike.

    Attributes:
      placed: the model on the mesh.
      init: (key) to a TrainState, born sharded. Jitted.
      train_step: (state, batch) to (state, metrics); donates the state. A step that is not to be believed
        (`training.divergence`) leaves parameters and optimizer state as they were. Jitted.
      abstract_state: TrainState of ShapeDtypeStructs that carry their shardings.
      abstract_batch: windows [B, L + 1] likewise; `Examples` of arrays [B, L] where batches bring their targets.
    """

    placed: PlacedModel
    init: Any
    train_step: Any
    abstract_state: TrainState
    abstract_batch: Any

    def lowered(self) -> jax.stages.Lowered:
        """The step for the shapes that it is called with, ready to be compiled; nothing has to be on the devices."""
        return self.train_step.lower(self.abstract_state, self.abstract_batch)

    def put_rows_of_process(self, rows: Any) -> Any:
        """This process's rows of a batch, as the batch on the devices of all."""

        def put(whole: jax.ShapeDtypeStruct, rows: np.ndarray) -> jax.Array:
            return jax.make_array_from_process_local_data(whole.sharding, rows, whole.shape)

        return jax.tree.map(put, self.abstract_batch, rows)


def make_program(config: StepConfig, mesh: Mesh) -> Program:
    """Builds, but does not compile, everything that runs on the devices.

    Raises:
      SpiralError: `train.attention` is one that the devices or the model do not have.
    """
    placed = place(config.model, mesh, backend_for(mesh, config.model, config.train.attention))
    schedule = learning_rate(config.optimizer, config.train.steps)
    state = _state_around(config, placed.abstract_params, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    specs = fsdp.specs_of(shardings.params)
    local = fsdp.model_of_a_device(config.model, config.train, mesh, specs)

    def train_step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        loss, metrics, summed = _gradients(config, mesh, local, specs, state.params, batch)
        summed = jax.lax.with_sharding_constraint(summed, shardings.params)
        norm, rate = optax.tree.norm(_means(config, mesh, summed)), schedule(state.step)
        optimizer = make_optimizer(config.optimizer, config.train.steps, config.model, rate)

        def updated(params, opt_state):
            # Means made anew from the sums cost nothing; those that the norm was made of would have to be kept for it.
            grads = _means(config, mesh, summed)
            updates, opt_state = optimizer.update(grads, opt_state, params, gradient_norm=norm)
            return optax.apply_updates(params, updates), opt_state

        applied = is_sound(config.divergence, mesh, loss, norm)
        if config.train.skip_steps:
            applied &= ~is_listed(state.step + 1, config.train.skip_steps)
        # A branch, not a choice between two results: both would have to be there, and memory for both.
        params, opt_state = jax.lax.cond(applied, updated, lambda *kept: kept, state.params, state.opt_state)
        skipped = 1 - applied.astype(jnp.int32)
        metrics |= {"loss": loss, "learning_rate": rate, "gradient_norm": norm, "skipped": skipped}
        return TrainState(state.step + 1, params, opt_state, state.rng), metrics

    return Program(
        placed=placed,
        init=jax.jit(functools.partial(_initial_state, config), out_shardings=shardings),
        train_step=jax.jit(
            train_step,
            in_shardings=(shardings, placed.batch),
            out_shardings=(shardings, placed.everywhere),
            donate_argnums=0,
        ),
        abstract_state=state,
        abstract_batch=_abstract_batch(config, placed),
    )


def _abstract_batch(config: StepConfig, placed: PlacedModel) -> Any:
    """The shapes of what a step takes."""
    B, L = config.train.batch_size, config.train.sequence_length
    if not config.brings_targets:
        return jax.ShapeDtypeStruct((B, L + 1), jnp.int32, sharding=placed.batch)
    ids, weights = (jax.ShapeDtypeStruct((B, L), dtype, sharding=placed.batch) for dtype in (jnp.int32, jnp.float32))
    return Examples(ids, ids, weights)


def abstract_state(config: StepConfig, mesh: Mesh | AbstractMesh) -> TrainState:
    """The TrainState's shapes, dtypes and shardings on a mesh, which may be one that is not there."""
    return _state_around(config, abstract_params_on(config.model, mesh), mesh)


def _state_around(config: StepConfig, params: Any, mesh: Mesh | AbstractMesh) -> TrainState:
    """The abstract TrainState that abstract parameters are part of."""
    state = jax.eval_shape(functools.partial(_start, config), params, jax.eval_shape(lambda: jax.random.key(0)))
    opt_state = jax.tree.map(_placed, state.opt_state, state_shardings(state.opt_state, params, mesh))
    everywhere = replicated(mesh)
    return TrainState(_placed(state.step, everywhere), params, opt_state, _placed(state.rng, everywhere))


def _placed(x: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _initial_state(config: StepConfig, key: jax.Array) -> TrainState:
    """Step 0."""
    init_key, rng = jax.random.split(key)
    params = nn.unbox(SpiralFormer(config.model).init(init_key, jnp.zeros((1, 1), jnp.int32))["params"])
    return _start(config, params, rng)


def _start(config: StepConfig, params: Any, rng: jax.Array) -> TrainState:
    """Step 0 from these parameters."""
    optimizer = make_optimizer(config.optimizer, config.train.steps, config.model)
    return TrainState(jnp.int32(0), params, optimizer.init(params), jax.random.key_data(rng))


def _gradients(config: StepConfig, mesh: Mesh, model: SpiralFormer, specs, params, batch: Any):
    """The batch's mean loss and metrics, and gradients of which `_means` are those of the loss.

    `accumulation` micro-batches go one after the other.
    """
    A = config.train.accumulation
    core_is_whole = fsdp.holds_core(config.model, config.train, mesh)

    def loss_of(params, rows):
        mean_nats = mean_example_nats if isinstance(rows, Examples) else mean_window_nats
        return mean_nats(model, params, rows, config.train.loss_block)

    def on_a_device(params, rows):
        if isinstance(rows, Examples):
            rows = _with_mean_weight_1(rows)
        params = fsdp.gather_rest(params, specs)
        if core_is_whole:
            params = fsdp.gather_core(params, specs, config.model.dtype)

        def gradient(rows):
            (loss, metrics), grads = jax.value_and_grad(loss_of, has_aux=True)(params, rows)
            return {"loss": loss} | metrics, fsdp.without_values(grads)

        if A == 1:
            metrics, grads = gradient(rows)
        else:
            # Row a of every device's share goes to micro-batch a, so that no row moves between devices.
            micro_batches = jax.tree.map(lambda x_BxL: x_BxL.reshape(-1, A, x_BxL.shape[-1]).swapaxes(0, 1), rows)
            shapes = jax.eval_shape(gradient, jax.tree.map(lambda x_AxBxL: x_AxBxL[0], micro_batches))
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            (metrics, grads), _ = jax.lax.scan(
                lambda total, rows: (jax.tree.map(jnp.add, total, gradient(rows)), None), zeros, micro_batches
            )
        return _means(config, mesh, fsdp.sum_over(metrics)), fsdp.sum_over_rows(grads, specs, core_is_whole)

    run = fsdp.on_each_device(mesh, on_a_device, (specs, PartitionSpec(fsdp.ROWS)), (PartitionSpec(), specs))
    metrics, grads = run(params, batch)
    return metrics.pop("loss"), metrics, grads


def _with_mean_weight_1(rows: Examples) -> Examples:
    """The weights over their mean, all devices' and micro-batches' together: what follows is means over positions.

    Inside `fsdp.on_each_device`.
    """
    sums = jnp.sum(rows.weights_BxL), jnp.asarray(rows.weights_BxL.size, jnp.float32)
    weight, positions = fsdp.sum_over(sums)
    return rows._replace(weights_BxL=rows.weights_BxL * (positions / weight))


def _means(config: StepConfig, mesh: Mesh, summed: Any) -> Any:
    """Sums over devices and micro-batches, of means of their rows, to means over the batch."""
    share = 1 / (config.train.accumulation * mesh.shape["data"] * mesh.shape["fsdp"])
    return jax.tree.map(functools.partial(jnp.multiply, share), summed)
