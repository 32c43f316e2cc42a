"""The roofline, against times worked out by hand from published numbers."""

import dataclasses
import itertools

import pytest

from spiral_jax.hardware import parse_slice
from spiral_jax.roofline.matmul import Matmul
from spiral_jax.roofline.predict import (
    FITTED,
    Constants,
    Cost,
    Place,
    compact,
    constants_of,
    cost,
    read,
    total,
    written,
)
from spiral_jax.roofline.work import Collective, Kernel, Operation

PEAK = Constants(
    mxu_efficiency=1, score_operations=0, hbm_efficiency=1, ici_efficiency=1, hidden_share=0
)  # fmt: skip

USUAL = FITTED["v5p"]


def predict(operations, chips, places, constants=None):
    return total([cost(operation, chips, places) for operation in operations], constants or constants_of(chips))


def places(text: str, num_slices: int = 1) -> list[Place]:
    """Of the devices of a slice, one a chip, in the order of their coordinates."""
    axes = [range(size) for size in parse_slice(text).shape]
    return [Place(index, coords) for index in range(num_slices) for coords in itertools.product(*axes)]


def seconds(operation: Operation, text: str = "v5p:4x4x4", constants: Constants = PEAK, num_slices: int = 1) -> float:
    return predict([operation], parse_slice(text), places(text, num_slices), constants).step_seconds


def collective(kind: str, size: float, *groups: tuple[int, ...]) -> Operation:
    return Operation("", "", 1, collective=Collective(kind, size, groups, "bf16"))


def matmul(m: int, n: int, k: int, **others) -> Operation:
    return Operation("", "", 1, matmuls=(Matmul(m, n, k, 1, 1),), **others)


def test_a_product_at_the_peak():
    # 2 x 4096^3 FLOP at 459e12 FLOP/s.
    assert seconds(matmul(4096, 4096, 4096)) == pytest.approx(299.4e-6, rel=1e-3)
    # Half of a chip of 2307e12.
    assert seconds(matmul(4096, 4096, 4096), "tpu7x:4x4x4") == pytest.approx(119.1e-6, rel=1e-3)


def test_products_are_padded_to_the_matrix_unit():
    assert seconds(matmul(4096, 4096, 64)) == seconds(matmul(4096, 4096, 128))
    assert seconds(matmul(4096, 130, 128)) == seconds(matmul(4096, 256, 128))
    # 256 wide from v6e on.
    assert seconds(matmul(4096, 4096, 64), "v6e:2x2") == seconds(matmul(4096, 4096, 256), "v6e:2x2")


def test_batches_and_passes_multiply():
    once = Operation("", "", 1, matmuls=(Matmul(256, 256, 256, 1, 1),))
    more = Operation("", "", 7, matmuls=(Matmul(256, 256, 256, 5, 6), Matmul(256, 256, 256, 1, 1)))
    assert seconds(more) == pytest.approx(7 * (5 * 6 + 1) * seconds(once))


def test_memory_at_the_peak():
    # 1 GB at 2765 and at 819 GB/s.
    assert seconds(Operation("", "", 3, hbm_bytes=1e9)) == pytest.approx(3 * 361.7e-6, rel=1e-3)
    assert seconds(Operation("", "", 3, hbm_bytes=1e9), "v5e:4x4") == pytest.approx(3 * 1221e-6, rel=1e-3)


def test_an_operation_takes_the_longer_of_arithmetic_and_memory():
    arithmetic, memory = seconds(matmul(4096, 4096, 4096)), seconds(Operation("", "", 1, hbm_bytes=1e9))
    assert seconds(matmul(4096, 4096, 4096, hbm_bytes=1e9)) == memory > arithmetic
    assert seconds(matmul(4096, 4096, 4096, hbm_bytes=1e6)) == arithmetic
    # But two operations one after the other.
    both = [matmul(4096, 4096, 4096), Operation("", "", 1, hbm_bytes=1e9)]
    found = predict(both, parse_slice("v5p-8"), places("v5p:2x2x1"), PEAK)
    assert found.step_seconds == pytest.approx(arithmetic + memory)
    assert (found.alone["compute"], found.alone["hbm"]) == pytest.approx((arithmetic, memory))
    assert found.bound == "hbm" and found.limits["compute"] == pytest.approx(arithmetic)


@pytest.mark.parametrize(("kind", "products"), [("fwd", 2), ("dq", 3), ("dkv", 4)])
def test_kernels(kind, products):
    """Blocks of 1024 by 1024, 10 of 16 of them not above the diagonal; heads of 64 cost what 128 do."""
    flops = 2 * (8 * 12) * 10 * 1024**2 * 128 * products
    for width in (64, 128):
        operation = Operation("", "", 1, kernel=Kernel(kind, 8 * 12, 4096, width, "bf16"))
        assert seconds(operation) == pytest.approx(flops / 459e12)
    # One block: all scores. Float32 takes six passes, in blocks of 512.
    operation = Operation("", "", 1, kernel=Kernel(kind, 96, 512, 128, "bf16"))
    assert seconds(operation) == pytest.approx(2 * 96 * 512**2 * 128 * products / 459e12)
    operation = Operation("", "", 1, kernel=Kernel(kind, 96, 1024, 128, "f32"))
    assert seconds(operation) == pytest.approx(6 * 2 * 96 * 3 * 512**2 * 128 * products / 459e12)


@pytest.mark.parametrize(("text", "rate"), [("v5p:2x2x1", 2 * 1.75e9), ("v5e:1x1", 1.5e9), ("v6e:1x1", 1.75e9)])
def test_a_kernel_takes_as_long_as_its_products_or_its_softmax(text, rate):
    """One operation for each of the scores, 1,024 a cycle of every TensorCore; narrow heads leave products time."""
    chips = parse_slice(text)
    operation = Operation("", "", 1, kernel=Kernel("fwd", 96, 512, 64, "bf16"))
    softmax = 96 * 512**2 / (1024 * rate)
    assert cost(operation, chips, places(text)).vector == pytest.approx(softmax, rel=2e-3)
    slow = dataclasses.replace(PEAK, score_operations=100)
    assert seconds(operation, text, slow) == pytest.approx(100 * softmax, rel=2e-3)
    few = dataclasses.replace(PEAK, score_operations=0.01)
    assert seconds(operation, text, few) == seconds(operation, text) > softmax / 100
    # Blocks of others: 36 of 64 where 10 of 16 are ours.
    long = Operation("", "", 1, kernel=Kernel("fwd", 96, 4096, 128, "bf16"))
    ours, theirs = (cost(long, chips, places(text), block).vector for block in (None, 512))
    assert theirs / ours == pytest.approx(36 / 64 / (10 / 16))


def test_compact_costs_have_the_same_total():
    costs = [
        Cost(3, 1, 2, 1, vector=1),
        Cost(2, 1, 0, 9),
        Cost(5, 0, 0, 2, 3, 1),
        Cost(7, 0, 0, 1),
        Cost(1, 0, 4, 0, vector=9),
        Cost(2, 1, 0, 9),
        Cost(2, 1, 0, 1),
    ]
    fewer = compact(costs)
    assert len(fewer) == 5 and Cost(4, 1, 0, 9) in fewer
    for mxu, hbm, operations in ((0.3, 1.0, 0.1), (0.9, 0.3, 1.0), (1.0, 1.0, 3.0)):
        constants = Constants(mxu, operations, hbm, 0.8, 0.1)
        full, short = total(costs, constants), total(fewer, constants)
        assert short.step_seconds == pytest.approx(full.step_seconds)
        assert short.limits == pytest.approx(full.limits)
    assert read(written(fewer)) == fewer


ALL = tuple(range(64))
LINE = (0, 1, 2, 3)  # along the last axis
PLANE = tuple(range(16))


def test_gathering_over_rings():
    """1 GB in the end: what one device lacks comes over both links of every axis that the group spans."""
    assert seconds(collective("all-gather", 1e9, ALL)) == pytest.approx(63 / 64 * 1e9 / 6e11)
    assert seconds(collective("all-gather", 1e9, PLANE)) == pytest.approx(15 / 16 * 1e9 / 4e11)
    assert seconds(collective("all-gather", 1e9, LINE)) == pytest.approx(3 / 4 * 1e9 / 2e11)
    # Half an axis is a line of one link.
    assert seconds(collective("all-gather", 1e9, (0, 1))) == pytest.approx(1 / 2 * 1e9 / 1e11)
    # Two links at the corner of 2x2x1.
    assert seconds(collective("all-gather", 1e9, (0, 1, 2, 3)), "v5p:2x2x1") == pytest.approx(3 / 4 * 1e9 / 2e11)


def test_other_collectives():
    gather = seconds(collective("all-gather", 1e9, LINE))
    assert seconds(collective("reduce-scatter", 1e9, LINE)) == gather
    assert seconds(collective("all-reduce", 1e9, LINE)) == pytest.approx(2 * gather)
    # Each of 4 sends 0.25 GB to both neighbors, and half of the last 0.25 GB each way round, over two links.
    assert seconds(collective("all-to-all", 1e9, LINE)) == pytest.approx((0.25 + 2 * 0.125) * 1e9 / 1e11)
    # Half of 1 GB over the one link between two.
    assert seconds(collective("all-to-all", 1e9, (0, 1))) == pytest.approx(0.5e9 / 1e11)
    # To the neighbor, round the ring too; and two hops.
    assert seconds(collective("collective-permute", 1e9, (0, 1), (3, 0))) == pytest.approx(1e9 / 1e11)
    assert seconds(collective("collective-permute", 1e9, (0, 2))) == pytest.approx(2e9 / 1e11)


def test_between_slices():
    """Each device's share goes over the data-center network, 6.25 GB/s a chip; the rest over links."""
    both = (*range(64), *range(64, 128))
    found = predict([collective("all-reduce", 1e9, both)], parse_slice("v5p-128"), places("v5p:4x4x4", 2), PEAK)
    assert found.alone["ici"] == pytest.approx(2 * 63 / 64 * 1e9 / 6e11)
    assert found.alone["dcn"] == pytest.approx(2 * 1 / 2 * 1e9 / 64 / 6.25e9)
    # A replica in each slice: nothing to share.
    found = predict([collective("all-reduce", 1e9, (5, 69))], parse_slice("v5p-128"), places("v5p:4x4x4", 2), PEAK)
    assert (found.alone["ici"], found.alone["dcn"]) == (0, pytest.approx(1e9 / 6.25e9))
    assert found.bound == "dcn"
    assert seconds(collective("dcn", 1e9, (0, 1))) == pytest.approx(1e9 / 6.25e9)
    assert seconds(collective("collective-permute", 1e9, (0, 64)), num_slices=2) == pytest.approx(1e9 / 6.25e9)


def test_two_devices_of_a_chip_share_its_links():
    chips = parse_slice("tpu7x:2x2x1")
    where = [Place(0, (x, y, 0)) for x in range(2) for y in range(2) for _ in range(2)]
    gather = collective("all-gather", 1e9, tuple(range(8)))
    assert cost(gather, chips, where).ici == pytest.approx(7 / 8 * 1e9 / (2e11 / 2))
    assert cost(collective("all-gather", 1e9, (0, 1)), chips, where).ici == pytest.approx(1 / 2 * 1e9 / 6e11)


def test_communication_hides_behind_a_share_of_the_work():
    constants = dataclasses.replace(PEAK, hidden_share=0.5)
    work = Cost(10, matmul=1.0)
    assert total([work, Cost(1, ici=4.0)], constants).step_seconds == 10
    found = total([work, Cost(2, ici=4.0), Cost(1, dcn=1.0)], constants)
    assert found.step_seconds == 10 + (8 + 1 - 5)
    assert found.limits == pytest.approx({"compute": 10, "attention": 0, "hbm": 0, "ici": 4 * 8 / 9, "dcn": 4 / 9})


def test_limits_are_the_step():
    costs = [Cost(3, 1, 2, 2), Cost(1, 1, 0, 9), Cost(2, 0, 0, 0, 5, 1), Cost(1, 0, 7, 1)]
    found = total(costs, USUAL)
    assert sum(found.limits.values()) == pytest.approx(found.step_seconds)


@pytest.mark.parametrize(
    "name, factor",
    [("mxu_efficiency", 1.1), ("score_operations", 0.9), ("hbm_efficiency", 1.1), ("ici_efficiency", 1.1)],
)
def test_more_efficient_is_faster(name, factor):
    costs = [Cost(3, 1, 2, 1, vector=1), Cost(1, 1, 0, 9), Cost(2, 0, 0, 0, 50, 1)]
    better = dataclasses.replace(USUAL, **{name: getattr(USUAL, name) * factor})
    assert total(costs, better).step_seconds < total(costs, USUAL).step_seconds


@pytest.mark.parametrize("field", range(1, len(Cost._fields)))
def test_more_work_is_not_faster(field):
    base = [Cost(1, 2, 1, 1, 1, 1, 1)]
    previous = 0.0
    for factor in (0.5, 1, 2, 100):
        one = list(base[0])
        one[field] *= factor
        now = total([Cost(*one)], USUAL).step_seconds
        assert now >= previous
        previous = now
    assert previous > total(base, USUAL).step_seconds


def test_a_better_generation_is_faster():
    operations = [matmul(4096, 4096, 4096), Operation("", "", 1, hbm_bytes=1e9)]

    def on(text):
        return predict(operations, parse_slice(text), places(text)).step_seconds

    assert on("v5e:2x2") > on("v4:2x2x1") > on("v5p:2x2x1") > on("tpu7x:2x2x1")
