"""AdamW with clipping, and the learning rate schedules (SPEC section 5)."""

import jax
import jax.numpy as jnp
import optax

from spiral_jax.training.config import OptimizerConfig

# Parameters are told apart by the last name of their path; stacked layers make the number of axes no guide.
DECAYED = {"kernel": True, "embedding": True, "bias": False, "scale": False}


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Step k to learning rate: peak (k + 1) / W for k < W, then the schedule; k runs from 0 to steps - 1."""
    W, peak, final = config.resolved_warmup(steps), config.peak_learning_rate, config.final_fraction
    stable = config.stable_until(steps)

    def schedule(step):
        k = jnp.asarray(step, jnp.float32)
        warm = (k + 1) / max(W, 1)
        if config.schedule == "cosine":
            progress = jnp.clip((k + 1 - W) / max(steps - W, 1), 0, 1)
            factor = final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        elif config.schedule == "wsd":
            progress = jnp.clip((k + 1 - stable) / max(steps - stable, 1), 0, 1)
            factor = 1 - (1 - final) * progress
        else:
            factor = jnp.float32(1)
        return peak * jnp.where(k < W, warm, factor)

    return schedule


def decay_mask(params) -> dict:
    """True for matrices and embeddings, False for biases and LayerNorms."""

    def decayed(path, _):
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        return DECAYED[names[-1]]

    return jax.tree_util.tree_map_with_path(decayed, params)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clip, then AdamW; its count is the step."""
    clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    return optax.chain(
        *clip,
        optax.adamw(
            learning_rate(config, steps),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=decay_mask,
        ),
    )
