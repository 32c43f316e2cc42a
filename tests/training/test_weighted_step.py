"""Steps on examples with targets and weights of their own: against NumPy, on any mesh, and beside ordinary steps."""

import dataclasses
import math

import jax
import numpy as np
import optax
import pytest
from cases import slow

from spiral_jax.data.config import DataConfig
from spiral_jax.data.examples import Examples
from spiral_jax.evaluation.config import EvaluationConfig
from spiral_jax.model.config import ModelConfig
from spiral_jax.model.spiralformer import SpiralFormer
from spiral_jax.parallel.mesh import MeshConfig, make_mesh
from spiral_jax.run.config import RunConfig
from spiral_jax.training.config import OptimizerConfig, TrainConfig
from spiral_jax.training.step import make_program

B, L, V = 8, 16, 32
MODEL = ModelConfig(vocab_size=V, d_model=16, num_heads=2, prelude_layers=0, core_layers=1, coda_layers=0,
                    chunks=(2, 1), dtype="float32")  # fmt: skip
# The first moment is the gradient, as in test_sharded_step.py. The block of the loss does not divide the length.
BASE = RunConfig(
    model=MODEL,
    train=TrainConfig(steps=10, batch_size=B, sequence_length=L, loss_block=5),
    optimizer=OptimizerConfig(beta1=0.0, clip_norm=0.0),
    data=DataConfig(examples="listops"),
    evaluation=EvaluationConfig(batches=1),
)
RANDOM = np.random.default_rng(0)
WINDOWS_BxW = RANDOM.integers(V, size=(B, L + 1)).astype(np.int32)
# Rows, and so micro-batches and devices, of very different weight; most positions count nothing.
WEIGHTS_BxL = RANDOM.random((B, L)) * (RANDOM.random((B, L)) < 0.3) * 10.0 ** np.arange(-3, 5)[:, None]
WEIGHTS_BxL[:, 3] = 0.5
WEIGHTS_BxL = WEIGHTS_BxL.astype(np.float32)
TARGETS_BxL = RANDOM.integers(V, size=(B, L)).astype(np.int32)
WEIGHTED = Examples(WINDOWS_BxW[:, :-1], TARGETS_BxL, WEIGHTS_BxL)
EQUAL = Examples(WINDOWS_BxW[:, :-1], WINDOWS_BxW[:, 1:], np.ones((B, L), np.float32))


@pytest.fixture(scope="module")
def params(random_model):
    return jax.tree.map(np.asarray, random_model(MODEL, scale=0.5)[2])


@pytest.fixture(scope="module")
def step(params):
    """(mesh, accumulation, batch) to the loss and the gradients of the compiled step."""
    compiled = {}

    def run(mesh, accumulation, batch):
        brings_targets = isinstance(batch, Examples)
        key = mesh, accumulation, brings_targets
        if key not in compiled:
            config = dataclasses.replace(
                BASE,
                mesh=MeshConfig(*mesh),
                train=dataclasses.replace(BASE.train, accumulation=accumulation),
                data=BASE.data if brings_targets else DataConfig(),
            )
            program = make_program(config, make_mesh(config.mesh, jax.devices()[: math.prod(mesh)]))
            lowered = program.lowered()
            compiled[key] = program, lowered.compile()
        program, train_step = compiled[key]
        state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), program.abstract_state).replace(params=params)
        state = jax.device_put(state, jax.tree.map(lambda x: x.sharding, program.abstract_state))
        state, metrics = train_step(state, program.put_rows_of_process(batch))
        return float(metrics["loss"]), jax.tree.map(np.asarray, optax.tree_utils.tree_get(state.opt_state, "mu"))

    return run


@pytest.fixture(scope="module")
def plain(step):
    return step((1, 1, 1), 1, WEIGHTED)


def test_loss_and_gradient_are_those_of_the_mean_over_all_weights(plain, params):
    """The loss by NumPy from logits, the gradient by differentiating the formula, logits and all."""
    model = SpiralFormer(MODEL)

    def formula(params):
        logits_BxLxV = model.apply({"params": params}, WEIGHTED.tokens_BxL)
        nats_BxL = optax.softmax_cross_entropy_with_integer_labels(logits_BxLxV, TARGETS_BxL)
        return (nats_BxL * WEIGHTS_BxL).sum() / WEIGHTS_BxL.sum(), logits_BxLxV

    gradient, logits_BxLxV = jax.jit(jax.grad(formula, has_aux=True))(params)
    logits_BxLxV = np.asarray(logits_BxLxV, np.float64)
    log_p_BxLxV = logits_BxLxV - np.log(np.exp(logits_BxLxV).sum(-1, keepdims=True))
    nats_BxL = -np.take_along_axis(log_p_BxLxV, TARGETS_BxL[..., None], -1)[..., 0]
    expected = np.average(nats_BxL, weights=WEIGHTS_BxL)
    assert abs(expected - nats_BxL.mean()) > 0.01, "weights that make no difference"
    assert plain[0] == pytest.approx(expected, rel=1e-5)
    assert_same(plain[1], gradient, 1e-5)


@pytest.mark.parametrize(
    ("mesh", "accumulation"),
    [
        ((2, 2, 2), 2),
        slow((1, 1, 1), 4),
        slow((8, 1, 1), 1),
        slow((1, 4, 1), 2),
    ],
    ids=str,
)
def test_devices_and_micro_batches_of_other_weights_change_nothing(mesh, accumulation, step, plain):
    loss, grads = step(mesh, accumulation, WEIGHTED)
    assert loss == pytest.approx(plain[0], rel=1e-5)
    assert_same(grads, plain[1], 1e-5)


@pytest.mark.parametrize("weight", [1, 0.3])
def test_equal_weights_are_an_ordinary_step(weight, step):
    """Weights of 1 bit by bit, others to rounding."""
    loss, grads = step((1, 1, 1), 1, WINDOWS_BxW)
    found, found_grads = step((1, 1, 1), 1, EQUAL._replace(weights_BxL=EQUAL.weights_BxL * np.float32(weight)))
    if weight == 1:
        assert found == loss
        jax.tree.map(np.testing.assert_array_equal, found_grads, grads)
    assert found == pytest.approx(loss, rel=1e-5)
    assert_same(found_grads, grads, 1e-5)


def assert_same(found, expected, tolerance):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(found), strict=True):
        assert np.linalg.norm(a) > 0, path
        assert np.linalg.norm(np.asarray(b) - a) <= tolerance * np.linalg.norm(a), jax.tree_util.keystr(path)
