"""Probabilistic context-free grammars without recursion: strings, their probabilities, and what they cost at least."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

Rules = Mapping[int, Sequence[Sequence[int]]]


class Grammar:
    """Symbols and their rules, each of a symbol's as likely; what has no rules is a terminal.

    Attributes:
      root: what strings come from, the first symbol of the rules.
      levels: of a symbol 0 if it is a terminal, otherwise one more than the highest level in its rules.
    """

    def __init__(self, rules: Rules):
        self.rules = rules
        self.root = next(iter(rules))
        self.levels: dict[int, int] = {}
        self._level(self.root)

    def _level(self, symbol: int) -> int:
        if symbol not in self.levels:
            below = [self._level(part) for rule in self.rules.get(symbol, ()) for part in rule]
            self.levels[symbol] = 1 + max(below) if below else 0
        return self.levels[symbol]

    @property
    def terminals(self) -> list[int]:
        return sorted(symbol for symbol, level in self.levels.items() if level == 0)

    def sample(self, rng: np.random.Generator) -> tuple[list[int], list[int]]:
        """A string, and for each of its terminals the level of the highest symbol that begins with it."""
        string: list[int] = []
        begins: list[int] = []
        stack = [self.root]
        highest = 0  # of the symbols that begin where the string ends now
        while stack:
            symbol = stack.pop()
            if symbol in self.rules:
                highest = max(highest, self.levels[symbol])
                rules = self.rules[symbol]
                stack.extend(reversed(rules[int(rng.integers(len(rules)))]))
            else:
                string.append(symbol)
                begins.append(highest)
                highest = 0
        return string, begins

    def mean_length(self) -> float:
        """Terminals of a string on average, exactly."""
        return self._mean(self.root, terminal=1.0, choice=lambda count: 0.0)

    def tree_entropy(self) -> float:
        """Entropy of a string's derivation in nats, exactly: of the string itself where no string has two."""
        return self._mean(self.root, terminal=0.0, choice=math.log)

    def _mean(self, symbol: int, *, terminal: float, choice: Callable[[int], float]) -> float:
        @functools.cache
        def of(symbol: int) -> float:
            rules = self.rules.get(symbol)
            if rules is None:
                return terminal
            return choice(len(rules)) + sum(of(part) for rule in rules for part in rule) / len(rules)

        return of(symbol)

    def string_nats(self, string: Sequence[int]) -> float:
        """-log of the probability that a string of the grammar is this one: all derivations together.

        By the inside algorithm (Baker, 1979).
        """
        return _nats(self._inside(string)[self.root][0].get(len(string), 0.0))

    def prefix_nats(self, prefix: Sequence[int]) -> float:
        """-log of the probability that a string of the grammar begins with these terminals, or is them.

        The last of them is in one part of the rule that it comes from: parts before are whole, those after are free.
        """
        N = len(prefix)
        if N == 0:
            return 0.0
        inside = self._inside(prefix)
        # begun[symbol][i]: the probability that what comes of it begins with terminals i to N - 1 of the prefix.
        begun = {t: [0.0] * (N - 1) + [float(prefix[-1] == t), 0.0] for t in self.terminals}
        for symbol in self._upwards():
            begun[symbol] = [0.0] * (N + 1)
            for start in range(N):
                for rule in self.rules[symbol]:
                    ways = {start: 1 / len(self.rules[symbol])}
                    for part in rule:
                        begun[symbol][start] += sum(p * begun[part][middle] for middle, p in ways.items())
                        ways = _through(ways, inside[part])
        return _nats(begun[self.root][0])

    def _upwards(self) -> list[int]:
        """Symbols with rules, those before that others are made of."""
        return sorted(self.rules, key=self.levels.__getitem__)

    def _inside(self, string: Sequence[int]) -> dict[int, list[dict[int, float]]]:
        """For every symbol [start][stop]: the probability that it becomes that part of the string, where above 0."""
        N = len(string)
        inside = {t: [{start + 1: 1.0} if at == t else {} for start, at in enumerate(string)] for t in self.terminals}
        for terminal in inside:
            inside[terminal].append({})  # nothing starts at the end
        for symbol in self._upwards():
            inside[symbol] = [{} for _ in range(N + 1)]
            for start, stops in enumerate(inside[symbol]):
                for rule in self.rules[symbol]:
                    ways = {start: 1 / len(self.rules[symbol])}
                    for part in rule:
                        ways = _through(ways, inside[part])
                    for stop, p in ways.items():
                        stops[stop] = stops.get(stop, 0.0) + p
        return inside


def _through(ways: dict[int, float], spans: list[dict[int, float]]) -> dict[int, float]:
    """Ways to get somewhere, gone on by one part: from place to probability to the same."""
    further: dict[int, float] = {}
    for middle, p in ways.items():
        for stop, q in spans[middle].items():
            further[stop] = further.get(stop, 0.0) + p * q
    return further


def _nats(probability: float) -> float:
    return -math.log(probability) if probability > 0 else math.inf
