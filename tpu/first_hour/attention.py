"""The attention that models run on TPU against the definition in float64 on the host: values and gradients."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spiral_jax.kernels import splash
from spiral_jax.model import attention as plain
from tpu.first_hour.findings import Findings, relative_error, worst_element


class Case(NamedTuple):
    """Shapes of an attention: length, head width, heads, rows."""

    L: int
    K: int
    H: int
    B: int


# Lengths: one block, many, one that is padded to a multiple of 128, and the papers' with the heads of 160m and 1.4b.
CASES = {
    "tiny": (Case(200, 64, 2, 1),),
    "full": (Case(512, 64, 4, 2), Case(1000, 64, 2, 1), Case(1024, 256, 2, 1), Case(4096, 64, 2, 1),
             Case(4096, 128, 2, 1)),
}  # fmt: skip
OUTPUTS = ("value", "gradient of q", "gradient of k", "gradient of v")
# Of `relative_error`, for values and for gradients. bfloat16 rounds inputs of products to 0.1 %, and the output; on a
# TPU products of float32 do the same unless asked not to. A mask one place off gives 40 %, a scale 3 % off gives 2 %.
ALLOWED = {"bfloat16": (0.01, 0.02), "float32": (0.005, 0.01)}
# What a single element may be off, as a multiple of that (`worst_element`). Gradients of float32 whose terms should
# cancel do so only as far as bfloat16 goes: 5 % in the first rows of q's, by NumPy, at a length of 512.
WORST = {"bfloat16": 5, "float32": 15}


def run(findings: Findings, size: str, workdir: str, argument: str) -> None:
    """Compares splash, and the plain form, with the truth, in bfloat16 and float32."""
    device = jax.devices()[0]
    for dtype in ALLOWED:
        for case in CASES[size]:
            name = f"{dtype} L={case.L} K={case.K}"
            with findings.case(name):
                arrays = inputs(case, dtype)
                truth = exact(*arrays)
                for form, attention in forms(device).items():
                    with on_any_device(device):
                        found = value_and_gradients(attention, *arrays)
                    compare(findings, f"{form} {name}", dtype, found, truth)


def forms(device: jax.Device) -> dict[str, Callable[..., jax.Array]]:
    """What models use on a TPU, and what it replaces."""
    kind = device.device_kind if device.platform == "tpu" else "TPU v5 lite"
    return {"splash": functools.partial(splash.causal_attention, device_kind=kind), "xla": plain.causal_attention}


def on_any_device(device: jax.Device) -> contextlib.AbstractContextManager[Any]:
    """Where there is no TPU, kernels are interpreted (of one row of the batch only: jax 0.10.2)."""
    if device.platform == "tpu":
        return contextlib.nullcontext()
    from jax.experimental.pallas import tpu as pltpu

    return pltpu.force_tpu_interpret_mode()


def compare(findings: Findings, name: str, dtype: str, found: list[jax.Array], truth: list[np.ndarray]) -> None:
    """One check of each output as a whole, and one of its worst element."""
    value, gradient = ALLOWED[dtype]
    for output, a, b in zip(OUTPUTS, found, truth, strict=True):
        allowed = value if output == "value" else gradient
        findings.at_most(f"{name}: {output}, relative error", relative_error(a, b), allowed)
        findings.at_most(f"{name}: {output}, worst element", worst_element(a, b), WORST[dtype] * allowed)


def inputs(case: Case, dtype: str) -> list[np.ndarray]:
    """q, k, v and the gradient of the output, each [B, L, H, K], in the dtype that is computed in."""
    rng = np.random.default_rng(list(case))
    shape = (case.B, case.L, case.H, case.K)
    return [rng.normal(size=shape).astype(jnp.dtype(dtype)) for _ in range(4)]


def value_and_gradients(attention: Callable[..., jax.Array], q, k, v, gradient) -> list[jax.Array]:
    """The output, and the gradients of q, k and v where that of the output is given."""

    @jax.jit
    def both(q, k, v, gradient):
        out, backward = jax.vjp(attention, q, k, v)
        return [out, *backward(gradient)]

    return jax.block_until_ready(both(q, k, v, gradient))


def exact(q_BxLxHxK, k_BxLxHxK, v_BxLxHxK, gradient_BxLxHxK) -> list[np.ndarray]:
    """Outputs and gradients by their formulas, in float64 and without JAX."""
    B, L, H, K = q_BxLxHxK.shape
    outputs = [np.zeros((B, L, H, K)) for _ in OUTPUTS]
    mask_LxL = np.tril(np.ones((L, L), bool))
    for b in range(B):
        for h in range(H):
            arrays = (q_BxLxHxK, k_BxLxHxK, v_BxLxHxK, gradient_BxLxHxK)
            q, k, v, g = (x[b, :, h].astype(np.float64) for x in arrays)
            score_LxL = np.where(mask_LxL, q @ k.T / np.sqrt(K), -np.inf)
            weight_LxL = np.exp(score_LxL - score_LxL.max(axis=1, keepdims=True))
            weight_LxL /= weight_LxL.sum(axis=1, keepdims=True)
            out = weight_LxL @ v
            # Of the softmax: weight x (gradient of the weight - their mean under the weights).
            d_score_LxL = weight_LxL * (g @ v.T - np.sum(g * out, axis=1, keepdims=True)) / np.sqrt(K)
            found = (out, d_score_LxL @ k, d_score_LxL.T @ q, weight_LxL.T @ g)
            for output, x in zip(outputs, found, strict=True):
                output[b, :, h] = x
    return outputs
