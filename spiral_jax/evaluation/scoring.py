"""Log-probabilities of continuations given their contexts, in batches of few shapes on a mesh."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spiral_jax.decoding.state import bucket_of
from spiral_jax.evaluation.shared_prompts import Choices, Shape, arrays_of, choices_of, score_choices
from spiral_jax.parallel.mesh import rounded_to_mesh
from spiral_jax.parallel.placed_model import PlacedModel
from spiral_jax.progress import Progress
from spiral_jax.training.loss import nats_and_greedy

_SHORTEST_CONTINUATION = 16
# Caches of a context for its continuations, in the memory of a row that is trained on: of a token they hold two vectors
# of a layer, training far more.
_CONTEXTS_OF_A_ROW = 8


class Request(NamedTuple):
    """What to score: at least one token of context; a continuation of none costs nothing."""

    context: np.ndarray
    continuation: np.ndarray


class Result(NamedTuple):
    """Sum of the continuation's log-probabilities in nats, and whether each of its tokens was the likeliest."""

    logp: float
    greedy: bool


class _Window(NamedTuple):
    """At most L + 1 tokens, of which the last `predicted` are scored; part of request number `request`."""

    request: int
    tokens: np.ndarray
    predicted: int


def windows(request: Request, max_length: int) -> Iterator[tuple[np.ndarray, int]]:
    """Cuts a request into inputs of at most `max_length` tokens that predict each token of the continuation once.

    A continuation that fits keeps as much of its context as there is room for: the context loses tokens on its left.
    A longer one is cut into pieces of `max_length` tokens: the first is predicted from the last token of the context,
    the others from what stands before them as far as it fits, which for a full piece is one token. With a separator
    as the context this is how the LM Evaluation Harness rolls over a document.

    Yields:
      At most max_length + 1 tokens, and how many of them, from the right, are predicted.
    """
    L, N = max_length, len(request.continuation)
    if 0 < N <= L:
        yield np.concatenate([request.context, request.continuation])[-(L + 1) :], N
        return
    tokens = np.concatenate([request.context[-1:], request.continuation])
    for start in range(0, N, L):
        stop = min(start + L, N)
        yield tokens[max(stop - L, 0) : stop + 1], stop - start


class Scorer:
    """Scores requests with the parameters of one model on its mesh."""

    def __init__(self, placed: PlacedModel, *, max_length: int, batch_size: int, block: int):
        """Compiles nothing yet.

        Args:
          placed: the model on its mesh.
          max_length: the longest input, L.
          batch_size: inputs of `max_length` tokens at a time, rounded up to what divides over the mesh; of shorter
            ones as many more as have the same number of tokens.
          block: positions of such an input whose logits exist at one time.
        """
        self.max_length = max_length
        self._batch_size = rounded_to_mesh(batch_size, placed.mesh)
        self._placed = placed

        def on_mesh(score: Callable) -> Callable:
            return jax.jit(score, in_shardings=(None, *[placed.batch] * 3), out_shardings=placed.everywhere)

        self._step = on_mesh(functools.partial(_score, placed.model, block * self._batch_size))
        self._score_choices = on_mesh(functools.partial(score_choices, placed.model))

    def __call__(
        self,
        params: Any,
        requests: Sequence[Request],
        report: Callable[[str], None] = lambda line: None,
        check: Callable[[], None] = lambda: None,
    ) -> list[Result]:
        """Scores requests; neither their order nor the batch size changes the results beyond rounding.

        Where requests share a context (the answers of a multiple choice), it is read once if that is less work.

        Args:
          params: the model's.
          requests: what to score.
          report: takes a line about the progress every few seconds.
          check: called before every batch; raises to leave the rest.

        Returns:
          One result per request, in their order.
        """
        logp, greedy = [0.0] * len(requests), [True] * len(requests)

        def add(number: int, predicted: int, logp_C: np.ndarray, greedy_C: np.ndarray) -> None:
            logp[number] += float(logp_C[:predicted].sum(dtype=np.float64))
            greedy[number] &= bool(greedy_C[:predicted].all())

        def collect(members: list[_Window], logp_BxC: jax.Array, greedy_BxC: jax.Array) -> None:
            for window, logp_C, greedy_C in zip(members, np.asarray(logp_BxC), np.asarray(greedy_BxC), strict=False):
                add(window.request, window.predicted, logp_C, greedy_C)

        rows_of_device = self._batch_size // rounded_to_mesh(1, self._placed.mesh)
        choices = choices_of(requests, self.max_length, _CONTEXTS_OF_A_ROW * rows_of_device * self.max_length)
        shared = {number for _, group in choices for number in group.numbers}
        batches = self._batches(requests, shared)
        choice_batches = self._choice_batches(choices)
        total = sum(rows * length for rows, length, *_ in batches)
        total += sum(rows * shape.context for rows, shape, _ in choice_batches)
        progress = Progress(f"scoring {len(requests):,} requests", total, unit="tokens", report=report, seconds=5)
        pending = None
        for rows, length, positions, members in batches:
            check()
            arrays = _padded(members, rows, length, positions)
            scored = self._step(params, *map(self._placed.put, arrays))
            if pending is not None:
                collect(*pending)  # only now that the next batch is on its way
            pending = members, *scored
            progress.advance(rows * length)
        if pending is not None:
            collect(*pending)
        for rows, shape, groups in choice_batches:
            check()
            arrays = arrays_of(groups, shape, rows)
            logp_GxKxN, greedy_GxKxN = map(np.asarray, self._score_choices(params, *map(self._placed.put, arrays)))
            for row, group in enumerate(groups):
                for k, (number, continuation) in enumerate(zip(group.numbers, group.continuations, strict=True)):
                    add(number, len(continuation), logp_GxKxN[row, k], greedy_GxKxN[row, k])
            progress.advance(rows * shape.context)
        return [Result(*pair) for pair in zip(logp, greedy, strict=True)]

    def _choice_batches(self, choices: list[tuple[Shape, Choices]]) -> list[tuple[int, Shape, list[Choices]]]:
        """(contexts, shape, groups), the longest first. No more rows at a time than full passes of this length have."""
        by_shape = collections.defaultdict(list)
        for shape, group in choices:
            by_shape[shape].append(group)
        batches = []
        for shape, groups in sorted(by_shape.items(), key=lambda item: dataclasses.astuple(item[0]), reverse=True):
            room = self._batch_size * self.max_length // (shape.choices * (shape.context + shape.continuation))
            rows = 1
            while rows < len(groups) and 2 * rows <= room:
                rows *= 2
            rows = rounded_to_mesh(rows, self._placed.mesh)
            batches += [(rows, shape, groups[first : first + rows]) for first in range(0, len(groups), rows)]
        return batches

    def _batches(
        self, requests: Sequence[Request], left_out: Set[int] = frozenset()
    ) -> list[tuple[int, int, int, list[_Window]]]:
        """(rows, input length, continuation length, windows), the longest inputs first: what fails, fails at once."""
        buckets = collections.defaultdict(list)
        for number, request in enumerate(requests):
            if number in left_out:
                continue
            for tokens, predicted in windows(request, self.max_length):
                length = bucket_of(len(tokens) - 1, self.max_length)
                # Positions that get logits, in coarse steps, as every pair of buckets is a program to compile.
                positions = bucket_of(predicted, length, shortest=_SHORTEST_CONTINUATION, factor=4)
                buckets[length, positions].append(_Window(number, tokens, predicted))
        batches = []
        for (length, positions), members in sorted(buckets.items(), reverse=True):
            rows = self._batch_size
            while rows < len(members) and 2 * rows * length <= self._batch_size * self.max_length:
                rows *= 2
            for first in range(0, len(members), rows):
                batches.append((rows, length, positions, members[first : first + rows]))
        return batches


def _padded(members: list[_Window], rows: int, length: int, positions: int) -> tuple[np.ndarray, ...]:
    """(tokens_BxL, positions_BxC, targets_BxC) of a batch, filled up on the right, where no position before sees it."""
    tokens_BxL = np.zeros((rows, length), np.int32)
    positions_BxC, targets_BxC = np.zeros((2, rows, positions), np.int32)
    for row, (_, tokens, predicted) in enumerate(members):
        last = len(tokens) - 1
        tokens_BxL[row, :last] = tokens[:-1]
        positions_BxC[row, :predicted] = np.arange(last - predicted, last)
        targets_BxC[row, :predicted] = tokens[-predicted:]
    return tokens_BxL, positions_BxC, targets_BxC


def _score(model, block_tokens: int, params, tokens_BxL, positions_BxC, targets_BxC) -> tuple[jax.Array, jax.Array]:
    """logp_BxC of the targets after the tokens at `positions`, and greedy_BxC: whether they were the likeliest."""
    h_BxLxD, _ = model.apply({"params": params}, tokens_BxL, method="hidden")
    h_BxCxD = jnp.take_along_axis(h_BxLxD, positions_BxC[..., None], axis=1)
    block = max(1, block_tokens // len(h_BxCxD))
    nats_BxC, greedy_BxC = nats_and_greedy(model, params, h_BxCxD, targets_BxC, block)
    return -nats_BxC, greedy_BxC
