"""ListOps against a program of its own, cfg3b against enumeration and a parser, and streams of examples."""

import itertools
import math
import re
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from spiral_jax.data.examples import Cfg3b, Example, ExampleSource, ExampleStream, ListOps, example_sources
from spiral_jax.data.examples.grammar import Grammar
from spiral_jax.data.pipeline import WindowOrder, train_batches
from spiral_jax.errors import SpiralError
from spiral_jax.run.config import RunConfig

LENGTH = 96


def stream(name="listops", seed=3, length=LENGTH, vocab_size=16):
    return ExampleStream(name, seed=seed, length=length, vocab_size=vocab_size)


def reading(examples, steps, **options):
    order = WindowOrder([examples.source.num_examples], batch_size=8, seed=5)
    with train_batches(examples, order, **options) as batches:
        return list(itertools.islice(batches, steps))


# ListOps.


def closings_of(tokens: list[str]) -> dict[int, tuple[int, int]]:
    """Place of every closing bracket to the value and depth of what it closes, with a stack and NumPy."""
    functions = {
        "[MIN": np.min,
        "[MAX": np.max,
        "[SM": lambda values: np.sum(values) % 10,
        "[MED": lambda values: np.floor(np.median(values)),
    }
    found, stack = {}, [["", 0, []]]
    for place, token in enumerate(tokens):
        if token.startswith("["):
            stack.append([token, 0, []])
        elif token == "]":
            operation, below, operands = stack.pop()
            value = int(functions[operation](operands))
            found[place] = value, below + 1
            stack[-1][1] = max(stack[-1][1], below + 1)
            stack[-1][2].append(value)
        elif token.isdigit():
            stack[-1][2].append(int(token))
        else:
            assert token == "<|endoftext|>" and len(stack) == 1, "a separator inside an expression"
    assert len(stack) == 1, "an expression that is cut off"
    return found


def test_every_closing_bracket_asks_for_its_value_and_nothing_else_is_asked():
    symbols, depths = ListOps.symbols, {"train": set(), "held out": set()}
    examples = stream()
    batch = examples(np.zeros(60, int), np.arange(60))
    for tokens_L, targets_L, weights_L in zip(*batch, strict=True):
        expected = closings_of([symbols[i] for i in tokens_L])
        assert np.flatnonzero(weights_L).tolist() == list(expected) and set(weights_L) <= {0, 1}
        assert {p: symbols[targets_L[p]] for p in expected} == {p: str(value) for p, (value, _) in expected.items()}
        depths["train"] |= {depth for _, depth in expected.values()}
    for example in examples.held_out(range(60)):
        expected = closings_of([symbols[i] for i in example.tokens_L])
        assert {p: int(example.groups_L[p]) for p in expected} == {p: depth for p, (_, depth) in expected.items()}
        depths["held out"] |= {depth for _, depth in expected.values()}
    assert depths == {"train": set(range(1, 6)), "held out": set(range(1, 9))}


def test_held_out_examples_are_not_those_that_are_trained_on():
    examples = stream()
    trained = {row.tobytes() for row in examples(np.zeros(200, int), np.arange(200)).tokens_BxL}
    assert not trained & {example.tokens_L.tobytes() for example in examples.held_out(range(200))}


def test_a_window_too_short_for_listops_is_refused():
    with pytest.raises(SpiralError, match=r"^train\.sequence_length is 4; allowed: longer"):
        stream(length=4)


def test_text_of_symbols_is_read_and_shown():
    tokenizer = ListOps().tokenizer
    assert tokenizer.vocab_size == 16 and tokenizer.separator_id == 0
    ids = tokenizer.encode("[MAX 3 [MIN 9 1 ] ]")
    assert [ListOps.symbols[i] for i in ids] == ["[MAX", "3", "[MIN", "9", "1", "]", "]"]
    assert tokenizer.decode(ids) == "[MAX 3 [MIN 9 1 ] ]"


# Grammars.

# "1112" has two derivations, and "1" begins everything: 5 -> 4 3 | 3 4 | 1; 4 -> 1 | 1 1; 3 -> 1 2 | 1 1 2.
SMALL = Grammar({5: ((4, 3), (3, 4), (1,)), 4: ((1,), (1, 1)), 3: ((1, 2), (1, 1, 2))})


def strings_of(grammar: Grammar, symbol: int) -> dict[tuple[int, ...], float]:
    """Every string of a symbol and its probability, by writing all derivations out."""
    if symbol not in grammar.rules:
        return {(symbol,): 1.0}
    found: dict[tuple[int, ...], float] = {}
    for rule in grammar.rules[symbol]:
        for parts in itertools.product(*(strings_of(grammar, part).items() for part in rule)):
            string = tuple(itertools.chain(*(text for text, _ in parts)))
            p = math.prod(p for _, p in parts) / len(grammar.rules[symbol])
            found[string] = found.get(string, 0) + p
    return found


def test_probabilities_of_strings_and_prefixes_are_those_of_all_derivations():
    strings = strings_of(SMALL, 5)
    assert sum(strings.values()) == pytest.approx(1) and len(strings) == 8
    for length in range(1, 6):
        for text in itertools.product((1, 2), repeat=length):
            begun = sum(p for string, p in strings.items() if string[:length] == text)
            for nats, p in ((SMALL.string_nats(text), strings.get(text, 0)), (SMALL.prefix_nats(text), begun)):
                assert nats == (pytest.approx(-math.log(p)) if p else math.inf), text
    assert SMALL.mean_length() == pytest.approx(sum(p * len(string) for string, p in strings.items()))


def is_derived(string: list[int]) -> bool:
    """Whether cfg3b has a string: a table of what every span can be, in Chomsky normal form (CYK)."""
    rules, fresh = [], itertools.count(100)
    for symbol, options in Cfg3b.grammar.rules.items():
        for option in options:
            parts = list(option)
            while len(parts) > 2:
                rules.append((pair := next(fresh), *parts[-2:]))
                parts[-2:] = [pair]
            rules.append((symbol, *parts))
    N = len(string)
    ends: list[dict[int, set[int]]] = [{} for _ in range(N + 1)]  # of a start: symbol to where it can end
    for start in reversed(range(N)):
        ends[start][string[start]] = {start + 1}
        grew = True
        while grew:
            grew = False
            for symbol, left, right in rules:
                stops = {s for m in ends[start].get(left, ()) for s in ends[m].get(right, ())}
                if stops - ends[start].setdefault(symbol, set()):
                    ends[start][symbol] |= stops
                    grew = True
    return N in ends[0].get(22, ())


def test_cfg3b_has_the_published_shape():
    grammar = Cfg3b.grammar
    assert [sum(level == n for level in grammar.levels.values()) for n in range(7)] == [3, 3, 3, 3, 3, 3, 1]
    for rules in grammar.rules.values():
        assert len(rules) == 2 and {len(rule) for rule in rules} <= {2, 3}
        assert all(grammar.levels[part] == grammar.levels[symbol] - 1
                   for symbol, rules in grammar.rules.items() for rule in rules for part in rule)  # fmt: skip


def test_strings_of_cfg3b_parse_and_others_do_not():
    for seed in range(3):
        string, begins = Cfg3b.grammar.sample(np.random.default_rng(seed))
        assert is_derived(string) and Cfg3b.grammar.string_nats(string) < math.inf
        changed = [*string[:100], string[100] % 3 + 1, *string[101:]]
        assert is_derived(changed) == (Cfg3b.grammar.string_nats(changed) < math.inf)
        assert not is_derived(string[:-1]) and Cfg3b.grammar.string_nats(string[:-1]) == math.inf
        assert begins[0] == 6 and begins.count(6) == 1 and begins.count(5) == 1


def test_no_model_does_better_than_the_grammar_and_the_mean_is_its_entropy():
    """The mean over strings is the entropy of their derivations, as hardly any string has two."""
    rng = np.random.default_rng(0)
    nats = np.array([Cfg3b.grammar.string_nats(Cfg3b.grammar.sample(rng)[0]) for _ in range(60)])
    entropy = Cfg3b.grammar.tree_entropy()
    assert entropy == pytest.approx(117.315, abs=1e-3) and Cfg3b.grammar.mean_length() == 275.625
    assert abs(nats.mean() - entropy) < 4 * nats.std() / np.sqrt(len(nats))


def test_a_windows_nats_are_those_of_its_strings_and_of_the_one_that_is_cut_off():
    examples = stream("cfg3b", length=400)
    for example in examples.held_out(range(4)):
        assert example.tokens_L[0] == 0 and (example.tokens_L[1:] == example.targets_L[:-1]).all()
        *whole, rest = "".join(map(str, example.targets_L)).split("0")
        parts = [Cfg3b.grammar.string_nats([int(t) for t in text]) for text in whole]
        expected = sum(parts) + Cfg3b.grammar.prefix_nats([int(t) for t in rest])
        assert examples.source.nats(example.targets_L) == pytest.approx(expected) and expected < 400 * math.log(4)


# Streams.


def test_batches_are_a_function_of_seed_and_step_alone():
    straight = reading(stream(), 6)
    resumed = reading(stream(), 2, start_step=4)
    for expected, found in zip(straight[4:], resumed, strict=True):
        for a, b in zip(expected, found, strict=True):
            np.testing.assert_array_equal(a, b)
    halves = [reading(stream(), 6, process_index=i, process_count=2) for i in range(2)]
    for step, whole in enumerate(straight):
        together = np.concatenate([half[step].tokens_BxL for half in halves])
        assert sorted(map(bytes, together)) == sorted(map(bytes, whole.tokens_BxL))
    other = stream(seed=4)
    assert other.fingerprint == stream().fingerprint != stream(length=LENGTH + 1).fingerprint
    assert not (reading(other, 1)[0].tokens_BxL == straight[0].tokens_BxL).all(axis=1).any()
    for a, b in zip(other.held_out([0, 7]), stream().held_out([0, 7]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert len({row.tobytes() for batch in straight for row in batch.tokens_BxL}) == 48


class Own(ExampleSource):
    """What it gives is set by the tests."""

    symbols = ("<|endoftext|>", "a")
    given: ClassVar[dict] = {}

    def example(self, index, rng, length):
        fields = {name: np.ones(length, int) for name in Example._fields}
        return Example(**fields | self.given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tokens_L": np.ones(5, int)}, r"example 0: tokens_L has shape \(5,\); allowed: \(8,\)"),
        ({"targets_L": np.full(8, 2)}, r"targets_L is id 2; allowed: integers, 0 to 1 \(model.vocab_size - 1\)"),
        ({"tokens_L": np.full(8, -1)}, r"tokens_L is id -1; allowed: integers, 0 to 1"),
        ({"tokens_L": np.ones(8)}, r"tokens_L is of type float64; allowed: integers"),
        ({"weights_L": np.zeros(8)}, r"weights_L is 0.0 to 0.0; allowed: numbers of 0 or more, not all 0"),
        ({"weights_L": np.full(8, np.nan)}, "weights_L is nan"),
        ({"weights_L": np.full(8, 1e300)}, "weights_L is inf"),
        ({"weights_L": np.full(8, 1e-300)}, "weights_L is 0.0 to 0.0"),
        ({"weights_L": ["a"] * 8}, r"example 0: ValueError: could not convert string to float"),
        ({"tokens_L": ["a"] * 8}, r"tokens_L is of type <U1; allowed: integers"),
        ({"weights_L": np.arange(8) - 1.0}, "weights_L is -1.0 to 6.0"),
        ({"tokens": 1}, r"data.examples 'own': example 0, line \d+: TypeError: "),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:20],
)
def test_examples_that_are_not_what_they_should_be_are_named(monkeypatch, given, message):
    if "own" not in example_sources:
        example_sources.register("own")(Own)
    monkeypatch.setattr(Own, "given", given)
    with pytest.raises(SpiralError, match=message) as error:
        stream("own", length=8, vocab_size=2)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"examples": "listop"}, "data.examples is 'listop'; did you mean 'listops'"),
        ({"examples": "listops", "paths": ("a",)}, "data.examples is 'listops'; allowed: without data.paths"),
    ],
)
def test_examples_in_a_configuration(data, message):
    with pytest.raises(SpiralError, match=message):
        RunConfig.from_dict({"data": data, "evaluation": {"batches": 1}})


def test_endless_examples_need_a_number_to_evaluate():
    with pytest.raises(SpiralError, match=r"evaluation\.batches is 0; allowed: 1 or more with data\.examples"):
        RunConfig.from_dict({"data": {"examples": "listops"}})


def test_the_page_of_ones_own_targets_runs():
    page = (Path(__file__).parents[2] / "docs" / "own_targets.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    exec(compile(code, "page", "exec"), {"__name__": "page"})
    batch = stream("running_sum", length=64, vocab_size=11)(np.zeros(2, int), np.arange(2))
    np.testing.assert_array_equal((batch.tokens_BxL - 1).cumsum(1) % 10, batch.targets_BxL - 1)
    example_sources._entries.pop("running_sum")
