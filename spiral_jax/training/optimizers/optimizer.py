"""The registry of optimizers, the transformation that a step applies, and where its state lies."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh

from spiral_jax.errors import guarded, require
from spiral_jax.model.config import ModelConfig
from spiral_jax.model.spiralformer import abstract_params
from spiral_jax.parallel.mesh import replicated
from spiral_jax.registry import Registry
from spiral_jax.training.schedules import learning_rate, schedules

if TYPE_CHECKING:
    from spiral_jax.training.config import OptimizerConfig

# (its fields, the learning rate, the model) to the transformation of gradients into updates.
Optimizer = Callable[["OptimizerConfig", optax.Schedule, ModelConfig], optax.GradientTransformation]

optimizers: Registry[Optimizer] = Registry("optimizer.name")


def make_optimizer(
    config: "OptimizerConfig", steps: int, model: ModelConfig, rate: jax.Array | None = None
) -> optax.GradientTransformationExtraArgs:
    """Clips by the global norm, then the optimizer.

    Its `update` takes the gradients' norm, where that is known, as `gradient_norm`.

    Args:
      config: its fields.
      steps: of the run.
      model: the architecture.
      rate: the learning rate of the step it is used in; None for the schedule at the number of updates that optax has
        counted, which falls behind the step when updates are skipped.

    Raises:
      SpiralError: somebody's own optimizer raises something.
    """
    code = optimizers.code(config.name)
    make = optimizers[config.name]
    with guarded(f"optimizer.name {config.name!r} ({code.file})", code.file):
        optimizer = make(config, learning_rate(config, steps) if rate is None else lambda count: rate, model)
        require(
            isinstance(optimizer, optax.GradientTransformation),
            f"optimizer.name {config.name!r} ({code.file}): what it returns",
            optimizer,
            "an optax.GradientTransformation",
        )
    clip = [_clip_by_norm(config.clip_norm)] if config.clip_norm else []
    return optax.chain(*clip, optimizer)


def _clip_by_norm(largest: float) -> optax.GradientTransformationExtraArgs:
    """As `optax.clip_by_global_norm`, of a norm that may be known already."""

    def update(updates, state, params=None, *, gradient_norm=None, **_):
        del params
        norm = optax.tree.norm(updates) if gradient_norm is None else gradient_norm
        # One factor: dividing each number takes a loop of its own on CPU, and as many programs as there are shapes.
        factor = jnp.minimum(1.0, largest / norm)
        return jax.tree.map(lambda x: x * factor.astype(x.dtype), updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def check_optimizer(config: "OptimizerConfig", steps: int, model: ModelConfig) -> None:
    """Whether an optimizer and a schedule of the user's own take the model's parameters, found out from shapes.

    Raises:
      SpiralError: naming it, its file, and what is wrong.
    """
    code = schedules.code(config.schedule)
    if not code.is_ours:
        where = f"optimizer.schedule {config.schedule!r} ({code.file})"
        with guarded(where, code.file):
            rate = jax.eval_shape(learning_rate(config, steps), jax.ShapeDtypeStruct((), jnp.int32))
        require(getattr(rate, "shape", None) == (), f"{where}: what factor gives", rate, "one number")
    code = optimizers.code(config.name)
    if code.is_ours:
        return
    where = f"optimizer.name {config.name!r} ({code.file})"
    params = abstract_params(model)

    def update(rate, grads, state, params):  # as a step makes it
        return make_optimizer(config, steps, model, rate).update(grads, state, params)

    with guarded(where, code.file):
        state = jax.eval_shape(make_optimizer(config, steps, model).init, params)
        updates, after = jax.eval_shape(update, jax.ShapeDtypeStruct((), jnp.float32), params, state, params)
    # A skipped update leaves the state as it was: with it and without it a step gives the same kind of state.
    kinds = [jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", tree) for tree in (after, state)]
    require(kinds[0] == kinds[1], f"{where}: arrays of its state after an update", "others", "those before it")
    found, wanted = (jax.tree.map(lambda x: x.shape, tree) for tree in (updates, params))
    require(found == wanted, f"{where}: shapes of updates", "others", "those of the parameters")


def state_shardings(opt_state: Any, params: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Where an optimizer's state lies: moments with their parameters, whatever else on every device.

    An array belongs to the parameter whose path its own path ends with, if it has that parameter's shape. Masked
    leaves are no arrays, and so no trouble.

    Args:
      opt_state: of any optax transformation, abstract.
      params: tree of dictionaries of arrays with shardings.
      mesh: the devices.
    """
    of_path = {_names(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}
    longest = max(map(len, of_path))

    def sharding(path, x):
        names = _names(path)
        for length in range(min(longest, len(names)), 0, -1):
            param = of_path.get(names[-length:])
            if param is not None and param.shape == x.shape:
                return param.sharding
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(sharding, opt_state)


def _names(path) -> tuple[Any, ...]:
    return tuple(getattr(key, "key", getattr(key, "name", getattr(key, "idx", None))) for key in path)
