"""The first hour's check of attention: right kernels pass, wrong ones of every kind fail."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow

from spiral_jax.model.attention import causal_attention
from tpu.first_hour import attention
from tpu.first_hour.findings import Findings

CASE = attention.Case(256, 64, 2, 1)


def findings(kernel, dtype, case=CASE):
    """What the section finds of a kernel."""
    found, arrays = Findings(lambda line: None), attention.inputs(case, dtype)
    attention.compare(found, "kernel", dtype, attention.value_and_gradients(kernel, *arrays), attention.exact(*arrays))
    assert len(found.checks) == 8
    return found.checks


def failed(checks):
    return [check["what"] for check in checks if not check["ok"]]


def test_the_truth_is_that_of_automatic_differentiation(x64):
    arrays = attention.inputs(CASE, "float32")
    with x64(True):
        q, k, v, gradient = (jnp.asarray(x, jnp.float64) for x in arrays)
        out, backward = jax.vjp(causal_attention, q, k, v)
        expected = [np.asarray(x) for x in (out, *backward(gradient))]
    for found, truth in zip(attention.exact(*arrays), expected, strict=True):
        np.testing.assert_allclose(found, truth, atol=1e-12)


@pytest.mark.parametrize("dtype", attention.ALLOWED)
def test_the_plain_form_passes(dtype):
    assert not failed(findings(causal_attention, dtype))


@pytest.mark.parametrize("case", [attention.Case(512, 64, 2, 1), attention.Case(1000, 64, 1, 1)], ids=str)
def test_float32_in_one_pass_of_bfloat16_passes(case):
    """What a TPU makes of products of float32 by default: operands of all of them are rounded, backward ones, too.

    By the kernel's formulas, where the sum over a row's gradient is taken of the rounded output.
    """

    def rounded(x):
        return x.astype(jnp.bfloat16).astype(np.float64)

    def product(a, b):
        return rounded(np.asarray(a)) @ rounded(np.asarray(b))

    arrays = attention.inputs(case, "float32")
    truth = attention.exact(*arrays)
    found = [np.zeros_like(x) for x in truth]
    for b, h in np.ndindex(case.B, case.H):
        q, k, v, g = (x[b, :, h].astype(np.float64) for x in arrays)
        score = np.where(np.tril(np.ones((case.L, case.L), bool)), product(q / np.sqrt(case.K), k.T), -np.inf)
        weight = np.exp(score - score.max(axis=1, keepdims=True))
        sums = weight.sum(axis=1, keepdims=True)
        out = product(weight, v) / sums
        weight /= sums
        ds = weight * (product(g, v.T) - np.sum(g * out, axis=1, keepdims=True)) / np.sqrt(case.K)
        for x, value in zip(found, (out, product(ds, k), product(ds.T, q), product(weight.T, g)), strict=True):
            x[b, :, h] = value
    checks = Findings(print)
    attention.compare(checks, "", "float32", found, truth)
    assert not failed(checks.checks)


def masked(mask):
    """Attention with another mask."""

    def kernel(q, k, v):
        score = jnp.einsum("bqhk,bphk->bhqp", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
        weight = jax.nn.softmax(jnp.where(mask, score, -jnp.inf), axis=-1).astype(q.dtype)
        return jnp.einsum("bhqp,bphk->bqhk", weight, v)

    return kernel


ROW, COLUMN = np.ogrid[: CASE.L, : CASE.L]


def rescaled(factor):
    return lambda q, k, v: causal_attention((q.astype(jnp.float32) * factor).astype(q.dtype), k, v)


def with_one_row_changed(q, k, v):
    return causal_attention(q, k, v).at[:, -1, 0].multiply(1.5)


def with_one_element_changed(q, k, v):
    return causal_attention(q, k, v).at[0, 200, 1, 7].add(0.5)


@jax.custom_vjp
def half_a_gradient(q, k, v):
    return causal_attention(q, k, v)


def _forward(q, k, v):
    out, backward = jax.vjp(causal_attention, q, k, v)
    return out, backward


def _backward(backward, gradient):
    dq, dk, dv = backward(gradient)
    return dq, dk.at[:, 128:].set(0), dv  # of the second block of keys


half_a_gradient.defvjp(_forward, _backward)

WRONG = {
    "sees one token ahead": masked(ROW + 1 >= COLUMN),
    "does not see its own token": masked((COLUMN < ROW) | (ROW == 0) & (COLUMN == 0)),
    "sees everything": masked(COLUMN >= 0),
    "lacks a block of keys": masked((COLUMN <= ROW) & ~((COLUMN < 128) & (ROW >= 128))),
    "scale 5 % off": rescaled(1.05),
    "no scale": rescaled(8.0),
    "one row": with_one_row_changed,
    "one element": with_one_element_changed,
    "half the gradient of k": half_a_gradient,
    "heads exchanged": lambda q, k, v: causal_attention(q, k[:, :, ::-1], v),
    "not a number": lambda q, k, v: causal_attention(q, k, v) / jnp.float32(0).astype(q.dtype),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("dtype", ["float32", slow("bfloat16")])
def test_a_wrong_kernel_fails(wrong, dtype):
    assert failed(findings(WRONG[wrong], dtype))


@pytest.mark.slow
def test_the_section_passes_in_tpu_interpret_mode():
    """Splash, in both dtypes."""
    found = Findings(lambda line: None)
    attention.run(found, "tiny", "", "")
    assert not failed(found.checks)
    assert len(found.checks) == 8 * 2 * len(attention.ALLOWED) * len(attention.CASES["tiny"])
