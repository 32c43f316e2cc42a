import numpy as np
import pytest

from spiral_jax.data.windows import TokenSource, num_windows, read_windows
from spiral_jax.errors import SpiralError


class Counting(TokenSource):
    """Token i is i."""

    name = "counting"

    def __init__(self, num_tokens):
        self.num_tokens = num_tokens

    def read_many(self, ranges):
        assert all(0 <= start <= stop <= self.num_tokens for start, stop in ranges)
        return [np.arange(start, stop, dtype=np.int32) for start, stop in ranges]


@pytest.mark.parametrize("sequence_length", [1, 2, 7, 16])
@pytest.mark.parametrize("num_tokens", [17, 18, 32, 33, 34])
def test_each_token_but_the_first_is_predicted_once(num_tokens, sequence_length):
    source = Counting(num_tokens)
    windows = read_windows(source, range(num_windows(source, sequence_length)), sequence_length)
    assert windows.shape[1:] == (sequence_length + 1,) and windows.dtype == np.int32
    targets = [int(token) for w in windows for token in w[1:]]
    rest = num_tokens - 1 - len(targets)
    assert targets == list(range(1, num_tokens - rest)) and 0 <= rest < sequence_length
    for w in windows:
        np.testing.assert_array_equal(w[1:], w[:-1] + 1)


def test_one_window_needs_one_token_more_than_it_predicts():
    assert num_windows(Counting(9), 8) == 1
    with pytest.raises(
        SpiralError, match=r"sequence_length is 8, which takes 9 tokens .* counting has 8; allowed: up to 7"
    ):
        num_windows(Counting(8), 8)


def test_sequence_length_has_to_be_positive():
    with pytest.raises(SpiralError, match=r"train\.sequence_length is 0; allowed: 1 or more"):
        num_windows(Counting(8), 0)


def test_sequences_that_are_just_a_window_are_taken_as_they_are():
    """The preshuffled Pile is sequences of 2049 tokens: at length 2048 each is a window."""
    source = Counting(6 * 9)
    source.sequence_tokens = 9
    assert num_windows(source, 8) == 6
    np.testing.assert_array_equal(read_windows(source, [0, 5], 8), [range(0, 9), range(45, 54)])
    assert num_windows(source, 9) == (54 - 1) // 9
    np.testing.assert_array_equal(read_windows(source, [1], 9), [range(9, 19)])
