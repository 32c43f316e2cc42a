"""AdamW (docs/spec.md section 5)."""

from typing import TYPE_CHECKING

import jax
import optax

from spiral_jax.model.config import ModelConfig
from spiral_jax.training.optimizers.optimizer import optimizers

if TYPE_CHECKING:
    from spiral_jax.training.config import OptimizerConfig

# Parameters are told apart by the last name of their path; stacked layers make the number of axes no guide.
DECAYED = {"kernel": True, "embedding": True, "bias": False, "scale": False}


def decay_mask(params) -> dict:
    """True for matrices and embeddings, False for biases and LayerNorms."""

    def decayed(path, _):
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        return DECAYED[names[-1]]

    return jax.tree_util.tree_map_with_path(decayed, params)


@optimizers.register("adamw")
def adamw(
    config: "OptimizerConfig", learning_rate: optax.Schedule, model: ModelConfig | None = None
) -> optax.GradientTransformation:
    """AdamW with decoupled decay of matrices and embeddings."""
    del model
    return optax.adamw(
        learning_rate,
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
