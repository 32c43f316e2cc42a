"""What the chip gives of its published peaks: the constants that the predictions assume."""

import math
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from spiral_jax.hardware import Slice
from spiral_jax.kernels import splash
from spiral_jax.roofline.predict import KERNEL_PRODUCTS, kernel_scores
from spiral_jax.roofline.work import Kernel
from tpu.first_hour.attention import forms, on_any_device
from tpu.first_hour.findings import Findings, generation_of

REPEATS = 10


def run(findings: Findings, size: str, workdir: str, argument: str) -> None:
    """Matrix products and attention in bfloat16, and memory."""
    device = jax.devices()[0]
    generation = generation_of(device)
    chips = Slice(generation, generation.shapes[0]) if generation else None
    is_full = size == "full"
    for name, measure in {"mxu_efficiency": products, "hbm_efficiency": memory, "score_operations": kernel}.items():
        with findings.case(name):
            rate, constant = measure(device, chips, is_full)
            findings.measured[name] = {"per_second": rate, "constant": constant}


def products(device: jax.Device, chips: Slice | None, is_full: bool) -> tuple[float, float | None]:
    """FLOP/s of large products, and their share of the peak."""
    n = 8192 if is_full else 256
    a, b = (jax.random.normal(jax.random.key(i), (n, n), jnp.bfloat16) for i in range(2))
    chain = jax.jit(lambda a, b: jax.lax.fori_loop(0, REPEATS, lambda _, x: (x @ b) * (1 / math.sqrt(n)), a))
    rate = 2 * n**3 * REPEATS / _seconds(chain, a, b)
    return rate, rate / chips.peak_flops if chips else None


def memory(device: jax.Device, chips: Slice | None, is_full: bool) -> tuple[float, float | None]:
    """Bytes/s read and written by an elementwise operation, and their share of the peak."""
    x = jnp.ones(2**28 if is_full else 2**20, jnp.float32)
    size = x.nbytes
    chain = jax.jit(lambda x: jax.lax.fori_loop(0, REPEATS, lambda _, x: x * 1.0001, x), donate_argnums=0)
    x, seconds = jax.block_until_ready(chain(x)), math.inf  # donated, as a copy would be one more pass
    for _ in range(3):
        began = time.perf_counter()
        x = jax.block_until_ready(chain(x))
        seconds = min(seconds, time.perf_counter() - began)
    rate = 2 * size * REPEATS / seconds
    return rate, rate / chips.hbm_bandwidth if chips else None


def kernel(device: jax.Device, chips: Slice | None, is_full: bool) -> tuple[float, float | None]:
    """Scores/s of splash forward and backward, and vector operations for each: heads of 64 leave products time."""
    B, L, H, K = (4, 4096, 12, 64) if is_full else (1, 128, 1, 64)
    q, k, v = (jax.random.normal(jax.random.key(i), (B, L, H, K), jnp.bfloat16) for i in range(3))
    attention = forms(device)["splash"]
    gradients = jax.jit(jax.grad(lambda q, k, v: jnp.sum(attention(q, k, v).astype(jnp.float32)), argnums=(0, 1, 2)))
    with on_any_device(device):
        seconds = _seconds(gradients, q, k, v)
    if chips is None:
        return 0.0, None
    width = splash.padded_head_width(K)
    rate = sum(kernel_scores(Kernel(kind, B * H, L, width, "bf16"), chips) for kind in KERNEL_PRODUCTS) / seconds
    return rate, chips.vector_rate / rate


def _seconds(program: Callable[..., jax.Array], *arguments: jax.Array) -> float:
    """Of one call, the best of a few."""
    jax.block_until_ready(program(*arguments))  # compiles
    found = []
    for _ in range(3):
        began = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        found.append(time.perf_counter() - began)
    return min(found)
