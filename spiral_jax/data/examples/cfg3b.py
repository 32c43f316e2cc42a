"""Strings of cfg3b, a grammar of six levels (Allen-Zhu and Li, Physics of Language Models, part 1, arXiv 2305.13673).

Symbols are numbered as there: 22 is the root, 1 to 3 are the terminals, and a symbol takes each of its rules as often.
"""

from collections.abc import Sequence

import numpy as np

from spiral_jax.data.examples.grammar import Grammar
from spiral_jax.data.examples.source import Example, ExampleSource, example_sources
from spiral_jax.data.tokenizers import END_OF_TEXT

RULES = {
    22: ((21, 20), (20, 19)),
    21: ((18, 16), (16, 18, 17)),
    20: ((17, 16, 18), (16, 17)),
    19: ((16, 17, 18), (17, 18, 16)),
    18: ((15, 14, 13), (14, 13)),
    17: ((14, 13, 15), (15, 13, 14)),
    16: ((15, 13), (13, 15, 14)),
    15: ((12, 11, 10), (11, 12, 10)),
    14: ((11, 10, 12), (10, 11, 12)),
    13: ((11, 12), (12, 11)),
    12: ((8, 9, 7), (9, 7, 8)),
    11: ((8, 7, 9), (7, 8, 9)),
    10: ((7, 9, 8), (9, 8, 7)),
    9: ((3, 2, 1), (2, 1)),
    8: ((3, 2), (3, 1, 2)),
    7: ((3, 1), (1, 2, 3)),
}
_SEPARATOR = 0


@example_sources.register("cfg3b")
class Cfg3b(ExampleSource):
    """Windows of strings with a separator before each, the last one cut off; every next token counts alike.

    A target's group is the level of the highest symbol that begins with it: 6 for the root, 0 for a terminal in the
    middle of the lowest symbols; a separator's is 7.
    """

    symbols = (END_OF_TEXT, "1", "2", "3")
    grammar = Grammar(RULES)

    def example(self, index: int, rng: np.random.Generator, length: int) -> Example:
        ids: list[int] = [_SEPARATOR]
        groups: list[int] = [self.grammar.levels[self.grammar.root] + 1]
        while len(ids) <= length:
            string, begins = self.grammar.sample(rng)
            ids += [*string, _SEPARATOR]
            groups += [*begins, groups[0]]
        window_W = np.array(ids[: length + 1])
        return Example(window_W[:-1], window_W[1:], np.ones(length), np.array(groups[1 : length + 1]))

    def nats(self, targets: Sequence[int]) -> float:
        """-log of the probability of a window's targets: what a model that knows the grammar loses on them."""
        total, string = 0.0, list[int]()
        for target in targets:
            if target == _SEPARATOR:
                total += self.grammar.string_nats(string)
                string = []
            else:
                string.append(int(target))
        return total + self.grammar.prefix_nats(string)
