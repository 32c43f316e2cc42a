"""A model placed on a mesh: what scoring, generation, tasks and training share."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from spiral_jax.model.backend import Backend
from spiral_jax.model.config import ModelConfig
from spiral_jax.model.spiralformer import SpiralFormer, boxed_params
from spiral_jax.parallel.mesh import batch_sharding, constrain, replicated, shardings_of


@dataclasses.dataclass(frozen=True)
class PlacedModel:
    """A model and the mesh that its activations are pinned to.

    Attributes:
      model: the module, tied to `mesh`.
      mesh: the devices.
    """

    model: SpiralFormer
    mesh: Mesh

    @property
    def batch(self) -> NamedSharding:
        """Of tokens [B, L], and of any array whose first axis is the batch."""
        return batch_sharding(self.mesh)

    @property
    def everywhere(self) -> NamedSharding:
        """Of arrays that every device has whole."""
        return replicated(self.mesh)

    @functools.cached_property
    def abstract_params(self) -> Any:
        """The parameters' shapes and dtypes with their shardings, as a tree of ShapeDtypeStructs."""
        return abstract_params_on(self.model.config, self.mesh)  # traces the model's init: once is enough

    @property
    def param_shardings(self) -> Any:
        """Where the parameters lie."""
        return jax.tree.map(lambda x: x.sharding, self.abstract_params)

    def put(self, rows: np.ndarray) -> jax.Array:
        """A host array [B, ..] that every process has whole, as a batch on the devices."""
        return jax.make_array_from_callback(rows.shape, self.batch, rows.__getitem__)


def place(config: ModelConfig, mesh: Mesh, backend: Backend) -> PlacedModel:
    """Ties a model to a mesh.

    Args:
      config: the architecture.
      mesh: the devices.
      backend: what it computes with there (`kernels.choose.backend_for`).
    """
    return PlacedModel(SpiralFormer(config, backend._replace(constrain=functools.partial(constrain, mesh))), mesh)


def abstract_params_on(config: ModelConfig, mesh: Mesh | AbstractMesh) -> Any:
    """`PlacedModel.abstract_params` on a mesh whose devices need not be there."""
    boxed = boxed_params(config)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        nn.unbox(boxed),
        shardings_of(boxed, mesh),
    )
