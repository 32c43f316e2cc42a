import numpy as np
import pytest

from spiral_jax.data.windows import num_windows, window
from spiral_jax.errors import SpiralError


class Counting:
    """Token i is i."""

    name = "counting"

    def __init__(self, num_tokens):
        self.num_tokens = num_tokens

    def read(self, start, stop):
        assert 0 <= start <= stop <= self.num_tokens
        return np.arange(start, stop, dtype=np.int32)


@pytest.mark.parametrize("sequence_length", [1, 2, 7, 16])
@pytest.mark.parametrize("num_tokens", [17, 18, 32, 33, 34])
def test_each_token_but_the_first_is_predicted_once(num_tokens, sequence_length):
    source = Counting(num_tokens)
    windows = [window(source, i, sequence_length) for i in range(num_windows(source, sequence_length))]
    assert all(w.shape == (sequence_length + 1,) and w.dtype == np.int32 for w in windows)
    targets = [int(token) for w in windows for token in w[1:]]
    rest = num_tokens - 1 - len(targets)
    assert targets == list(range(1, num_tokens - rest)) and 0 <= rest < sequence_length
    for w in windows:
        np.testing.assert_array_equal(w[1:], w[:-1] + 1)


def test_one_window_needs_one_token_more_than_it_predicts():
    assert num_windows(Counting(9), 8) == 1
    with pytest.raises(SpiralError, match=r"train\.sequence_length: 8 needs 9 tokens .* counting has 8; .* at most 7"):
        num_windows(Counting(8), 8)


def test_sequence_length_has_to_be_positive():
    with pytest.raises(SpiralError, match=r"train\.sequence_length: found 0"):
        num_windows(Counting(8), 0)
