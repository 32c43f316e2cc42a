"""Attention in blocks of queries against the plain form: output and gradients, and what memory they take."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow

from spiral_jax.kernels import blocks
from spiral_jax.kernels.choose import backend_for
from spiral_jax.model import attention as plain
from spiral_jax.model.backend import Backend
from spiral_jax.model.config import ModelConfig
from spiral_jax.model.spiralformer import SpiralFormer
from spiral_jax.parallel.mesh import MeshConfig, make_mesh
from spiral_jax.training.loss import mean_window_nats


def inputs(B, L, H, K, dtype=np.float32):
    """q, k, v and the gradient of the output, each [B, L, H, K]."""
    rng = np.random.default_rng([B, L, H, K])
    return [jnp.asarray(rng.normal(size=(B, L, H, K)), dtype) for _ in range(4)]


def output_and_gradients(attention, q, k, v, gradient):
    out, backward = jax.vjp(attention, q, k, v)
    return out, *backward(gradient)


def errors(B, L, H, K, dtype):
    """Largest differences of the output and of the gradients of q, k, v."""
    results = [
        jax.jit(functools.partial(output_and_gradients, attention))(*inputs(B, L, H, K, dtype))
        for attention in (blocks.causal_attention, plain.causal_attention)
    ]
    for found, expected in zip(*results, strict=True):
        assert found.dtype == expected.dtype and found.shape == expected.shape
        assert float(jnp.abs(expected).max()) > 0.1 or L == 1, "the comparison would show nothing"
    return [float(jnp.abs(a - b).max()) for a, b in zip(*results, strict=True)]


# From 1025 on, a span has several blocks.
CASES = [(1, 1, 2, 64), (2, 7, 2, 64), (1, 100, 2, 64), (2, 256, 3, 64), (1, 1000, 1, 8), (1, 129, 2, 256)]
CASES += [(1, 1300, 2, 16)]


@pytest.mark.parametrize("shape", CASES)
def test_output_and_gradients(shape):
    assert max(errors(*shape, np.float32)) < 1e-5


@pytest.mark.parametrize("shape", [(1, 7, 2, 64), (2, 256, 3, 64), (1, 1300, 2, 16)])
def test_output_and_gradients_float64(shape, x64):
    with x64(True):
        assert max(errors(*shape, np.float64)) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("K", [8, 32, 64, 80, 128, 256])
@pytest.mark.parametrize("L", [1, 7, 100, 256, 1000, 2500])
def test_output_and_gradients_of_all_sizes(L, K, x64):
    assert max(errors(2, L, 2, K, np.float32)) < 1e-5
    with x64(True):
        assert max(errors(2, L, 2, K, np.float64)) < 1e-12


def test_bfloat16_is_as_near_the_truth_as_the_plain_form():
    q, k, v, _ = inputs(1, 300, 2, 64, jnp.bfloat16)
    truth = plain.causal_attention(*(x.astype(jnp.float32) for x in (q, k, v)))

    def error(attention):
        out = jax.jit(attention)(q, k, v)
        assert out.dtype == jnp.bfloat16
        return float(jnp.abs(out.astype(jnp.float32) - truth).max())

    assert error(blocks.causal_attention) <= error(plain.causal_attention) * 1.01


def test_no_future_reaches_the_past():
    """Bitwise: the weight of a later key is zero, whatever the key and its value are."""
    attention = jax.jit(blocks.causal_attention)
    q, k, v, other = inputs(1, 300, 2, 16)
    for cut in (1, 127, 128, 200, 299):
        changed = (x.at[:, cut:].set(other[:, cut:] * 5) for x in (q, k, v))
        np.testing.assert_array_equal(attention(q, k, v)[:, :cut], attention(*changed)[:, :cut])


@pytest.mark.parametrize("remat", ["keep_products", slow("keep_inputs")])
def test_a_model_trains_with_it_as_with_the_plain_forms(remat, random_model):
    """The backend of CPUs, unrolled as it is there, against the default one: loss and gradients."""
    fields = dict(vocab_size=29, d_model=32, num_heads=2, prelude_layers=0, core_layers=1, coda_layers=0, chunks=(2, 1))
    config = ModelConfig(**fields, dtype="float32", remat=remat)
    params = random_model(config, scale=0.5)[2]
    windows_BxW = jnp.asarray(np.random.default_rng(0).integers(29, size=(2, 290)))
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])

    def value_and_grad(config, backend):
        model = SpiralFormer(config, backend)
        loss = jax.value_and_grad(lambda params: mean_window_nats(model, params, windows_BxW, 128)[0])
        return jax.jit(loss)(params)

    value, grads = value_and_grad(dataclasses.replace(config, unroll=True), backend_for(mesh, config))
    expected, expected_grads = value_and_grad(config, Backend())
    assert abs(value - expected) < 1e-5
    for (path, a), b in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(expected_grads), strict=True):
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b), jax.tree_util.keystr(path)


def test_memory_is_linear_in_the_length():
    def temporary(attention, L):
        x = jax.ShapeDtypeStruct((1, L, 2, 16), jnp.float32)
        program = jax.jit(functools.partial(output_and_gradients, attention))
        return program.lower(x, x, x, x).compile().memory_analysis().temp_size_in_bytes

    of_blocks, of_plain = ([temporary(f.causal_attention, L) for L in (2048, 4096)] for f in (blocks, plain))
    assert of_blocks[1] < 2.1 * of_blocks[0] and of_blocks[1] < of_plain[1] / 10
    assert of_plain[1] > 3.8 * of_plain[0]
