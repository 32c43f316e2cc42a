"""Log-probabilities of several continuations of one context, which is read once (the answers of a multiple choice)."""

import collections
import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from spiral_jax.decoding import cached
from spiral_jax.decoding.state import bucket_of, empty_state, repeat_rows
from spiral_jax.model.spiralformer import SpiralFormer

# A token read by a step is taken to cost as much as so many tokens of a full pass: a guess, which decides only how the
# work is done.
_STEP_COST = 4


@dataclasses.dataclass(frozen=True)
class Choices:
    """Requests with one context.

    Attributes:
      numbers: which requests.
      context: what they share.
      continuations: of each, at least one token.
    """

    numbers: tuple[int, ...]
    context: np.ndarray
    continuations: tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a program is compiled for.

    Attributes:
      context: tokens of a context, P.
      continuation: tokens of a continuation, N.
      choices: continuations of a context, K.
    """

    context: int
    continuation: int
    choices: int


def choices_of(requests: Sequence, max_length: int, room: int) -> list[tuple[Shape, Choices]]:
    """Those groups of requests with equal contexts for which it pays to read the context once.

    Args:
      requests: with `context` and `continuation`.
      max_length: the longest input, L. A context that would have to be cut is not shared.
      room: tokens for which there is memory at one time. Every continuation takes a copy of its context, so that one
        with very many is read several times.
    """
    groups = collections.defaultdict(list)
    for number, request in enumerate(requests):
        if 0 < len(request.continuation) <= max_length + 1 - len(request.context):
            groups[np.asarray(request.context, np.int64).tobytes()].append(number)
    found = []
    for together in groups.values():
        context = requests[together[0]].context
        longest = max(len(requests[number].continuation) for number in together)
        length, steps = bucket_of(len(context), max_length), bucket_of(longest, shortest=1, factor=4)
        most = room // (length + steps)
        if most < 2:
            continue
        most = 1 << most.bit_length() - 1  # as `Shape.choices` are powers of two
        for first in range(0, len(together), most):
            numbers = together[first : first + most]
            shape = Shape(length, steps, bucket_of(len(numbers), shortest=1))
            cost = shape.context + _STEP_COST * shape.choices * (shape.continuation - 1)
            if len(numbers) > 1 and cost < len(numbers) * bucket_of(len(context) + longest - 1, max_length):
                continuations = tuple(requests[number].continuation for number in numbers)
                found.append((shape, Choices(tuple(numbers), context, continuations)))
    return found


def arrays_of(members: Sequence[Choices], shape: Shape, rows: int) -> tuple[np.ndarray, ...]:
    """(contexts [G, P], lengths [G], targets [G, K, N]) of a batch of `rows` contexts."""
    contexts_GxP = np.zeros((rows, shape.context), np.int32)
    lengths_G = np.ones(rows, np.int32)
    targets_GxKxN = np.zeros((rows, shape.choices, shape.continuation), np.int32)
    for row, member in enumerate(members):
        lengths_G[row] = len(member.context)
        contexts_GxP[row, : len(member.context)] = member.context
        for k, continuation in enumerate(member.continuations):
            targets_GxKxN[row, k, : len(continuation)] = continuation
    return contexts_GxP, lengths_G, targets_GxKxN


def score_choices(model: SpiralFormer, params, contexts_GxP, lengths_G, targets_GxKxN) -> tuple[jax.Array, jax.Array]:
    """logp [G, K, N] of the targets, and whether they were the likeliest."""
    G, K, N = targets_GxKxN.shape
    empty = empty_state(model.config, G, contexts_GxP.shape[1] + N - 1)
    logits_GxV, state = cached.prefill(model, params, contexts_GxP, lengths_G, empty)
    targets_NxR = targets_GxKxN.reshape(G * K, N).T

    def score(logits_RxV, target_R):
        logp_RxV = jax.nn.log_softmax(logits_RxV)
        logp_R = jnp.take_along_axis(logp_RxV, target_R[:, None], axis=1)[:, 0]
        return logp_R, jnp.argmax(logits_RxV, axis=-1) == target_R

    def step(state, targets):
        token_R, target_R = targets
        logits_RxV, state = cached.step(model, params, token_R, state)
        return state, score(logits_RxV, target_R)

    first = score(jnp.repeat(logits_GxV, K, axis=0), targets_NxR[0])
    scored = jax.tree.map(lambda x_R: x_R[None], first)
    if N > 1:
        _, rest = jax.lax.scan(step, repeat_rows(state, K), (targets_NxR[:-1], targets_NxR[1:]))
        scored = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), scored, rest)
    return jax.tree.map(lambda x_NxR: x_NxR.T.reshape(G, K, N), scored)
