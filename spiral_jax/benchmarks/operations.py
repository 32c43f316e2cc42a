"""What a transformer's train step is made of, operation by operation: ours, PyTorch's, and what its products need."""

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from spiral_jax.benchmarks.families import models
from spiral_jax.benchmarks.peer import gpt_neox, update_of
from spiral_jax.benchmarks.training import SIZES, Size, seconds_of, sgemm, step_config
from spiral_jax.kernels.choose import backend_for
from spiral_jax.model.spiralformer import abstract_params
from spiral_jax.parallel.mesh import MeshConfig, make_mesh
from spiral_jax.progress import Report
from spiral_jax.training.loss import mean_nats
from spiral_jax.training.optimizers import make_optimizer

# Of one operation, before the next has its turn.
SECONDS = 0.1


class Operation(NamedTuple):
    """Something that a step does, forward and backward.

    Attributes:
      ours: does it once, to its end.
      torch: the same in PyTorch.
      times: that a step does it.
      flops: of its products, once.
    """

    ours: Callable[[], Any]
    torch: Callable[[], Any]
    times: int
    flops: float


def measure(sizes: tuple[str, ...], repeats: int, report: Report) -> dict[str, Any]:
    """Times each operation in turn with PyTorch's.

    Returns:
      For each `SIZE OPERATION`: milliseconds that a step of the transformer spends on it, ours and PyTorch's (medians),
      and those that its products would take at the speed of the machine's best square product.
    """
    square = sgemm()
    best = square.flops / min(seconds_of(square.run, SECONDS) for _ in range(repeats))
    out: dict[str, Any] = {"sgemm_gflops": best / 1e9}
    for name in sizes:
        for operation, found in _operations(SIZES[name]).items():
            report(f"{name} {operation}")
            seconds: dict[str, list[float]] = {"ours": [], "torch": []}
            for _ in range(repeats):
                seconds["ours"].append(seconds_of(found.ours, SECONDS))
                seconds["torch"].append(seconds_of(found.torch, SECONDS))
            out[f"{name} {operation}"] = {
                f"{who}_ms": found.times * statistics.median(times) * 1e3 for who, times in seconds.items()
            } | {"limit_ms": found.times * found.flops / best * 1e3}
    return out


def _operations(size: Size) -> dict[str, Operation]:
    import torch
    from torch.nn import functional as F

    d, heads, layers, V, B, L = size
    model = models(width=d, heads=heads, layers=layers, vocab_size=V)["vanilla"]
    backend = backend_for(make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]), model)
    rows, K = B * L, d // heads
    generator = np.random.default_rng(0)

    def numbers(*shape: int) -> np.ndarray:
        return generator.normal(size=shape).astype(np.float32) * 0.1

    def pair(ours, theirs, *arrays: np.ndarray) -> tuple[Callable, Callable]:
        """A function and its gradients by all arrays, in both."""
        tensors = [torch.tensor(x, requires_grad=True) for x in arrays]
        shape = jax.eval_shape(ours, *arrays).shape
        gradient = numbers(*shape) if shape else np.float32(1)

        @jax.jit
        def program(gradient, *arrays):
            out, backward = jax.vjp(ours, *arrays)
            return out, backward(gradient)  # without `out`, products forward would not be there

        on_device, gradient_of_torch = [jnp.asarray(x) for x in (gradient, *arrays)], torch.tensor(gradient)
        return (
            lambda: jax.block_until_ready(program(*on_device)),
            lambda: torch.autograd.grad(theirs(*tensors), tensors, gradient_of_torch),
        )

    def product(x_BxLxD, kernel_DxF, bias_F):
        return backend.dot_general(x_BxLxD, kernel_DxF, (((2,), (0,)), ((), ()))) + bias_F

    def torch_product(x_BxLxD, kernel_FxD, bias_F):
        return F.linear(x_BxLxD, kernel_FxD.T, bias_F)

    def torch_attention(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    targets_BxL = generator.integers(0, V, (B, L))
    torch_targets = torch.tensor(targets_BxL).flatten()
    block = min(step_config(model, size).train.loss_block, L)

    found = {}
    for name, inputs, outputs in (("qkv", d, 3 * d), ("out", d, d), ("mlp_up", d, 4 * d), ("mlp_down", 4 * d, d)):
        arrays = numbers(B, L, inputs), numbers(inputs, outputs), numbers(outputs)
        found[name] = Operation(*pair(product, torch_product, *arrays), layers, 6.0 * rows * inputs * outputs)
    qkv = [numbers(B, L, heads, K) for _ in range(3)]
    # Two products forward, of which the backward pass needs four more; half of each is above the diagonal.
    found["attention"] = Operation(*pair(backend.attention, torch_attention, *qkv), layers, 6.0 * B * L * (L + 1) * d)
    found["gelu"] = Operation(*pair(backend.gelu, F.gelu, numbers(B, L, 4 * d)), layers, 0.0)
    norm = pair(
        lambda x, scale, bias: backend.layer_norm(x, scale, bias, 1e-5),
        lambda x, scale, bias: F.layer_norm(x, (d,), scale, bias, 1e-5),
        numbers(B, L, d), numbers(d), numbers(d),
    )  # fmt: skip
    found["layer_norm"] = Operation(*norm, 2 * layers + 1, 0.0)
    head = pair(
        lambda h, kernel: mean_nats(h, kernel, targets_BxL, block, backend.constrain),
        lambda h, kernel: F.cross_entropy((h @ kernel).flatten(0, 1), torch_targets),
        numbers(B, L, d), numbers(d, V),
    )  # fmt: skip
    found["head_and_loss"] = Operation(*head, 1, 6.0 * rows * d * V)
    tokens_BxL = generator.integers(0, V, (B, L))
    torch_tokens = torch.tensor(tokens_BxL)
    table = pair(
        lambda table: jnp.take(table, tokens_BxL, axis=0), lambda table: F.embedding(torch_tokens, table), numbers(V, d)
    )
    found["embedding"] = Operation(*table, 1, 0.0)
    found["clip_and_adamw"] = Operation(_our_optimizer(model, size), _torch_optimizer(model, size), 1, 0.0)
    return found


def _our_optimizer(model, size: Size) -> Callable[[], Any]:
    config = step_config(model, size)
    optimizer = make_optimizer(config.optimizer, config.train.steps, model, jnp.float32(1e-3))

    def update(params, state, grads):
        updates, state = optimizer.update(grads, state, params, gradient_norm=optax.tree.norm(grads))
        return optax.apply_updates(params, updates), state

    program = jax.jit(update, donate_argnums=(0, 1))
    params, grads = (jax.tree.map(lambda x: jnp.full(x.shape, 1e-2, x.dtype), abstract_params(model)) for _ in range(2))
    kept = [params, optimizer.init(params)]

    def run() -> None:
        kept[:] = jax.block_until_ready(program(*kept, grads))

    return run


def _torch_optimizer(model, size: Size) -> Callable[[], Any]:
    import torch

    peer = gpt_neox(model, size.sequence_length)
    for p in peer.parameters():
        p.grad = torch.full_like(p, 1e-2)
    return update_of(peer)
