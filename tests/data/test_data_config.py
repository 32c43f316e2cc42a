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
        ("invalid_utf8", "ignore"),
        ("tokenizer", ""),
        ("tokenizer", None),
        ("bpe_vocab_size", 256),
        ("bpe_vocab_size", 4096.0),
        ("store", None),
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
    assert message.startswith(f"data.{field}: ") and repr(value) in message and "allowed" in message
    assert "\n" not in message
