"""The closed forms against what compiled programs do, here for CPU devices; and against numbers worked out by hand."""

import dataclasses
import math

import jax
import pytest
from cases import slow
from jaxprs import equations_in

from spiral_jax.model.config import ModelConfig
from spiral_jax.parallel.mesh import MeshConfig, make_mesh
from spiral_jax.roofline import hlo, work
from spiral_jax.roofline.groups import cross
from spiral_jax.run.config import RunConfig
from spiral_jax.training import costs
from spiral_jax.training.config import TrainConfig
from spiral_jax.training.step import make_program

MODEL = ModelConfig(vocab_size=64, d_model=64, num_heads=2, prelude_layers=2, core_layers=2, coda_layers=2,
                    chunks=(2, 1), dtype="float32", remat="keep_inputs")  # fmt: skip
TRAIN = TrainConfig(steps=10, batch_size=16, sequence_length=16, loss_block=16)


def config_of(mesh=(1, 8, 1), model=None, **train) -> RunConfig:
    return RunConfig(
        model=dataclasses.replace(MODEL, **(model or {})),
        train=dataclasses.replace(TRAIN, **train),
        mesh=MeshConfig(*mesh),
    )


@pytest.fixture(scope="module")
def compiled():
    """A run's configuration to the operations of its compiled step."""
    cache = {}

    def make(config: RunConfig) -> list[work.Operation]:
        if config not in cache:
            sizes = dataclasses.astuple(config.mesh)
            program = make_program(config, make_mesh(config.mesh, jax.devices()[: math.prod(sizes)]))
            step = program.lowered()
            cache[config] = work.operations(hlo.parse(step.compile().as_text()))
        return cache[config]

    return make


def by_rows(operations, tensor: int) -> tuple[list[work.Operation], list[work.Operation]]:
    """Collectives between devices with different rows, and those along `tensor`, the mesh's last axis, alone."""
    rows = [device // tensor for device in range(8)]
    across, inside = [], []
    for op in operations:
        if op.collective:
            (across if cross(op.collective.groups, rows) else inside).append(op)
    return across, inside


def moved(operations, tensor: int = 1) -> costs.Communication:
    """Bytes of arrays that are gathered, and that are summed (the compiler may sum all and keep a part)."""
    across, _ = by_rows(operations, tensor)
    found = {kind: traffic.bytes for kind, traffic in work.collectives(across).items()}
    return costs.Communication(found.get("all-gather", 0), found.get("reduce-scatter", 0) + found.get("all-reduce", 0))


def form(config: RunConfig) -> costs.Communication:
    return costs.communication(config, math.prod(dataclasses.astuple(config.mesh)))


THREE = dict(chunks=(4, 2, 1))
CASES = {
    "iteration": config_of(),
    "step": config_of(gather_core="step"),
    "step, more iterations": config_of(model=THREE, gather_core="step"),
    "tensor": config_of((1, 2, 4), model=dict(num_heads=4)),
}
SLOW = {
    "iteration, accumulated": config_of(accumulation=2),
    "step, accumulated": config_of(accumulation=2, gather_core="step"),
    "data": config_of((8, 1, 1)),
    "iteration, more iterations": config_of(model=THREE),
    "both axes": config_of((2, 4, 1), gather_core="step"),
    "all axes": config_of((2, 2, 2)),
    "all axes, step": config_of((2, 2, 2), gather_core="step", accumulation=2),
    "tensor, keep_all": config_of((1, 4, 2), model=dict(remat="keep_all")),
    "keep_all": config_of(model=dict(remat="keep_all")),
    "keep_products": config_of(model=dict(remat="keep_products")),
    "keep_attention, step": config_of(model=dict(remat="keep_attention"), gather_core="step"),
    "scanned iterations": config_of(model=dict(chunks=(1, 1, 1), scan_iterations_from=2)),
    "iterations of one level": config_of(model=dict(chunks=(1, 1, 1))),
    "vanilla": config_of(model=dict(chunks=(), core_layers=0, topology="base")),
    "injection": config_of(model=dict(topology="injection")),
    "unshared": config_of(model=dict(chunks=(1, 1), shared_core=False), gather_core="step"),
}


@pytest.mark.parametrize("remat", [slow("keep_all"), "keep_products"])
def test_no_gathered_parameter_is_kept_for_the_backward_pass(remat):
    """Whatever the products of this platform make of a matrix: it is gathered as often as where nothing is kept."""

    def gathers(remat):
        config = config_of(model=dict(remat=remat))
        program = make_program(config, make_mesh(config.mesh, jax.devices()))
        traced = program.train_step.trace(program.abstract_state, program.abstract_batch)
        return sum(equation.primitive is jax.lax.all_gather_p for equation in equations_in(traced.jaxpr.jaxpr))

    assert gathers(remat) == gathers("keep_inputs")


@pytest.mark.parametrize(
    "case",
    [
        "iteration",
        *(slow(case) for case in (CASES | SLOW) if case != "iteration"),
    ],
)
def test_communicated_bytes_are_those_of_the_closed_form(case, compiled):
    config = (CASES | SLOW)[case]
    assert moved(compiled(config), config.mesh.tensor) == pytest.approx(form(config), rel=0.1)


@pytest.mark.parametrize(
    "case",
    [slow(case) for case in ("tensor", *SLOW) if case == "tensor" or "all axes" in case],
)
def test_nothing_but_activations_is_exchanged_along_tensor(case, compiled):
    """Matrices stay cut. A layer sums what attention and MLP give, forward, and their inputs' gradients, backward."""
    config = (CASES | SLOW)[case]
    _, inside = by_rows(compiled(config), config.mesh.tensor)
    assert {op.collective.kind for op in inside} <= {"all-reduce"}
    train, model = config.train, config.model
    micro = train.batch_size // (config.mesh.data * config.mesh.fsdp * train.accumulation)
    layers = sum(count * n for count, n in model.executed_layers(train.sequence_length))
    # With the embedding's rows, and the loss's gradient.
    form = train.accumulation * micro * model.d_model * 4 * (4 * layers + 2 * train.sequence_length)
    assert sum(op.collective.bytes * op.times for op in inside) == pytest.approx(form, rel=0.1)


@pytest.mark.slow
def test_a_core_gathered_once_is_gathered_once_whatever_the_iterations(compiled):
    """Two iterations and three move the same, but for the vectors of the third; gathered anew, they do not."""
    two, three = (moved(compiled(CASES[case])) for case in ("step", "step, more iterations"))
    assert three == pytest.approx(two, rel=0.03)
    anew = form(SLOW["iteration, more iterations"]).gathered_bytes
    assert anew > 1.2 * form(CASES["iteration"]).gathered_bytes > 1.2 * two.gathered_bytes


def test_communication_by_hand():
    """No vector is left out: prelude, core and coda of one layer, two iterations, width 8, two devices."""
    model = ModelConfig(vocab_size=10, d_model=8, num_heads=1, prelude_layers=1, core_layers=1, coda_layers=1,
                        chunks=(2, 1), topology="base", rotary_fraction=0.25, dtype="bfloat16")  # fmt: skip
    config = RunConfig(model=model, train=dataclasses.replace(TRAIN, accumulation=2), mesh=MeshConfig(1, 2, 1))
    matrices = 12 * 8 * 8
    vectors = 3 * 6 * 8 + 2 * 8  # four of LayerNorms and two biases a layer; the final LayerNorm
    scalers = 8 + 8 * 2  # a scorer, and an allocator for two places
    head = 10 * 8
    rest = 10 * 8 + vectors + scalers  # with the embedding
    assert costs.communication(config, 2) == (
        2 * 4 * matrices * 2 * 2 + rest * 4 + head * 2,
        (2 * 4 * matrices + rest + head) * 4,
    )
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, gather_core="step"))
    assert costs.communication(config, 2) == (
        2 * 2 * matrices * 2 * 2 + rest * 4 + head * 2 + matrices * 2,
        (2 * 2 * matrices + rest + head) * 4 + matrices * 4,
    )


def test_flops_by_hand():
    """Two tokens a chunk: the core's first iteration runs at half the length."""
    model = dataclasses.replace(MODEL, remat="keep_inputs")
    config = RunConfig(model=model, train=TRAIN)
    tokens, d = 16 * 16, 64
    layers = 24 * d**2 * (2 * tokens + 2 * tokens // 2 + 2 * tokens + 2 * tokens)
    head = 2 * 64 * d * tokens
    found = costs.flops(config)
    assert found.dense == 3 * (layers + head)
    # QKV and the MLP's first product once more.
    assert found.dense_executed == pytest.approx((3 + 7 / 12) * layers + 3 * head, rel=1e-12)
    assert found.attention == 3 * 4 * d * 16 * (2 * 16**2 + 2 * 8**2 + 2 * 16**2 + 2 * 16**2)
    kept = costs.flops(RunConfig(model=dataclasses.replace(model, remat="keep_all"), train=TRAIN))
    assert kept.dense_executed == found.dense


@pytest.mark.parametrize(
    "remat, topology",
    [
        slow("keep_inputs", "anchor"),
        slow("keep_inputs", "injection"),
        slow("keep_all", "anchor"),
        slow("keep_all", "injection"),
    ],
)
def test_matrix_work_is_that_of_the_closed_form(remat, topology, compiled):
    """Executed, on one device; the small rest is routers, scorers and what XLA on the CPU does of attention."""
    config = config_of((1, 1, 1), model=dict(remat=remat, d_model=128, topology=topology))
    form = costs.flops(config)
    attention = form.attention * (2 + costs.FORWARD_ATTENTION[remat]) / 3
    assert work.dense_flops(compiled(config)) == pytest.approx(form.dense_executed + attention, rel=0.01)
