"""Muon: the momentum of matrices, orthogonalised; AdamW for the rest.

Jordan et al., 2024 (github.com/KellerJordan/Muon); scaled as in *Muon is Scalable for LLM Training*, arXiv 2502.16982.
"""

from typing import TYPE_CHECKING, Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers

from spiral_jax.model.config import ModelConfig
from spiral_jax.model.neox import layer_linears
from spiral_jax.model.operators import Linear
from spiral_jax.training.optimizers.adamw import adamw
from spiral_jax.training.optimizers.optimizer import optimizers

if TYPE_CHECKING:
    from spiral_jax.training.config import OptimizerConfig


@optimizers.register("muon")
def muon(config: "OptimizerConfig", learning_rate: optax.Schedule, model: ModelConfig) -> optax.GradientTransformation:
    """Muon for the layers' matrices and those that operators declare as such; AdamW for everything else.

    Each layer's matrix is orthogonalised by itself, and of the fused QKV each of the three projections. Embeddings,
    head, biases, LayerNorms, routers and scalers are AdamW's.
    """

    def numbers(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: matrix_axes(model, path), params)

    def labels(params):
        is_muon = jax.tree_util.tree_map_with_path(lambda path, _: matrix_axes(model, path) is not None, params)
        return jax.tree.map(lambda matrix: "muon" if matrix else "adamw", is_muon)

    matrices = optax.contrib.muon(
        learning_rate,
        beta=config.muon_momentum,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        consistent_rms=config.muon_update_rms or None,
        muon_weight_dimension_numbers=numbers,
    )
    return optax.partition({"muon": matrices, "adamw": adamw(config, learning_rate, model)}, labels)


def matrix_axes(model: ModelConfig, path: tuple[Any, ...]) -> MuonDimensionNumbers | None:
    """Which axes of a parameter are a matrix's inputs and outputs; None if it is no matrix of Muon's.

    Args:
      model: the architecture.
      path: of the parameter, as `jax.tree_util` gives it.
    """
    *groups, name, field = [key.key for key in path]
    if field != "kernel":
        return None
    if groups[-1:] == ["layers"]:
        return _axes_of(layer_linears(model)[name], stacked=1)
    own = [found.linear for found in model.operators.declared() if [found.group] == groups and found.name == name]
    return _axes_of(own[0], stacked=0) if own and own[0].is_matrix else None


def _axes_of(linear: Linear, stacked: int) -> MuonDimensionNumbers:
    """Axes of a kernel behind `stacked` others. What is called `qkv` counts matrices, as those others do."""
    names = linear.in_axes + linear.out_axes
    inputs = len(linear.in_axes)
    return MuonDimensionNumbers(
        tuple(stacked + i for i in range(inputs)),
        tuple(stacked + i for i in range(inputs, len(names)) if names[i] != "qkv"),
    )
