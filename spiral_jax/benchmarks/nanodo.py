"""nanodo's transformer (github.com/google-deepmind/nanodo), from a folder of the user's, which ours is timed beside."""

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from spiral_jax.errors import require
from spiral_jax.model.config import ModelConfig


def check_folder(folder: str) -> None:
    """Raises SpiralError unless there is a nanodo in the folder."""
    is_there = os.path.isfile(os.path.join(folder, "nanodo", "model.py"))
    require(is_there, "--nanodo", folder, "the folder of a clone of github.com/google-deepmind/nanodo")


def train_step(folder: str, model: ModelConfig, windows_BxW: np.ndarray) -> Callable[[], object]:
    """What runs a step of it to its end: float32, clipping, AdamW, its own attention, logits of all positions at once.

    Its positions are learned, it has no biases, and its head is its embedding; its products are those of ours.

    Args:
      folder: where its `nanodo/model.py` is; that code runs in this process.
      model: a transformer, whose shape it gets.
      windows_BxW: tokens, W = L + 1.
    """
    tokens_BxW = jnp.asarray(windows_BxW, jnp.int32)
    inputs_BxL, targets_BxL = tokens_BxW[:, :-1], tokens_BxW[:, 1:]
    transformer = _transformer(folder, model, inputs_BxL.shape[1])
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, b1=0.9, b2=0.95, weight_decay=0.1))

    def loss_of(params: Any) -> jax.Array:
        logits_BxLxV = transformer.apply({"params": params}, inputs_BxL)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits_BxLxV, targets_BxL))

    def step(params: Any, moments: Any) -> tuple[Any, Any]:
        updates, moments = optimizer.update(jax.grad(loss_of)(params), moments, params)
        return optax.apply_updates(params, updates), moments

    compiled = jax.jit(step, donate_argnums=(0, 1))
    params = nn.meta.unbox(jax.jit(transformer.init)(jax.random.key(0), inputs_BxL)["params"])
    state = [params, optimizer.init(params)]

    def run() -> object:
        state[:] = compiled(*state)
        return jax.block_until_ready(state)

    return run


def _transformer(folder: str, model: ModelConfig, length: int) -> nn.Module:
    with _importable(folder):
        nanodo = importlib.import_module("nanodo.model")
    shape = dict(D=model.d_model, H=model.num_heads, N=model.prelude_layers, V=model.vocab_size, F=model.d_ff, L=length)
    return nanodo.TransformerDo(nanodo.DoConfig(**shape, fsdp_enabled=False))


@contextlib.contextmanager
def _importable(folder: str) -> Iterator[None]:
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
