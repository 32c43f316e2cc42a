"""Muon: which parameters are its own, what it makes of them, and that a mesh makes no difference."""

import dataclasses
import math

import jax
import numpy as np
import optax
import pytest
from cases import slow
from jax.sharding import PartitionSpec

from spiral_jax.model.config import ModelConfig
from spiral_jax.model.spiralformer import abstract_params
from spiral_jax.parallel.mesh import MeshConfig, abstract_mesh, make_mesh
from spiral_jax.parallel.placed_model import abstract_params_on
from spiral_jax.run.config import RunConfig
from spiral_jax.training.config import OptimizerConfig
from spiral_jax.training.optimizers import make_optimizer, optimizers, state_shardings
from spiral_jax.training.optimizers.muon import matrix_axes
from spiral_jax.training.step import abstract_state

MODEL = ModelConfig(vocab_size=64, d_model=32, num_heads=4, prelude_layers=1, core_layers=3, coda_layers=1,
                    chunks=(2, 1), topology="injection", dtype="float32", rotary_fraction=0.5)  # fmt: skip
CONFIG = OptimizerConfig(name="muon", peak_learning_rate=0.1, schedule="constant", warmup_steps=0, clip_norm=0.0,
                         weight_decay=0.3)  # fmt: skip
STEPS = 10


def leaves(tree) -> dict[str, np.ndarray]:
    found = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in found}


@pytest.fixture(scope="module")
def arrays():
    """Parameters, and gradients of two steps."""
    rng, shapes = np.random.default_rng(0), abstract_params(MODEL)
    return [jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), shapes) for _ in range(3)]


def updates_of(config, arrays, jit=jax.jit):
    """Updates of each of two steps."""
    params, *grads = arrays
    optimizer = make_optimizer(config, STEPS, MODEL)
    state, update, found = optimizer.init(params), jit(optimizer.update), []
    for grad in grads:
        updates, state = update(grad, state, params)
        found.append(leaves(updates))
    return found


def test_matrices_of_layers_and_of_operators_are_its_own():
    shapes = abstract_params(MODEL)
    paths = jax.tree_util.tree_leaves_with_path(shapes)
    found = {jax.tree_util.keystr(path, simple=True, separator="/"): matrix_axes(MODEL, path) for path, _ in paths}
    for stack in ("prelude", "core", "coda"):
        assert found[f"{stack}/layers/qkv/kernel"] == ((1,), (2, 4))  # layers and q|k|v count matrices
        assert found[f"{stack}/layers/out/kernel"] == ((1, 2), (3,))
        assert found[f"{stack}/layers/mlp_up/kernel"] == found[f"{stack}/layers/mlp_down/kernel"] == ((1,), (2,))
    assert found["steps_0/inject/kernel"] == found["steps_1/inject/kernel"] == ((0,), (1,))
    assert sum(axes is not None for axes in found.values()) == 3 * 4 + 2
    mesh = dataclasses.replace(MODEL, topology="mesh")
    for path, _ in jax.tree_util.tree_leaves_with_path(abstract_params(mesh)):
        names = [key.key for key in path]
        assert (matrix_axes(mesh, path) is None) == ("layers" not in names or names[-1] != "kernel"), names


def newton_schulz(x: np.ndarray) -> np.ndarray:
    """Five quintic steps in float64 (Jordan et al.)."""
    transposed = x.shape[0] > x.shape[1]
    x = x.T if transposed else x
    x = x / np.linalg.norm(x)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if transposed else x


def momenta(grads: list[np.ndarray], beta: float = 0.95) -> list[np.ndarray]:
    """Nesterov's look-ahead of the bias-corrected momentum, step by step."""
    m, found = 0.0, []
    for k, grad in enumerate(grads, start=1):
        m = beta * m + (1 - beta) * grad
        found.append(beta * m / (1 - beta ** (k + 1)) + (1 - beta) * grad / (1 - beta**k))
    return found


@pytest.mark.parametrize("rms", [0.2, slow(0.0)])
def test_each_matrix_is_orthogonalised_by_itself(arrays, rms):
    """Against NumPy: every layer, each of q, k and v, input axes of the output projection together."""
    params, *grads = (leaves(tree) for tree in arrays)
    found = updates_of(dataclasses.replace(CONFIG, muon_update_rms=rms), arrays)
    D = 32

    def check(name, index, shape):
        given = [grad[name][index].reshape(shape).astype(np.float64) for grad in grads]
        size = rms * math.sqrt(max(shape)) if rms else math.sqrt(max(1, shape[1] / shape[0]))
        for step, x in enumerate(momenta(given)):
            update = found[step][name][index].reshape(shape) / -0.1 - 0.3 * params[name][index].reshape(shape)
            np.testing.assert_allclose(update, size * newton_schulz(x), rtol=0, atol=2e-4 * size, err_msg=name)
            # Orthogonal as far as five steps go, which lift all but the smallest of the values before.
            before, after = (np.linalg.svd(y, compute_uv=False) for y in (x, update / size))
            assert np.mean((after > 0.6) & (after < 1.3)) > 0.95, name
            assert before.max() > 2 * before.min()
        if rms:
            assert np.sqrt(np.mean(update**2)) == pytest.approx(rms, rel=0.2)

    for layer in range(3):
        for part in range(3):
            check("core/layers/qkv/kernel", (layer, slice(None), slice(None), part), (D, D))
        check("core/layers/out/kernel", (layer,), (D, D))
        check("core/layers/mlp_up/kernel", (layer,), (D, 4 * D))
        check("core/layers/mlp_down/kernel", (layer,), (4 * D, D))
    check("steps_0/inject/kernel", (), (2 * D, D))
    whole = found[0]["core/layers/qkv/kernel"][0].reshape(D, 3 * D)
    assert np.linalg.svd(whole, compute_uv=False).min() > 0


def test_the_rest_is_adamw(arrays):
    """Embedding, head, biases, LayerNorms and scalers, with its decay."""
    muon, adamw = (updates_of(dataclasses.replace(CONFIG, name=name), arrays) for name in ("muon", "adamw"))
    shared = 0
    for step in range(2):
        for name, update in muon[step].items():
            is_matrix = name.endswith("kernel") and ("/layers/" in name or "inject" in name)
            if is_matrix:
                assert np.abs(update - adamw[step][name]).max() > 1e-3, name
            else:
                np.testing.assert_array_equal(update, adamw[step][name], err_msg=name)
                shared += 1
    assert shared > 30


@pytest.mark.parametrize("mesh", [(2, 2, 2), slow((1, 8, 1))])
def test_on_a_mesh_the_updates_are_the_same(arrays, mesh):
    """Within 1e-5 of the update's norm."""
    plain = updates_of(CONFIG, arrays)
    devices = make_mesh(MeshConfig(*mesh))
    placed = jax.tree.map(lambda x: x.sharding, abstract_params_on(MODEL, devices))
    params, *grads = (jax.device_put(tree, placed) for tree in arrays)
    optimizer = make_optimizer(CONFIG, STEPS, MODEL)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), arrays[0], placed)
    state = optimizer.init(params)
    state = jax.device_put(state, state_shardings(state, abstract, devices))
    update = jax.jit(optimizer.update, out_shardings=(placed, None))
    for step, grad in enumerate(grads):
        updates, state = update(grad, state, params)
        assert updates["core"]["layers"]["mlp_up"]["kernel"].sharding.spec == PartitionSpec(None, "fsdp", "tensor")
        for name, found in leaves(updates).items():
            wanted = plain[step][name]
            assert np.linalg.norm(np.asarray(found) - wanted) < 1e-5 * np.linalg.norm(wanted), name


# Where states lie


@pytest.fixture
def registered():
    """Optimizers of optax with states of several kinds."""
    made = {
        "lion": lambda config, rate, model: optax.lion(rate),
        "adafactor": lambda config, rate, model: optax.adafactor(rate, min_dim_size_to_factor=8),
        "masked": lambda config, rate, model: optax.masked(
            optax.adam(rate), lambda params: jax.tree.map(lambda x: x.ndim > 1, params)
        ),
        "partitioned": lambda config, rate, model: optax.partition(
            {"a": optax.adam(rate), "b": optax.sgd(rate, momentum=0.9)},
            lambda params: jax.tree.map(lambda x: "a" if x.ndim > 1 else "b", params),
        ),
    }
    for name, make in made.items():
        optimizers.register(name)(make)
    yield list(made)
    for name in made:
        optimizers._entries.pop(name)


def test_moments_lie_with_their_parameters(registered):
    """Of any transformation, masked or not: nothing that has a parameter's shape is on every device."""
    mesh = abstract_mesh(MeshConfig(1, 4, 2), 8)
    for name in [*registered, "muon", "adamw"]:
        config = RunConfig(model=MODEL, optimizer=dataclasses.replace(CONFIG, name=name))
        state = abstract_state(config, mesh)
        params = leaves(state.params)
        seen = 0
        for path, x in leaves(state.opt_state).items():
            owner = next((p for p in params if path.endswith(p) and params[p].shape == x.shape), None)
            if owner is None:
                assert x.ndim < 2 or name == "adafactor", path
                assert not any(x.sharding.spec), path
            else:
                assert x.sharding == params[owner].sharding, path
                seen += 1
        assert seen >= 0.4 * len(params), name


def test_muon_keeps_one_moment_of_matrices(registered):
    state = abstract_state(RunConfig(model=MODEL, optimizer=CONFIG), abstract_mesh(MeshConfig(), 1))
    matrices = 5 * 12 * 32**2 + 2 * 2 * 32**2
    numbers = sum(math.prod(x.shape) for x in jax.tree.leaves(state.opt_state))
    assert numbers == pytest.approx(matrices + 2 * (MODEL.total_parameters - matrices), abs=16)


def test_an_optimizer_that_raises_is_one_line():
    @optimizers.register("broken")
    def broken(config, rate, model):
        raise ValueError("no\nsuch thing")

    try:
        with pytest.raises(Exception, match=r"^optimizer.name 'broken' \(.*\), line \d+: ValueError: no such thing$"):
            make_optimizer(dataclasses.replace(CONFIG, name="broken"), STEPS, MODEL)
    finally:
        optimizers._entries.pop("broken")
