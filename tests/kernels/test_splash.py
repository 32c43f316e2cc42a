"""Splash attention, interpreted on the CPU, against plain XLA: output and gradients, also on a mesh and in a model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow
from jax.sharding import NamedSharding, PartitionSpec

from spiral_jax.kernels import splash
from spiral_jax.kernels.choose import per_device
from spiral_jax.model import attention as plain
from spiral_jax.model.backend import Backend
from spiral_jax.model.config import ModelConfig
from spiral_jax.model.spiralformer import SpiralFormer
from spiral_jax.parallel.mesh import MeshConfig, batch_sharding, make_mesh

INTERPRETED = functools.partial(splash.causal_attention, device_kind="TPU v5 lite", interpret=True)


def inputs(B, L, H, K, dtype=np.float32):
    """q, k, v and the gradient of the output, each [B, L, H, K]."""
    rng = np.random.default_rng([B, L, H, K])
    return [rng.normal(size=(B, L, H, K)).astype(dtype) for _ in range(4)]


def compare(attention, reference, q, k, v, gradient):
    """Largest errors of the output and of the gradients of q, k, v."""

    @functools.partial(jax.jit, static_argnums=0)
    def both(f, *qkv):
        out, backward = jax.vjp(f, *qkv)
        return out, *backward(gradient)

    found, expected = both(attention, q, k, v), both(reference, q, k, v)
    assert [x.dtype for x in found] == [x.dtype for x in expected]
    for x in expected:
        assert float(jnp.abs(x).max()) > 0.1 or q.shape[1] == 1, "the comparison would show nothing"
    return [float(jnp.abs(a - b).max()) for a, b in zip(found, expected, strict=True)]


@pytest.mark.parametrize(
    "L, K",
    [(1, 64), (100, 64), (200, 128), (256, 256)]
    + [pytest.param(200, 96, id="padded_width")]
    + [slow(L, K) for L in (1, 100, 128, 200, 256, 512) for K in (32, 64, 128, 256)]
    + [slow(1024, 64)],
)
def test_output_and_gradients(L, K):
    errors = compare(INTERPRETED, plain.causal_attention, *inputs(1, L, 2, K))
    assert max(errors) < 1e-5


@pytest.mark.parametrize("K", [64, slow(128)])
def test_bfloat16_is_as_near_the_truth_as_xla(K):
    q, k, v, _ = (jnp.asarray(x, jnp.bfloat16) for x in inputs(1, 256, 2, K))
    truth = plain.causal_attention(*(x.astype(jnp.float32) for x in (q, k, v)))

    def error(attention):
        out = jax.jit(attention)(q, k, v)
        assert out.dtype == jnp.bfloat16
        return float(jnp.sqrt(jnp.mean((out - truth) ** 2)))

    assert error(INTERPRETED) < 1.5 * error(plain.causal_attention)


@pytest.mark.parametrize("mesh", [(2, 2, 2), slow((1, 1, 8))], ids=str)
def test_on_a_mesh(mesh):
    """Each device computes its rows and heads, which are those of the whole, and asks no other for anything."""
    mesh = make_mesh(MeshConfig(*mesh))
    attention = per_device(mesh, INTERPRETED)
    sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor"))
    q, k, v, gradient = (jax.device_put(x, sharding) for x in inputs(4, 128, 8, 64))
    assert max(compare(attention, plain.causal_attention, q, k, v, gradient)) < 1e-5

    text = jax.jit(attention).lower(q, k, v).compile().as_text()
    assert not any(kind in text for kind in ("all-gather", "all-reduce", "all-to-all"))


# Of 256 tokens, levels of 32 chunks (XLA), 128 and 256; of 400, two are padded.
MODEL = ModelConfig(vocab_size=64, d_model=128, num_heads=2, prelude_layers=0, core_layers=1, coda_layers=0,
                    chunks=(8, 2, 1), topology="anchor", dtype="float32")  # fmt: skip


@pytest.mark.parametrize(
    "L, remat",
    [
        slow(256, "keep_products"),
        slow(256, "keep_all"),
        slow(256, "keep_inputs"),
        slow(400, "keep_all"),
    ],
)
def test_a_model_has_the_same_loss_and_gradients(L, remat, random_model):
    """On a mesh, under `jax.checkpoint` and the scans."""
    config = ModelConfig(**{**MODEL.__dict__, "remat": remat})
    mesh = make_mesh(MeshConfig(2, 1, 2), jax.devices()[:4])
    params = random_model(config, scale=0.5)[2]
    tokens_BxL = jax.device_put(
        np.random.default_rng(0).integers(64, size=(2, L)).astype(np.int32), batch_sharding(mesh)
    )

    def value_and_grad(backend):
        model = SpiralFormer(config, backend)

        def loss(params):
            log_p_BxLxV = jax.nn.log_softmax(model.apply({"params": params}, tokens_BxL)[:, :-1])
            return -jnp.mean(jnp.take_along_axis(log_p_BxLxV, tokens_BxL[:, 1:, None], axis=-1))

        return jax.jit(jax.value_and_grad(loss))(params)

    value, grads = value_and_grad(Backend(per_device(mesh, INTERPRETED)))
    expected, expected_grads = value_and_grad(Backend())
    assert abs(value - expected) < 1e-5
    for (path, a), b in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(expected_grads), strict=True):
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b), jax.tree_util.keystr(path)


@pytest.mark.parametrize("kind", ["TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x", "TPU v9"])
@pytest.mark.parametrize("K", splash.HEAD_WIDTHS)
def test_blocks_divide_every_length(kind, K):
    for L in range(128, 8192 + 1, 128):
        size = splash.block_size(L, K, jnp.bfloat16, kind)
        assert L % size == 0 and size % 128 == 0 and size <= 1024
    for L in (128, 256, 512, 1024, 2048):
        assert splash.block_size(L, K, jnp.bfloat16, kind) == min(L, 512)
    narrow = kind == "TPU v9" or (K == 256 and kind in ("TPU v4", "TPU v5 lite", "TPU v5"))
    assert splash.block_size(4096, K, jnp.bfloat16, kind) == (512 if narrow else 1024)
    assert splash.block_size(4096, K, jnp.float32, kind) == 512
