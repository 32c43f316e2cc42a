"""What a train step should need by the closed forms: memory, matrix work, communication. Nothing is compiled."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spiral_jax.model.neox import layer_linears, layer_weights
from spiral_jax.parallel.mesh import abstract_mesh
from spiral_jax.training.config import StepConfig
from spiral_jax.training.fsdp import holds_core, is_of_layers
from spiral_jax.training.step import TrainState, abstract_state

# Whether a layer's matrix products, and how often its attention, run forward in a step, by `model.remat`. What is
# computed again are the products in AGAIN: no gradient needs the outputs of the other two.
COMPUTES_AGAIN = {"keep_all": False, "keep_products": False, "keep_attention": True, "keep_inputs": True}
AGAIN = ("qkv", "mlp_up")
FORWARD_ATTENTION = {"keep_all": 1, "keep_products": 1, "keep_attention": 1, "keep_inputs": 2}


@dataclasses.dataclass(frozen=True)
class Flops:
    """Floating-point operations of a step over all devices, two per multiply-add.

    Attributes:
      dense: of weight matrices, forward and backward, as the model needs them (docs/spec.md section 3).
      dense_executed: the same with what `model.remat` computes again.
      attention: of scores and weighted sums, all of them.
      attention_causal: those below the diagonal only.
    """

    dense: float
    dense_executed: float
    attention: float
    attention_causal: float

    @property
    def causal(self) -> float:
        """What MFU counts: of the model's matrices, and of attention below the diagonal."""
        return self.dense + self.attention_causal


def flops(config: StepConfig) -> Flops:
    """A step's FLOPs."""
    model, train = config.model, config.train
    L = train.sequence_length
    layers = model.layer_flops(L)
    dense = 3 * (layers + model.operator_flops(L) + model.head_flops(L))
    linears = layer_linears(model)
    again = sum(linears[name].weights for name in AGAIN) / layer_weights(model) * COMPUTES_AGAIN[model.remat]
    return Flops(
        train.batch_size * dense,
        train.batch_size * (dense + again * layers),
        train.batch_size * 3 * model.attention_flops(L, causal=False),
        train.batch_size * 3 * model.attention_flops(L, causal=True),
    )


class Communication(NamedTuple):
    """Bytes of the arrays that a device gathers and sums with others in a step, each array counted whole.

    Attributes:
      gathered_bytes: of parameters.
      summed_bytes: of gradients.
    """

    gathered_bytes: float
    summed_bytes: float


def state_on(config: StepConfig, num_devices: int) -> TrainState:
    """Shapes and shardings of a run's state. Takes half a second, and is the same for all layouts of one mesh."""
    return abstract_state(config, abstract_mesh(config.mesh, num_devices))


def communication(config: StepConfig, num_devices: int, state: TrainState | None = None) -> Communication:
    """What the axes `data` and `fsdp` exchange for scanned layers; what `tensor` adds is not in it.

    Per micro-batch every executed layer's matrices are gathered forward and backward in the compute dtype, and their
    gradients are summed in float32. The rest, in float32, is gathered and its gradients are summed once per step, and
    with `train.gather_core` `step` so are the core's matrices. Two things come from jax and the compiler: iterations
    of one scan share the forward gathers, as none of them changes them; and the head is gathered in the compute dtype,
    as it is used in no other.
    """
    data, fsdp, tensor = config.check_mesh(num_devices)
    model, train = config.model, config.train
    mesh = abstract_mesh(config.mesh, num_devices)
    state = state_on(config, num_devices) if state is None else state
    matrices = layer_weights(model) / tensor
    held = holds_core(model, train, mesh)
    # Layers run backward, and gathered forward; a level without a single chunk does not run.
    counts = [count for level, count in model.runs if level.num_chunks(train.sequence_length)]
    backward = sum(model.core_layers * count for count in counts)
    forward = sum(model.core_layers * (1 if model.scans(count) else count) for count in counts)
    outer = model.prelude_layers + model.coda_layers
    backward, forward = (outer + (0 if held else layers) for layers in (backward, forward))
    whole = model.core_layers * matrices if held else 0.0
    head = model.vocab_size * model.d_model / tensor
    rest = _rest(state, tensor)
    A, itemsize = train.accumulation, jnp.dtype(model.dtype).itemsize
    gathered = summed = 0.0
    if fsdp > 1:
        streamed = A * (forward + backward) * matrices + whole + head
        gathered = streamed * itemsize + 4 * (rest - head)
        summed = 4 * (A * backward * matrices + rest + whole)
    if data > 1:
        summed += 4 * sum(math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(state.params))
    return Communication(float(gathered), float(summed))


def _rest(state: TrainState, tensor: int) -> int:
    """Elements, per device of `tensor`, of the parameters that are cut over `fsdp` and no matrices of layers."""
    return sum(
        math.prod(x.shape) // (tensor if "tensor" in x.sharding.spec else 1)
        for path, x in jax.tree_util.tree_leaves_with_path(state.params)
        if "fsdp" in x.sharding.spec and not is_of_layers(path)
    )


def layout(config: StepConfig, num_devices: int) -> dict[str, Any]:
    """How a run lies on devices.

    Raises:
      SpiralError: a mesh that does not fit the devices, the batch or the model.
    """
    data, fsdp, tensor = config.check_mesh(num_devices)
    return {
        "devices": num_devices,
        "mesh": {"data": data, "fsdp": fsdp, "tensor": tensor},
        "sequences_per_device": config.train.batch_size // (data * fsdp * config.train.accumulation),
    }


def memory(config: StepConfig, num_devices: int, state: TrainState | None = None) -> dict[str, int]:
    """Bytes per device that follow from the configuration; what the compiler adds is not in it.

    `activations_kept` is a lower bound of what the forward pass keeps for the backward pass, per micro-batch: each
    executed layer's input, and unless `model.remat` is `keep_inputs` attention's output (d), and unless it is
    `keep_attention` the products that gradients need (QKV 3d, the MLP's first 4d), and what the topology says
    (`Topology.kept_vectors`).
    `core` is the whole core: with `train.gather_core` `step` its matrices in the compute dtype and their gradients in
    float32, otherwise the former where the iterations of one scan share them (`communication`). `gathered_rest` is
    embedding, head and vectors whole, with their gradients, in float32.

    Raises:
      SpiralError: a mesh that does not fit the devices, the batch or the model.
    """
    data, fsdp, tensor = config.check_mesh(num_devices)
    mesh = abstract_mesh(config.mesh, num_devices)
    state = state_on(config, num_devices) if state is None else state
    model, train = config.model, config.train
    rows = train.batch_size // (data * fsdp * train.accumulation)
    itemsize = jnp.dtype(model.dtype).itemsize
    width = model.d_model + {"keep_inputs": 0, "keep_attention": 1}.get(model.remat, 8) * model.d_model // tensor
    kept = sum(layers * n for layers, n in model.executed_layers(train.sequence_length)) * width
    kept += model.operators.topology.kept_vectors() * train.sequence_length * model.d_model
    positions = min(train.loss_block, train.sequence_length)
    core = model.core_layers * layer_weights(model) // tensor
    if holds_core(model, train, mesh):
        core *= itemsize + 4
    else:
        is_shared = fsdp > 1 and any(model.scans(count) for _, count in model.runs)
        core *= itemsize * is_shared
    return {
        "parameters": _bytes_per_device(state.params),
        "optimizer": _bytes_per_device(state.opt_state),
        "gradients": _bytes_per_device(state.params),
        "core": core,
        "gathered_rest": 2 * 4 * _rest(state, tensor) if fsdp > 1 else 0,
        "activations_kept": rows * kept * itemsize,
        "logits_block": rows * positions * model.vocab_size // tensor * 4,
    }


def _bytes_per_device(tree) -> int:
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
