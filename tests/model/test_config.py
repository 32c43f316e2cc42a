"""What `ModelConfig` resolves, and what it refuses in one line that names the field."""

import dataclasses

import pytest

from spiral_jax.errors import SpiralError
from spiral_jax.model.config import Level, ModelConfig

REFUSED = [
    ("vocab_size", dict(vocab_size=0)),
    ("vocab_size", dict(vocab_size=-3)),
    ("d_model", dict(d_model=0)),
    ("num_heads", dict(num_heads=0)),
    ("num_heads", dict(num_heads=5)),
    ("prelude_layers", dict(prelude_layers=-1)),
    ("core_layers", dict(core_layers=-1)),
    ("coda_layers", dict(coda_layers=-1)),
    ("chunks", dict(chunks=(4, 0, 1))),
    ("chunks", dict(chunks=(-2,))),
    ("offsets", dict(offsets=(0, 0, 0))),
    ("offsets", dict(chunks=(), offsets=(0,))),
    ("offsets", dict(chunks=(4, 2), offsets=(4, 0))),
    ("offsets", dict(chunks=(4, 2), offsets=(0, -1))),
    ("offsets", dict(chunks=(1,), offsets=(1,))),
    ("shifts", dict(shifts=(7, 3, 1))),
    ("shifts", dict(chunks=(), shifts=(0,))),
    ("shifts", dict(chunks=(8, 4), shifts=(7, 2))),
    ("shifts", dict(chunks=(2,), shifts=(-1,))),
    ("shifts", dict(chunks=(1,), shifts=(1,))),
    ("topology", dict(topology="ring")),
    ("memory_slots", dict(memory_slots=0)),
    ("memory_slots", dict(memory_slots=-1)),
    ("pooling", dict(pooling="max")),
    ("allocation", dict(allocation="fixed")),
    ("update_scale", dict(update_scale="g")),
    ("rotary_fraction", dict(rotary_fraction=-0.1)),
    ("rotary_fraction", dict(rotary_fraction=1.5)),
    ("rotary_fraction", dict(rotary_fraction=float("nan"))),
    ("rotary_fraction", dict(d_model=36, num_heads=3)),  # int(12 / 4) = 3 dimensions, odd
    ("rotary_base", dict(rotary_base=0.0)),
    ("layer_norm_epsilon", dict(layer_norm_epsilon=-1e-5)),
    ("layer_norm_epsilon", dict(layer_norm_epsilon=0.0)),
    ("dtype", dict(dtype="float16")),
    ("remat", dict(remat="some")),
    ("scan_iterations_from", dict(scan_iterations_from=1)),
]


@pytest.mark.parametrize("field, fields", REFUSED, ids=[str(fields) for _, fields in REFUSED])
def test_refused(field, fields):
    with pytest.raises(SpiralError, match=rf"model\.{field}\b") as error:
        ModelConfig(**fields)
    assert "\n" not in str(error.value)
    given = fields.get(field)
    if isinstance(given, (str, int, float)):
        assert str(given) in str(error.value), "the message says what was found"


def test_every_field_that_can_be_wrong_is_refused_somewhere():
    free = {"shared_core", "unroll"}  # any bool will do
    assert {field for field, _ in REFUSED} | free == {field.name for field in dataclasses.fields(ModelConfig)}


def test_defaults_of_a_schedule():
    config = ModelConfig(chunks=(8, 5, 1))
    assert config.schedule == (Level(8, 4, 7), Level(5, 2, 4), Level(1, 0, 0))
    assert config.num_slots == 6
    assert ModelConfig(chunks=(4,), offsets=(0,), shifts=(9,)).schedule == (Level(4, 0, 9),)


def test_runs_join_neighbours_with_equal_chunk_offset_and_shift_only():
    config = ModelConfig(chunks=(4, 4, 4, 2, 2, 4, 1, 1), offsets=(2, 2, 0, 1, 1, 0, 0, 0),
                         shifts=(3, 3, 3, 1, 2, 3, 0, 0))  # fmt: skip
    assert config.runs == (
        (Level(4, 2, 3), 2),
        (Level(4, 0, 3), 1),
        (Level(2, 1, 1), 1),
        (Level(2, 1, 2), 1),
        (Level(4, 0, 3), 1),
        (Level(1, 0, 0), 2),
    )
    assert ModelConfig(chunks=()).runs == ()


@pytest.mark.parametrize("chunk", [1, 2, 3, 8])
def test_number_of_chunks_is_the_number_that_close(chunk):
    for offset in range(chunk):
        level = Level(chunk, offset, chunk - 1)
        for length in range(1, 4 * chunk):
            closed = sum((i + offset) % chunk == chunk - 1 for i in range(length))
            assert level.num_chunks(length) == closed


def test_notation():
    spiral = dict(prelude_layers=4, core_layers=8, coda_layers=4)
    assert ModelConfig(**spiral).notation == "4+8x{1/8,1/4,1/2,1}+4"
    assert ModelConfig(**spiral, chunks=(1, 1)).notation == "4+8x{1,1}+4"
    assert ModelConfig(**spiral, chunks=(1, 1), shared_core=False).notation == "4+8+8+4"


def test_layer_counts():
    config = ModelConfig(prelude_layers=2, core_layers=4, coda_layers=3, chunks=(4, 2, 1))
    assert (config.stored_layers, config.unrolled_layers) == (9, 17)
    assert dataclasses.replace(config, shared_core=False).stored_layers == 17
    assert dataclasses.replace(config, chunks=()).stored_layers == 5
