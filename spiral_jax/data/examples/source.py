"""Sequences that bring their own targets and weights: what a source of them is, and the names it can have."""

import abc
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tokenizers

from spiral_jax.data.config import DataConfig
from spiral_jax.data.tokenizers import END_OF_TEXT, HuggingFaceTokenizer, Tokenizer
from spiral_jax.registry import Registry

# More than any run takes, and what the shuffle of windows can count.
ENDLESS = 2**31


class Example(NamedTuple):
    """One sequence: at every position a token is read and another one may be asked for.

    Attributes:
      tokens_L: what the model reads, ids.
      targets_L: what it is to answer at each position after reading it, ids; any where the weight is 0.
      weights_L: how much each answer counts, 0 or more and not all 0.
      groups_L: what evaluation counts answers by, such as the depth of what they depend on.
    """

    tokens_L: np.ndarray
    targets_L: np.ndarray
    weights_L: np.ndarray
    groups_L: np.ndarray


class ExampleSource(abc.ABC):
    """A task or data set of `Example`s, by number; registered under a name for `data.examples`.

    Attributes:
      symbols: the text of every id, `<|endoftext|>` among them; not needed where `tokenizer` is replaced.
      num_examples: how many there are to train on. An epoch takes each once, in an order of its own.
    """

    symbols: tuple[str, ...] = (END_OF_TEXT,)
    num_examples: int = ENDLESS

    @abc.abstractmethod
    def example(self, index: int, rng: np.random.Generator, length: int) -> Example:
        """One example to train on, the same whenever it is asked for. Called by several threads at a time.

        Args:
          index: 0 to `num_examples` - 1.
          rng: begins with the same numbers for the same seed of the run and the same index.
          length: L, `train.sequence_length`.
        """

    def held_out(self, index: int, rng: np.random.Generator, length: int) -> Example:
        """One example to evaluate on, as `example`, with numbers that training never gets and that no seed changes.

        Any index from 0 on. A source that makes its examples of `index` alone, as a data set does, has to replace this.
        """
        return self.example(index, rng, length)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """What the ids mean, for people and for the commands that take text."""
        return tokenizer_of_symbols(self.symbols)


example_sources: Registry[type[ExampleSource]] = Registry("data.examples", ExampleSource)


def check_examples(config: DataConfig) -> None:
    """Raises SpiralError if `data.examples` names nothing that is registered."""
    if config.examples:
        example_sources.check(config.examples)


def tokenizer_of_symbols(symbols: Sequence[str]) -> Tokenizer:
    """A tokenizer of texts that are symbols with spaces between them; id i is the i-th."""
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({symbol: i for i, symbol in enumerate(symbols)}, unk_token=END_OF_TEXT)
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return HuggingFaceTokenizer(words.to_str(), separator=END_OF_TEXT, name="the symbols")
