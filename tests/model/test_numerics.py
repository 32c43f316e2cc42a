"""Dtypes under bfloat16, statistics of fresh weights, router entropies."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from spiral_jax.model.config import ModelConfig
from spiral_jax.model.spiralformer import SpiralFormer

# Widths that name their axis: V 53, D 24, K 12, S 11, G 5 and 3, L 20.
SMALL = ModelConfig(vocab_size=53, d_model=24, num_heads=2, prelude_layers=1, core_layers=1, coda_layers=1,
                    rotary_fraction=0.5, chunks=(5, 3, 3, 1), topology="mesh", memory_slots=11,
                    dtype="bfloat16", scan_iterations_from=2)  # fmt: skip
TOKENS_BxL = np.random.default_rng(2).integers(SMALL.vocab_size, size=(2, 20)).astype(np.int32)


def shapes_of(config):
    return jax.eval_shape(SpiralFormer(config).init, jax.random.key(0), TOKENS_BxL)["params"]


def equations(jaxpr):
    """Every primitive equation, those inside scans and calls included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


@pytest.fixture(scope="module", params=["keep_all", "keep_inputs"])
def bfloat16_equations(request):
    config = dataclasses.replace(SMALL, remat=request.param)
    model = SpiralFormer(config)
    jaxpr = jax.make_jaxpr(lambda params: model.apply({"params": params}, TOKENS_BxL))(shapes_of(config)).jaxpr
    return list(equations(jaxpr))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_gradients_and_logits_are_float32(dtype):
    config = dataclasses.replace(SMALL, dtype=dtype)
    params, model = shapes_of(config), SpiralFormer(config)
    logits_BxLxV = jax.eval_shape(lambda params: model.apply({"params": params}, TOKENS_BxL), params)
    assert (logits_BxLxV.dtype, logits_BxLxV.shape) == (jnp.float32, (2, 20, 53))
    hidden_BxLxD, metrics = jax.eval_shape(
        lambda params: model.apply({"params": params}, TOKENS_BxL, method="hidden"), params
    )
    assert hidden_BxLxD.dtype == dtype
    assert metrics["router_entropy"].dtype == jnp.float32
    grads = jax.eval_shape(jax.grad(lambda params: model.apply({"params": params}, TOKENS_BxL).sum()), params)
    assert {leaf.dtype for leaf in jax.tree.leaves((params, grads))} == {jnp.dtype("float32")}


def test_exponentials_and_sums_are_float32(bfloat16_equations):
    """Softmaxes, LayerNorm statistics, entropies and rotary angles."""
    names = {"exp", "log", "rsqrt", "sqrt", "cos", "sin", "reduce_sum", "reduce_max"}
    seen = set()
    for equation in bfloat16_equations:
        if equation.primitive.name in names:
            seen.add(equation.primitive.name)
            assert {str(v.aval.dtype) for v in equation.invars} == {"float32"}, equation
    assert {"exp", "cos", "sin", "reduce_sum"} <= seen


def test_dots_run_in_the_dtype_that_is_asked_of_them(bfloat16_equations):
    """Routers, scorers, pooling and allocators in float32; layers in bfloat16, scores and logits summed in float32."""
    small, layers, summed = 0, 0, 0
    for equation in bfloat16_equations:
        if equation.primitive.name != "dot_general":
            continue
        dims = {size for v in equation.invars for size in v.aval.shape}
        inputs, output = {str(v.aval.dtype) for v in equation.invars}, equation.outvars[0].aval
        if dims & {11, 5, 3} and dims.isdisjoint({12, 96}):
            small += 1
            assert "float32" in inputs and str(output.dtype) == "float32", equation
            assert set(equation.params["precision"]) == {jax.lax.Precision.HIGHEST}, equation
        else:
            layers += 1
            assert inputs == {"bfloat16"}, equation
            is_scores = len(output.shape) == 4 and output.shape[-1] == output.shape[-2]
            if is_scores or 53 in dims:
                summed += 1
                assert str(output.dtype) == "float32", equation
    # Each run of levels is traced once: routers in the transition and three runs; scorer, sum, allocator in two.
    assert small == 2 * 4 + 3 * 2
    # Five stacks are traced (prelude, three runs, coda) with scores in each, and the head.
    assert summed == 5 + 1
    assert layers == 5 * 6 + 1


def test_bfloat16_logits_are_close_to_float32(forward, random_model):
    config = dataclasses.replace(SMALL, chunks=(5, 1))
    _, _, params = random_model(config, scale=0.5)
    exact_BxLxV = forward(dataclasses.replace(config, dtype="float32"), params, TOKENS_BxL)
    rounded_BxLxV = forward(config, params, TOKENS_BxL)
    error = np.sqrt(np.mean((rounded_BxLxV - exact_BxLxV) ** 2) / np.mean(exact_BxLxV**2))
    assert 1e-4 < error < 0.03


# Fresh weights


@pytest.fixture(scope="module")
def fresh():
    """A model wide enough for every std to be measured within 3 %."""
    config = ModelConfig(vocab_size=512, d_model=256, num_heads=4, prelude_layers=2, core_layers=2, coda_layers=1,
                         chunks=(4, 2, 2, 1), topology="mesh", dtype="float32")  # fmt: skip
    params = jax.jit(SpiralFormer(config).init)(jax.random.key(7), TOKENS_BxL)["params"]
    return jax.tree.map(np.asarray, nn.meta.unbox(params))


def check_normal(array, std):
    assert array.std() == pytest.approx(std, rel=0.03)
    assert abs(array.mean()) < 5 * std / math.sqrt(array.size)
    assert np.abs(array).max() > 3.2 * std, "normal, not truncated"


def test_fresh_matrices(fresh):
    std = math.sqrt(2 / (5 * 256))
    output = std / math.sqrt(2 * (2 + 4 * 2 + 1))
    check_normal(fresh["embed"]["embedding"], std)
    check_normal(fresh["head"]["kernel"], std)
    for stack, depth in (("prelude", 2), ("core", 2), ("coda", 1)):
        layers = fresh[stack]["layers"]
        for i in range(depth):
            check_normal(layers["qkv"]["kernel"][i], std)
            check_normal(layers["mlp_up"]["kernel"][i], std)
            check_normal(layers["out"]["kernel"][i], output)
            check_normal(layers["mlp_down"]["kernel"][i], output)
    groups = ["entry", "steps_0", "steps_1", "steps_2", "steps_3"]
    for side in ("write", "read"):
        check_normal(np.stack([fresh[group][side]["kernel"] for group in groups]), math.sqrt(2 / (7 * 256)))


def test_fresh_vectors_and_scalers(fresh):
    for path, leaf in jax.tree.leaves_with_path(fresh):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith("/scale"):
            assert (leaf == 1).all(), name
        if name.endswith("/bias") or "/scorer/" in name or "/allocator/" in name:
            assert (leaf == 0).all(), name


def test_a_seed_gives_what_it_has_always_given(fresh):
    """How often a layer is traced decides what its keys are: numbers of earlier runs are compared with later ones."""
    last = {"embed": 0.0077289669, "prelude": 0.0375724360, "core": -0.0397683866, "coda": 0.0072509139,
            "steps_2": 0.0628853291}  # fmt: skip
    found = {
        "embed": fresh["embed"]["embedding"],
        "prelude": fresh["prelude"]["layers"]["qkv"]["kernel"],
        "core": fresh["core"]["layers"]["mlp_up"]["kernel"],
        "coda": fresh["coda"]["layers"]["out"]["kernel"],
        "steps_2": fresh["steps_2"]["read"]["kernel"],
    }
    assert {name: array.ravel()[-1] for name, array in found.items()} == pytest.approx(last, rel=1e-4)


def test_fresh_draws_are_independent(fresh):
    qkv = [fresh[stack]["layers"]["qkv"]["kernel"] for stack in ("prelude", "core", "coda")]
    groups = ["entry", "steps_0", "steps_1", "steps_2", "steps_3"]
    routers = [np.stack([fresh[group][side]["kernel"] for group in groups]) for side in ("write", "read")]
    for arrays in (qkv, routers):
        drawn = [slice_.ravel() for array in arrays for slice_ in array]
        correlation = np.corrcoef(drawn) - np.eye(len(drawn))
        assert np.abs(correlation).max() < 0.15


# Router entropies


def entropies(config, params, x64):
    model = SpiralFormer(config)
    with x64(config.dtype == "float64"):
        apply = jax.jit(lambda params: model.apply({"params": params}, TOKENS_BxL, method="hidden")[1])
        return {name: np.asarray(value) for name, value in apply(params).items()}


def test_router_entropy(monkeypatch, random_model, x64):
    """Every row against the reference's routers, for scanned and unrolled iterations alike."""
    config = dataclasses.replace(SMALL, chunks=(3, 3, 1), dtype="float64")
    hf_config, tensors, params = random_model(config)
    recorded = {}
    route = reference.route

    def recording(weights, k, memory_SxLxD, state_LxD, new_LxD):
        for i, side in enumerate(("write", "read")):
            p_LxS = reference.softmax(reference.linear(weights / "memory" / k / side, state_LxD))
            recorded.setdefault((k, i), []).append(-(p_LxS * np.log(p_LxS)).sum(axis=-1))
        return route(weights, k, memory_SxLxD, state_LxD, new_LxD)

    monkeypatch.setattr(reference, "route", recording)
    reference.logits(hf_config, tensors, TOKENS_BxL)
    expected_Kx2 = np.array([[np.mean(recorded[k, i]) for i in range(2)] for k in range(4)])

    scanned_Kx2 = entropies(config, params, x64)["router_entropy"]
    assert scanned_Kx2.shape == (4, 2)
    np.testing.assert_allclose(scanned_Kx2, expected_Kx2, rtol=0, atol=1e-9)
    assert ((scanned_Kx2 > 0) & (scanned_Kx2 < math.log(11))).all()
    unrolled_Kx2 = entropies(dataclasses.replace(config, unroll=True), params, x64)["router_entropy"]
    np.testing.assert_allclose(unrolled_Kx2, scanned_Kx2, rtol=0, atol=1e-12)


def test_router_entropy_of_the_transition(random_model, x64):
    """k = 0 by hand: without a prelude its state is the scaled embeddings."""
    config = dataclasses.replace(SMALL, prelude_layers=0, chunks=(1,), dtype="float32")
    _, _, params = random_model(config)
    state_BxLxD = params["embed"]["embedding"][TOKENS_BxL] * math.sqrt(24)
    expected = []
    for side in ("write", "read"):
        score_BxLxS = state_BxLxD @ params["entry"][side]["kernel"] + params["entry"][side]["bias"]
        p_BxLxS = np.exp(score_BxLxS) / np.exp(score_BxLxS).sum(axis=-1, keepdims=True)
        expected.append(-(p_BxLxS * np.log(p_BxLxS)).sum(axis=-1).mean())
    np.testing.assert_allclose(entropies(config, params, x64)["router_entropy"][0], expected, rtol=1e-5)


def test_equal_routers_have_the_entropy_of_all_slots(random_model, x64):
    config = dataclasses.replace(SMALL, dtype="float32", chunks=(1,))
    _, _, params = random_model(config)
    for group in ("entry", "steps_0"):
        params[group] = jax.tree.map(np.zeros_like, params[group])
    np.testing.assert_allclose(entropies(config, params, x64)["router_entropy"], math.log(11), rtol=1e-5)


@pytest.mark.parametrize("topology", ["base", "residual", "anchor", "anchor_star", "gated", "injection"])
def test_no_router_metrics_without_memory(topology):
    config = dataclasses.replace(SMALL, topology=topology, chunks=(3,))
    model = SpiralFormer(config)
    _, metrics = jax.eval_shape(
        lambda params: model.apply({"params": params}, TOKENS_BxL, method="hidden"), shapes_of(config)
    )
    assert metrics == {}
