"""ListOps (Nangia and Bowman, arXiv 1804.06028): nested operations on digits, every value of which is asked for.

A window is full of expressions such as `[MAX 2 9 [MIN 4 7 ] 0 ]` with a separator before each. At every closing bracket
the model answers with the value of what the bracket closes; nothing else is asked, and no value stands in the sequence.
The depth of an expression is 1, or one more than that of its deepest operand.
"""

from typing import NamedTuple

import numpy as np

from spiral_jax.data.examples.source import Example, ExampleSource, example_sources
from spiral_jax.data.tokenizers import END_OF_TEXT
from spiral_jax.errors import SpiralError

OPERATIONS = ("[MIN", "[MAX", "[MED", "[SM")
_SEPARATOR, _FIRST_DIGIT, _FIRST_OPERATION = 0, 1, 11
_CLOSE = _FIRST_OPERATION + len(OPERATIONS)
_MOST_TRIES = 1000


class Closing(NamedTuple):
    """A closing bracket: where it is, the value of what it closes, and the depth of that."""

    place: int
    value: int
    depth: int


@example_sources.register("listops")
class ListOps(ExampleSource):
    """Expressions whose depth is drawn first, each as often: up to `train_depth`, when evaluated up to `test_depth`.

    One operand has just the depth below; each other one is a digit, or with `nesting` an expression of any depth below.
    An expression that does not fit what is left of the window is not begun: the rest is separators that ask nothing.

    Attributes:
      train_depth, test_depth: see above.
      operands: the fewest and the most of an operation.
      nesting: see above.
    """

    symbols = (END_OF_TEXT, *map(str, range(10)), *OPERATIONS, "]")
    train_depth, test_depth = 5, 8
    operands = (2, 4)
    nesting = 0.2

    def example(self, index: int, rng: np.random.Generator, length: int) -> Example:
        return self._window(rng, length, self.train_depth)

    def held_out(self, index: int, rng: np.random.Generator, length: int) -> Example:
        return self._window(rng, length, self.test_depth)

    def _window(self, rng: np.random.Generator, length: int, deepest: int) -> Example:
        tokens_L, targets_L, groups_L = np.full((3, length), _SEPARATOR)
        weights_L = np.zeros(length)
        start = 1  # after a separator
        while True:
            tokens, closings = self._fitting(rng, length, deepest, whole=start == 1)
            if start + len(tokens) > length:
                return Example(tokens_L, targets_L, weights_L, groups_L)
            tokens_L[start : start + len(tokens)] = tokens
            for place, value, depth in closings:
                targets_L[start + place], groups_L[start + place] = _FIRST_DIGIT + value, depth
                weights_L[start + place] = 1
            start += len(tokens) + 1

    def _fitting(
        self, rng: np.random.Generator, length: int, deepest: int, *, whole: bool
    ) -> tuple[list[int], list[Closing]]:
        """An expression's tokens and closing brackets; with `whole` one that fits the window."""
        for _ in range(_MOST_TRIES):
            tokens: list[int] = []
            closings: list[Closing] = []
            self._write(rng, int(rng.integers(1, deepest + 1)), tokens, closings)
            if not whole or len(tokens) < length:
                return tokens, closings
        raise SpiralError(f"train.sequence_length is {length}; allowed: longer, as hardly any of listops fits that")

    def _write(self, rng: np.random.Generator, depth: int, tokens: list[int], closings: list[Closing]) -> int:
        """Appends an expression of just this depth; returns its value."""
        operation = int(rng.integers(len(OPERATIONS)))
        count = int(rng.integers(self.operands[0], self.operands[1] + 1))
        deep = int(rng.integers(count))
        tokens.append(_FIRST_OPERATION + operation)
        values = []
        for place in range(count):
            if depth > 1 and (place == deep or rng.random() < self.nesting):
                below = depth - 1 if place == deep else int(rng.integers(1, depth))
                values.append(self._write(rng, below, tokens, closings))
            else:
                values.append(int(rng.integers(10)))
                tokens.append(_FIRST_DIGIT + values[-1])
        value = value_of(OPERATIONS[operation], values)
        closings.append(Closing(len(tokens), value, depth))
        tokens.append(_CLOSE)
        return value


def value_of(operation: str, operands: list[int]) -> int:
    """The least, the greatest, the median rounded down, or the sum modulo 10."""
    match operation:
        case "[MIN":
            return min(operands)
        case "[MAX":
            return max(operands)
        case "[MED":
            ordered, middle = sorted(operands), len(operands) // 2
            return ordered[middle] if len(operands) % 2 else (ordered[middle - 1] + ordered[middle]) // 2
    return sum(operands) % 10
