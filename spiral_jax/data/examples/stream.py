"""A run's examples: from the seed and a number to arrays that are what they should be."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from spiral_jax.data.examples.source import ENDLESS, Example, ExampleSource, example_sources
from spiral_jax.errors import SpiralError, guarded, require

_TRAINING, _HELD_OUT = 0, 1
_FINGERPRINTED = 8


class Examples(NamedTuple):
    """A batch with targets and weights of its own, on the host or on devices, or its shapes.

    Attributes:
      tokens_BxL: int32, what the model reads.
      targets_BxL: int32, what it is to answer at each position.
      weights_BxL: float32, how much each answer counts.
    """

    tokens_BxL: Any
    targets_BxL: Any
    weights_BxL: Any


class ExampleStream:
    """The examples of one source for one seed and length.

    Attributes:
      name: what to call it in messages.
      source: where they come from.
      fingerprint: of the first examples of seed 0: changes when the source's code does, or NumPy's random numbers.
    """

    def __init__(self, name: str, *, seed: int, length: int, vocab_size: int):
        """Makes the first examples.

        Args:
          name: `data.examples`.
          seed: the run's.
          length: L.
          vocab_size: ids the model has an embedding for.

        Raises:
          SpiralError: a source that cannot be made, whose examples are not what they should be, or which holds out the
            ones that it trains on.
        """
        self.name = f"data.examples {name!r}"
        self._code = example_sources.code(name)
        self._seed, self._length, self._vocab_size = seed, length, vocab_size
        with guarded(self.name, self._code.file):
            self.source: ExampleSource = example_sources[name]()
            tokenizer, count = self.source.tokenizer, self.source.num_examples
        require(1 <= count <= ENDLESS, f"{self.name}: num_examples", count, f"1 to {ENDLESS}")
        found = hashlib.sha256(f"{count} {tokenizer.fingerprint}".encode())
        first = min(_FINGERPRINTED, count)
        training = stacked([self._example([_TRAINING, 0], index) for index in range(first)])
        for array in training:
            found.update(array.tobytes())
        self.fingerprint = found.hexdigest()
        if all(map(np.array_equal, training, stacked(self.held_out(range(first))))):
            raise SpiralError(f"{self.name}: held_out gives the examples that are trained on; allowed: others")

    def __call__(self, source_B: np.ndarray, index_B: np.ndarray) -> Examples:
        """Returns examples to train on, by their numbers; they are of one source."""
        return stacked([self._example([_TRAINING, self._seed], int(index)) for index in index_B])

    def held_out(self, indices: Iterable[int]) -> list[Example]:
        """Returns examples to evaluate on, by their numbers: the same for every seed, so that runs can be paired."""
        return [self._example([_HELD_OUT], index) for index in indices]

    def _example(self, stream: list[int], index: int) -> Example:
        rng = np.random.default_rng([*stream, index])
        make = self.source.held_out if stream == [_HELD_OUT] else self.source.example
        where = f"{self.name}: example {index}"
        with guarded(where, self._code.file), np.errstate(over="ignore"):
            example = Example(*map(np.asarray, make(index, rng, self._length)))
            example = example._replace(
                weights_L=example.weights_L.astype(np.float32), groups_L=example.groups_L.astype(np.int32)
            )
        return self._checked(where, example)

    def _checked(self, where: str, example: Example) -> Example:
        """The example in the types that devices take, if it is what it should be."""
        for field, array in example._asdict().items():
            if array.shape != (self._length,):
                raise SpiralError(f"{where}: {field} has shape {array.shape}; allowed: ({self._length},)")
        for field in ("tokens_L", "targets_L"):
            ids_L, allowed = getattr(example, field), f"integers, 0 to {self._vocab_size - 1} (model.vocab_size - 1)"
            if ids_L.dtype.kind not in "iu":
                raise SpiralError(f"{where}: {field} is of type {ids_L.dtype}; allowed: {allowed}")
            wrong = (ids_L < 0) | (ids_L >= self._vocab_size)
            if wrong.any():
                raise SpiralError(f"{where}: {field} is id {ids_L[wrong][0]}; allowed: {allowed}")
        weights_L = example.weights_L
        if not (np.isfinite(weights_L).all() and (weights_L >= 0).all() and weights_L.any()):
            found = f"{weights_L.min()} to {weights_L.max()}"
            raise SpiralError(f"{where}: weights_L is {found}; allowed: numbers of 0 or more, not all 0")
        return example._replace(
            tokens_L=example.tokens_L.astype(np.int32), targets_L=example.targets_L.astype(np.int32)
        )


def stacked(examples: Sequence[Example]) -> Examples:
    """Examples as one batch, without their groups."""
    return Examples(*(np.stack(arrays) for arrays in list(zip(*examples, strict=True))[:3]))
