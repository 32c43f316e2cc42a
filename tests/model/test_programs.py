"""One function, many programs: scanned or unrolled, any remat policy; and the program does not grow with depth."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow

from spiral_jax.model.config import ModelConfig
from spiral_jax.model.spiralformer import SpiralFormer, abstract_params

TINY = ModelConfig(vocab_size=23, d_model=16, num_heads=2, prelude_layers=1, core_layers=2, coda_layers=1,
                   rotary_fraction=0.5, chunks=(1,), dtype="float32", scan_iterations_from=2)  # fmt: skip
MODELS = {
    "looped": dataclasses.replace(TINY, chunks=(1, 1, 1), topology="mesh", prelude_layers=0, coda_layers=0),
    "coarse": dataclasses.replace(TINY, chunks=(3, 3, 1), topology="mesh", prelude_layers=0),
}
TOKENS_BxL = np.random.default_rng(3).integers(TINY.vocab_size, size=(2, 11)).astype(np.int32)
UNROLLED, WRITTEN_OUT = dict(unroll=True), dict(scan_iterations_from=4)
DOTS, FULL = dict(remat="keep_products"), dict(remat="keep_inputs")


def loss(config, params):
    """Mean next-token cross entropy."""
    logits_BxLxV = SpiralFormer(config).apply({"params": params}, TOKENS_BxL)
    log_p_BxLxV = jax.nn.log_softmax(logits_BxLxV[:, :-1])
    return -jnp.mean(jnp.take_along_axis(log_p_BxLxV, TOKENS_BxL[:, 1:, None], axis=-1)), logits_BxLxV


def value_and_grad(config, compiler_options=None):
    """Jitted: params to ((loss, logits), gradients)."""
    differentiated = jax.value_and_grad(lambda params: loss(config, params), has_aux=True)
    return jax.jit(differentiated, compiler_options=compiler_options)


def relative(a, b) -> float:
    return float(np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(b)))


@pytest.fixture(scope="module")
def scanned(request, random_model):
    """A model, random weights, and its loss, logits and gradients scanned and without remat."""
    config = MODELS[request.param]
    _, _, params = random_model(config, scale=0.5)
    (value, logits_BxLxV), grads = value_and_grad(config)(params)
    return config, params, value, logits_BxLxV, grads


@pytest.mark.parametrize(
    "scanned, fields",
    [
        slow("looped", UNROLLED),
        ("coarse", UNROLLED),
        slow("coarse", WRITTEN_OUT),
        slow("coarse", DOTS),
        slow("coarse", FULL),
        slow("looped", DOTS),
        slow("looped", FULL),
        slow("looped", WRITTEN_OUT),
        slow("looped", FULL | WRITTEN_OUT),
        slow("coarse", DOTS | UNROLLED),
        slow("coarse", FULL | UNROLLED),
    ],
    indirect=["scanned"],
)
def test_same_logits_loss_and_gradients(scanned, fields):
    config, params, value, logits_BxLxV, grads = scanned
    config = dataclasses.replace(config, **fields)
    (other_value, other_logits_BxLxV), other_grads = value_and_grad(config)(params)
    assert relative(other_logits_BxLxV, logits_BxLxV) < 1e-5
    assert abs(other_value - value) < 1e-5 * abs(value)
    other_grads = dict(jax.tree.leaves_with_path(other_grads))
    for path, grad in jax.tree.leaves_with_path(grads):
        name = jax.tree_util.keystr(path)
        assert float(jnp.abs(grad).max()) > 0, f"{name} has no gradient"
        assert relative(other_grads[path], grad) < 1e-5, name


def test_remat_keeps_less_for_the_backward_pass():
    config = MODELS["coarse"]
    params = abstract_params(config)

    def residual_bytes(remat):
        vary = dataclasses.replace(config, remat=remat)
        backward = jax.eval_shape(lambda p: jax.vjp(lambda p: loss(vary, p)[0], p)[1], params)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward))

    none, dots, full = (residual_bytes(remat) for remat in ("keep_all", "keep_products", "keep_inputs"))
    assert full < 0.9 * dots < 0.9 * 0.9 * none


def matmuls(text: str) -> int:
    return text.count("dot_general") + text.count(" dot(")


@pytest.mark.parametrize("more", [dict(core_layers=8), slow(dict(prelude_layers=6, chunks=(3,) * 6))])
def test_program_does_not_grow_with_depth(more):
    """More layers, or more neighbouring iterations of one level, change trip counts and shapes only."""
    base = dataclasses.replace(TINY, chunks=(3,) * 4, topology="residual", prelude_layers=2, core_layers=3)

    def text(config):
        return value_and_grad(config).lower(abstract_params(config)).as_text()

    shallow, deep, unrolled = (
        text(dataclasses.replace(base, **fields)) for fields in ({}, more, dict(more, unroll=True))
    )
    assert matmuls(deep) == matmuls(shallow) > 0
    assert len(deep) < 1.01 * len(shallow)
    assert len(unrolled) > 1.2 * len(shallow), "the measure must see growth where there is some"


@pytest.mark.slow
def test_compiled_program_does_not_grow_with_layers():
    def text(core_layers):
        config = dataclasses.replace(TINY, chunks=(3, 1), topology="mesh", core_layers=core_layers)
        model = SpiralFormer(config)
        apply = jax.jit(lambda params: model.apply({"params": params}, TOKENS_BxL))
        return apply.lower(abstract_params(config)).compile().as_text()

    shallow, deep = text(2), text(8)
    assert matmuls(deep) == matmuls(shallow) > 0
    assert len(deep) < 1.05 * len(shallow)
