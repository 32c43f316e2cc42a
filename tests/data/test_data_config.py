import pytest

from spiral_jax.data.config import DataConfig
from spiral_jax.errors import SpiralError


def test_defaults_are_valid():
    assert DataConfig().tokenizer == "bytes"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("paths", "a.txt"),
        ("paths", ["a.txt"]),
        ("paths", ("",)),
        ("exclude", (1,)),
        ("validation_paths", None),
        ("validation_fraction", 1.0),
        ("validation_fraction", -0.1),
        ("validation_fraction", float("nan")),
        ("validation_fraction", True),
        ("validation_fraction", "0.1"),
        ("invalid", "ignore"),
        ("tokenizer", ""),
        ("tokenizer", None),
        ("bpe_vocab_size", 256),
        ("bpe_vocab_size", 4096.0),
        ("stores", "gs://bucket/store"),
        ("format", "csv"),
        ("text_field", ""),
        ("workers", -1),
        ("retry_seconds", -1.0),
        ("cache_gigabytes", 1.0),  # without a folder
        ("validation_store", None),
        ("stage_starts", (0, 10)),  # without weights
        ("separator", 0),
        ("separator", "</s>"),  # means nothing without a tokenizer.json
        ("read_threads", 0),
        ("prefetch_batches", 0),
        ("prefetch_batches", True),
    ],
)
def test_a_bad_value_names_the_field_the_value_and_what_is_allowed(field, value):
    with pytest.raises(SpiralError) as error:
        DataConfig(**{field: value})
    message = str(error.value)
    assert message.startswith(f"data.{field} is {value!r}; allowed: ")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("weights", "starts", "field", "found"),
    [
        (((1.0,),), (0,), "weights", (1.0,)),  # one weight, two stores
        (((1.0, -1.0),), (0,), "weights", (1.0, -1.0)),
        (((0.0, 0.0),), (0,), "weights", (0.0, 0.0)),
        (((1.0, float("nan")),), (0,), "weights", (1.0, float("nan"))),
        (((1.0, float("inf")),), (0,), "weights", (1.0, float("inf"))),
        (((1.0, 1.0),), (5,), "stage_starts", (5,)),
        (((1.0, 1.0), (1.0, 2.0)), (0,), "stage_starts", (0,)),
        (((1.0, 1.0), (1.0, 2.0)), (0, 0), "stage_starts", (0, 0)),
    ],
)
def test_a_bad_mixture_names_the_field(weights, starts, field, found):
    with pytest.raises(SpiralError) as error:
        DataConfig(stores=("a", "b"), weights=weights, stage_starts=starts)
    message = str(error.value)
    assert message.startswith(f"data.{field} is {found!r}; allowed: ") and "\n" not in message
