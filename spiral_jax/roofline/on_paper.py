"""How long a step should take by closed forms alone: nothing is compiled, and any number of chips takes a second."""

import math

import jax.numpy as jnp

from spiral_jax.hardware import Slice
from spiral_jax.kernels.splash import LANES, block_size, padded_head_width
from spiral_jax.roofline.matmul import FLOAT32_PASSES
from spiral_jax.roofline.predict import KERNEL_PRODUCTS, Prediction, beside, constants_of, padded, scores_in_blocks
from spiral_jax.training import costs
from spiral_jax.training.config import StepConfig
from spiral_jax.training.step import TrainState

# Memory traffic, fitted to the compiled points of tpu/predictions, within 6 % (`tests/roofline/test_on_paper.py`):
# vectors of d numbers in the compute dtype per token and executed layer, by `model.remat` (one point alone has
# `keep_attention`), and per token and iteration; rows of logits per token; passes over what is gathered and summed.
LAYER_VECTORS = {"keep_all": 226.0, "keep_products": 165.0, "keep_attention": 158.0, "keep_inputs": 155.0}
ITERATION_VECTORS, LOGIT_ROWS, PASSES = 72.0, 3.8, 0.96
# Of the time that memory takes by itself, how much is not beside products: 0.46 to 0.57 in the compiled points, but
# 0.77 in 160m's on v6e, whose products of narrow layers wait for memory, too.
MEMORY_ALONE = 0.5
# How often what is gathered and summed crosses the links: 1.4 to 2.0 in the compiled points, as sums of whole arrays do
# it twice.
ROUNDS = 1.5
# What the compiled points hold beyond `costs.memory`: where everything is kept, so many vectors of d numbers per token
# and executed layer in all (31.5 to 31.9); otherwise vectors per token, of the layer in the backward pass (5 to 20).
KEEP_ALL_VECTORS, WORKING_VECTORS = 31.7, 20.0
# Vectors among them whose last axis is a head's: queries, keys, values, what attention makes of them. A head narrower
# than 128 takes as much room.
HEAD_VECTORS = {"keep_all": 4, "keep_products": 4, "keep_attention": 1, "keep_inputs": 0}


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
    L, d, constants = train.sequence_length, model.d_model, constants_of(chips)
    state = costs.state_on(config, num_devices) if state is None else state
    moved = sum(costs.communication(config, num_devices, state))
    # Along `tensor` devices have the same tokens. By the two layouts that were compiled, a device moves no fewer bytes
    # of vectors for being one of two: what is cut is made up for by what both have whole.
    tokens = train.tokens_per_step * tensor / num_devices
    layer_tokens = train.batch_size * sum(layers * n for layers, n in model.executed_layers(L)) * tensor / num_devices
    vectors = layer_tokens * LAYER_VECTORS[model.remat] + tokens * ITERATION_VECTORS * (model.num_iterations + 1)
    traffic = 2 * (vectors * d + tokens * LOGIT_ROWS * model.vocab_size / tensor) + PASSES * moved
    # All-reduces of activations, two a layer forward and two backward.
    if tensor > 1:
        moved += 4 * layer_tokens * 2 * d
    between = 0.0
    if num_slices > 1:  # gradients, once per step
        between = 2 * 4 * model.total_parameters / (fsdp * tensor) * (num_slices - 1) / num_slices
    links = sum(chips.ring_bandwidths()) / chips.generation.devices or chips.hbm_bandwidth
    alone = {
        "compute": product_seconds(config, chips, num_devices),
        "attention": _attention_seconds(config, chips, num_devices),
        "hbm": traffic / chips.hbm_bandwidth / constants.hbm_efficiency,
        "ici": ROUNDS * moved / links / constants.ici_efficiency,
        "dcn": between / chips.dcn_bandwidth,
    }
    limits = {"compute": alone["compute"], "attention": alone["attention"], "hbm": alone["hbm"] * MEMORY_ALONE}
    return beside(alone, limits | {"ici": 0.0, "dcn": 0.0}, constants)


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
    layer_tokens = sum(layers * n for layers, n in model.executed_layers(L))
    vectors = WORKING_VECTORS * L
    if model.remat == "keep_all":
        vectors = KEEP_ALL_VECTORS * layer_tokens / tensor + model.operators.topology.kept_vectors() * L
        held["activations_kept"] = 0
    vectors += (
        HEAD_VECTORS[model.remat] * (padded(model.head_width, LANES) / model.head_width - 1) * layer_tokens / tensor
    )
    return sum(held.values()) + rows * vectors * model.d_model * jnp.dtype(model.dtype).itemsize


def product_seconds(config: StepConfig, chips: Slice, num_devices: int) -> float:
    """Time of a step's matrix products alone."""
    flops = costs.flops(config).dense_executed + _small_products(config, chips.generation.mxu)
    return flops / (num_devices * chips.peak_flops * constants_of(chips).mxu_efficiency)


def _small_products(config: StepConfig, tile: int) -> float:
    """Floating-point operations, forward and backward, of Linears that give a few numbers per vector, in float32.

    The model's FLOPs leave them out. Padded to the matrix unit they are 7 % of the products of 160m's Spiral-B.
    """
    model, L = config.model, config.train.sequence_length
    flops = 0.0
    for found in model.operators.declared():
        if not found.linear.is_matrix:
            sizes = math.prod(found.linear.inputs), math.prod(found.linear.outputs)
            weights = math.prod(padded(size, tile) for size in sizes)
            flops += 3 * 2 * model.operator_vectors(found, L) * weights * FLOAT32_PASSES
    return config.train.batch_size * flops


def _attention_seconds(config: StepConfig, chips: Slice, num_devices: int) -> float:
    """Time of splash kernels: whole blocks of scores, heads padded, forward as often as `model.remat` asks."""
    model, L, constants = config.model, config.train.sequence_length, constants_of(chips)
    width = padded_head_width(model.head_width)

    def scores_of(n: int) -> float:
        n = padded(n, LANES)
        block = block_size(n, width, jnp.dtype(model.dtype), chips.generation.device_kind)
        return model.num_heads * scores_in_blocks(n, block)

    of_row = sum(layers * scores_of(n) for layers, n in model.executed_layers(L) if n)
    scores = of_row * config.train.batch_size / num_devices
    vector = scores / chips.vector_rate * constants.score_operations

    def seconds(kind: str) -> float:
        flops = 2 * scores * padded(width, chips.generation.mxu) * KERNEL_PRODUCTS[kind]
        return max(flops / (chips.peak_flops * constants.mxu_efficiency), vector)

    return costs.FORWARD_ATTENTION[model.remat] * seconds("fwd") + seconds("dq") + seconds("dkv")
