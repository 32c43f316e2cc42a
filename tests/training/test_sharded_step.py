"""One step on any mesh, remat, accumulation and loss block: the loss and gradients of a plain program on one device.

The gradients are read from the optimizer: with beta1 = 0 and no clipping its first moment is the gradient, so what is
compared is what the compiled train step computed, with its shardings and its donated state.
"""

import dataclasses
import itertools
import math
import re

import jax
import numpy as np
import optax
import pytest
from cases import slow

from spiral_jax.model.config import ModelConfig
from spiral_jax.model.spiralformer import SpiralFormer
from spiral_jax.parallel.mesh import MeshConfig, make_mesh
from spiral_jax.run.config import RunConfig
from spiral_jax.training.config import OptimizerConfig, TrainConfig
from spiral_jax.training.step import TrainState, make_program

# Three stacked core layers, so that an array of all of them can be told from an array of one.
MODEL = ModelConfig(vocab_size=64, d_model=32, num_heads=4, prelude_layers=1, core_layers=3, coda_layers=1,
                    chunks=(2, 1), dtype="float32")  # fmt: skip
# The block of the loss does not divide the length.
TRAIN = TrainConfig(steps=10, batch_size=8, sequence_length=16, loss_block=5)
OPTIMIZER = OptimizerConfig(beta1=0.0, clip_norm=0.0)
BASE = RunConfig(model=MODEL, train=TRAIN, optimizer=OPTIMIZER)
WINDOWS_BxW = np.random.default_rng(0).integers(64, size=(8, 17)).astype(np.int32)


def changed(mesh=(1, 1, 1), model=None, **train) -> RunConfig:
    """BASE on another mesh (data, fsdp, tensor), with other fields of the model and of training."""
    return dataclasses.replace(
        BASE,
        mesh=MeshConfig(*mesh),
        model=dataclasses.replace(MODEL, **(model or {})),
        train=dataclasses.replace(TRAIN, **train),
    )


DEFAULT = {
    "one_device": changed(),
    "mixed_accumulated": changed((2, 2, 2), accumulation=2),
    "fsdp8": changed((1, 8, 1)),
    "data8": changed((8, 1, 1)),
    "fsdp4_core_whole_accumulated": changed((1, 4, 1), gather_core="step", accumulation=2),
}
SLOW = {
    "remat_full": changed(model=dict(remat="keep_inputs")),
    "unrolled": changed(model=dict(unroll=True)),
    "tensor2": changed((1, 1, 2)),
    "accumulation4": changed(accumulation=4),
    "tensor4": changed((1, 1, 4)),
    "fsdp2_tensor4": changed((1, 2, 4)),
    "data2_fsdp4": changed((2, 4, 1)),
    "accumulation8": changed(accumulation=8),
    "fsdp2_accumulation4": changed((1, 2, 1), accumulation=4),
    "data2_tensor2_accumulation4": changed((2, 1, 2), accumulation=4),
    "block1": changed(loss_block=1),
    "block8": changed(loss_block=8),
    "block16": changed(loss_block=16),
    "block_longer_than_sequence": changed(loss_block=512),
    "remat_dots": changed(model=dict(remat="keep_products")),
    "mixed_remat_dots": changed((2, 2, 2), model=dict(remat="keep_products")),
    "mixed_remat_full_accumulated": changed((2, 2, 2), model=dict(remat="keep_inputs"), accumulation=2),
    "mixed_core_whole": changed((2, 2, 2), gather_core="step"),
    "fsdp8_core_whole_remat": changed((1, 8, 1), model=dict(remat="keep_attention"), gather_core="step"),
    "fsdp8_core_whole_unrolled": changed((1, 8, 1), model=dict(unroll=True), gather_core="step"),
    "tensor2_core_whole": changed((1, 1, 2), gather_core="step"),
    "mixed_remat_attention": changed((2, 2, 2), model=dict(remat="keep_attention")),
    "mixed_unrolled": changed((2, 2, 2), model=dict(unroll=True)),
    "fsdp8_remat_full": changed((1, 8, 1), model=dict(remat="keep_inputs")),
}
# Other families, each against its own plain program.
FAMILIES = {
    "vanilla": dict(chunks=(), topology="base", core_layers=0, prelude_layers=2),
    "pythia_mesh": dict(chunks=(1, 1), shared_core=False, core_layers=1),
    "looped": dict(chunks=(1, 1), topology="anchor_star", core_layers=1, scan_iterations_from=2),
    "injection": dict(chunks=(2, 1), topology="injection", core_layers=1),
    "gated": dict(chunks=(2, 2, 1), topology="gated", allocation="uniform", core_layers=1, scan_iterations_from=2),
    "spiral_run": dict(chunks=(2, 2, 1), pooling="mean", allocation="uniform", core_layers=1, scan_iterations_from=2),
}


@pytest.fixture(scope="module")
def plain(random_model):
    """The model's fields to (parameters, loss, gradients) of one program on one device, logits and all."""
    cache = {}

    def make(config: ModelConfig):
        # Remat and unrolling are other programs of the same function.
        config = dataclasses.replace(config, remat="keep_all", unroll=False)
        if config not in cache:
            params = jax.tree.map(np.asarray, random_model(config, scale=0.5)[2])
            model = SpiralFormer(config)

            def loss(params, windows_BxW):
                logits_BxLxV = model.apply({"params": params}, windows_BxW[:, :-1])
                return optax.softmax_cross_entropy_with_integer_labels(logits_BxLxV, windows_BxW[:, 1:]).mean()

            step = jax.jit(jax.value_and_grad(loss))
            cache[config] = (params, *jax.tree.map(np.asarray, step(params, WINDOWS_BxW)))
        return cache[config]

    return make


@pytest.fixture(scope="module")
def compiled():
    """A run's configuration to (its program, its compiled step), each compiled once."""
    cache = {}

    def make(config: RunConfig):
        if config not in cache:
            mesh = make_mesh(config.mesh, jax.devices()[: math.prod(dataclasses.astuple(config.mesh))])
            program = make_program(config, mesh)
            step = program.lowered()
            cache[config] = program, step.compile()
        return cache[config]

    return make


def check(config: RunConfig, compiled, plain):
    """The compiled step against the plain program."""
    params, loss, grads = plain(config.model)
    program, step = compiled(config)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), program.abstract_state)
    state: TrainState = jax.device_put(
        zeros.replace(params=params), jax.tree.map(lambda x: x.sharding, program.abstract_state)
    )
    state, metrics = step(state, jax.device_put(WINDOWS_BxW, program.abstract_batch.sharding))

    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5)
    assert float(metrics["gradient_norm"]) == pytest.approx(float(optax.tree.norm(grads)), rel=1e-5)
    found = optax.tree_utils.tree_get(state.opt_state, "mu")
    assert jax.tree.structure(found) == jax.tree.structure(grads)
    paths = jax.tree_util.tree_leaves_with_path(grads)
    for (path, expected), actual in zip(paths, jax.tree.leaves(found), strict=True):
        name = jax.tree_util.keystr(path)
        norm = np.linalg.norm(expected)
        assert norm > 0, f"{name} has no gradient: the comparison would show nothing"
        assert np.linalg.norm(np.asarray(actual) - expected) <= 1e-5 * norm, name
    assert int(state.step) == 1


@pytest.mark.parametrize(
    "case",
    [
        "mixed_accumulated",
        *(slow(case) for case in DEFAULT if case != "mixed_accumulated"),
    ],
)
def test_loss_and_gradients(case, compiled, plain):
    check(DEFAULT[case], compiled, plain)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW)
def test_loss_and_gradients_of_more_programs(case, compiled, plain):
    check(SLOW[case], compiled, plain)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_of_other_families(family, mesh, compiled, plain):
    check(changed(mesh, FAMILIES[family], accumulation=2), compiled, plain)


# What the compiled programs exchange between devices. The text is one device's program: shapes in it are shards.

OPERATION = re.compile(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
ARRAY = re.compile(r"\b[a-z]+\d+\[([\d,]*)\]")


def shapes_in(text: str) -> set[tuple[int, ...]]:
    """Shapes of all arrays named in a piece of a program."""
    return {tuple(int(n) for n in dims.split(",") if n) for dims in ARRAY.findall(text)}


def collectives(step) -> dict[str, set[tuple[int, ...]]]:
    """Shapes of the outputs of every kind of collective in a compiled step."""
    found = {}
    for outputs, kind in OPERATION.findall(step.as_text()):
        found.setdefault(kind, set()).update(shapes_in(outputs))
    return found


def stacked_shapes(program) -> set[tuple[int, ...]]:
    """Shapes that the stacked matrices of the core would have in a device's program if some axis were gathered."""
    shapes = set()
    for x in jax.tree.leaves(program.abstract_state.params["core"]):
        shard = x.sharding.shard_shape(x.shape)
        if len(x.shape) > 2:
            shapes |= set(itertools.product(*({full, part} for full, part in zip(x.shape, shard, strict=True))))
            shapes.discard(shard)
    return shapes


@pytest.mark.parametrize("case", [slow("fsdp8"), "mixed_accumulated"])
def test_fsdp_step_gathers_a_layer_at_a_time(case, compiled):
    """Parameters are gathered and gradients summed over fsdp, and nothing holds the parameters of all layers.

    Checked on the text of the compiled program: no array, whatever made it, has the shape of a stacked matrix with
    an axis gathered, and no all-gather yields more than the largest matrix of one layer or the embedding.
    """
    program, step = compiled(DEFAULT[case])
    found = collectives(step)
    assert found.get("all-gather")
    assert found.get("reduce-scatter") or found.get("all-reduce")
    stacked = stacked_shapes(program)
    assert (3, 32, 128) in stacked
    assert not stacked & shapes_in(step.as_text())
    assert max(map(math.prod, found["all-gather"])) <= 32 * 128


def test_mixed_step_keeps_the_batch_apart(compiled):
    """No array holds the hidden states of the whole micro-batch: every device works on its own rows."""
    _, step = compiled(DEFAULT["mixed_accumulated"])
    rows = 8 // 2  # of a micro-batch; a device has one
    whole = {shape for shape in shapes_in(step.as_text()) if shape[:2] == (rows, 16) and len(shape) > 2}
    assert not whole


@pytest.mark.slow
def test_data_parallel_step_only_sums(compiled):
    """Replicas exchange nothing but sums: of every gradient and of the metrics."""
    program, step = compiled(DEFAULT["data8"])
    found = collectives(step)
    assert found.keys() == {"all-reduce"}

    def unordered(shape):
        return tuple(sorted(n for n in shape if n > 1))

    summed = {unordered(shape) for shape in found["all-reduce"]}
    for x in jax.tree.leaves(program.abstract_state.params):
        # Gradients of stacked layers are summed a layer at a time, or together.
        assert {unordered(x.shape), unordered(x.shape[1:])} & summed, x.shape
