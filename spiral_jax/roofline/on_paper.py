"""How long a step should take by closed forms alone: nothing is compiled, and any number of chips takes a second."""

import jax.numpy as jnp

from spiral_jax.hardware import Slice
from spiral_jax.kernels.splash import block_size, padded_head_width
from spiral_jax.roofline.predict import FITTED, KERNEL_PRODUCTS, Prediction, beside, padded
from spiral_jax.training import costs
from spiral_jax.training.config import StepConfig
from spiral_jax.training.step import TrainState

# Memory traffic of the twelve compiled points of tpu/predictions, within 10 % (`tests/roofline/test_on_paper.py`):
# vectors of d numbers in the compute dtype per token and executed layer, by `model.remat` (the two between the ends are
# assumed to lie between them), and per token and iteration; rows of logits per token; passes over what is gathered and
# summed.
LAYER_VECTORS = {"keep_all": 222.0, "keep_products": 204.0, "keep_attention": 187.0, "keep_inputs": 169.0}
ITERATION_VECTORS, LOGIT_ROWS, PASSES = 31.0, 3.0, 0.32
# Of the time that memory takes by itself, how much is not beside products: 0.41 to 0.57 in the compiled points.
MEMORY_ALONE = 0.5
# How often what is gathered and summed crosses the links: 1.4 to 2.0 in the compiled points, as sums of whole arrays do
# it twice.
ROUNDS = 1.5
# What the compiled points hold beyond `costs.memory`: where everything is kept, so many vectors of d numbers per token
# and executed layer in all (31.5 to 31.9); otherwise vectors per token, of the layer in the backward pass (5 to 20).
KEEP_ALL_VECTORS, WORKING_VECTORS = 31.7, 20.0


def estimate(config: StepConfig, chips: Slice, num_slices: int = 1, state: TrainState | None = None) -> Prediction:
    """Seconds of a step by the closed forms of `training.costs` and the constants of `predict`.

    Args:
      config: the step; its mesh lies on all devices, `data` over the slices.
      chips: one slice.
      num_slices: how many.
      state: `costs.state_on` of the mesh, if it is known.
    """
    num_devices = chips.devices * num_slices
    _, fsdp, tensor = config.check_mesh(num_devices)
    model, train = config.model, config.train
    L, d, form = train.sequence_length, model.d_model, costs.flops(config)
    peak = num_devices * chips.peak_flops
    state = costs.state_on(config, num_devices) if state is None else state
    moved = sum(costs.communication(config, num_devices, state))
    tokens = train.tokens_per_step / num_devices
    layer_tokens = train.batch_size * sum(layers * n for layers, n in model.executed_layers(L)) / num_devices
    vectors = layer_tokens * LAYER_VECTORS[model.remat] + tokens * ITERATION_VECTORS * (model.num_iterations + 1)
    traffic = 2 * (vectors * d + tokens * LOGIT_ROWS * model.vocab_size) + PASSES * moved
    # All-reduces of activations, two a layer forward and two backward.
    if tensor > 1:
        moved += 4 * layer_tokens * tensor * 2 * d
    between = 0.0
    if num_slices > 1:  # gradients, once per step
        between = 2 * 4 * model.total_parameters / (fsdp * tensor) * (num_slices - 1) / num_slices
    links = sum(chips.ring_bandwidths()) / chips.generation.devices or chips.hbm_bandwidth
    alone = {
        "compute": product_seconds(config, chips, num_devices),
        "attention": form.attention_causal * _attention_factor(config, chips) / peak / FITTED.attention_efficiency,
        "hbm": traffic / chips.hbm_bandwidth / FITTED.hbm_efficiency,
        "ici": ROUNDS * moved / links / FITTED.ici_efficiency,
        "dcn": between / chips.dcn_bandwidth,
    }
    limits = {"compute": alone["compute"], "attention": alone["attention"], "hbm": alone["hbm"] * MEMORY_ALONE}
    return beside(alone, limits | {"ici": 0.0, "dcn": 0.0}, FITTED)


def peak_bytes(config: StepConfig, num_devices: int, state: TrainState | None = None) -> float:
    """What a device should hold at the peak: `costs.memory` with what the compiler added to it in the compiled points.

    Args:
      config: the step.
      num_devices: of all slices.
      state: `costs.state_on` of the mesh, if it is known.
    """
    held = costs.memory(config, num_devices, state)
    data, fsdp, tensor = config.check_mesh(num_devices)
    model, train = config.model, config.train
    L, rows = train.sequence_length, train.batch_size // (data * fsdp * train.accumulation)
    vectors = WORKING_VECTORS * L
    if model.remat == "keep_all":
        layer_tokens = sum(layers * n for layers, n in model.executed_layers(L))
        vectors = KEEP_ALL_VECTORS * layer_tokens / tensor + model.operators.topology.kept_vectors() * L
        held["activations_kept"] = 0
    return sum(held.values()) + rows * vectors * model.d_model * jnp.dtype(model.dtype).itemsize


def product_seconds(config: StepConfig, chips: Slice, num_devices: int) -> float:
    """Time of a step's matrix products alone."""
    return costs.flops(config).dense_executed / (num_devices * chips.peak_flops * FITTED.mxu_efficiency)


def _attention_factor(config: StepConfig, chips: Slice) -> float:
    """What splash kernels compute over the causal products of the closed form: padding, whole blocks, scores again."""
    model, L = config.model, config.train.sequence_length
    width = padded_head_width(model.head_width)
    blocks = L / block_size(L, width, jnp.dtype(model.dtype), chips.generation.device_kind)
    forward = KERNEL_PRODUCTS["fwd"] * costs.FORWARD_ATTENTION[model.remat]
    products = forward + KERNEL_PRODUCTS["dq"] + KERNEL_PRODUCTS["dkv"]
    return padded(width, chips.generation.mxu) / model.head_width * (blocks + 1) / blocks * products / 6
