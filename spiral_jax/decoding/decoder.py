"""Continues any number of texts, so many at a time: a text that ends makes room for the next one at once.

Everything is compiled for one number of rows and one length: a prefill for each bucket of prompt lengths, and one step.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from spiral_jax.data.tokenizers import Tokenizer
from spiral_jax.decoding import cached
from spiral_jax.decoding.entry import with_separate_layers
from spiral_jax.decoding.sampling import Sampling, SamplingSettings, next_tokens
from spiral_jax.decoding.state import DecodeState, bucket_of, empty_state, put_rows, state_shardings
from spiral_jax.errors import SpiralError, require
from spiral_jax.model.config import ModelConfig
from spiral_jax.model.neox import layer_weights
from spiral_jax.model.spiralformer import SpiralFormer
from spiral_jax.parallel.mesh import batch_sharding, replicated, rounded_to_mesh

IsDone = Callable[[list[int]], bool]


@dataclasses.dataclass(frozen=True)
class Request:
    """A text to continue.

    Attributes:
      prompt: its tokens, at least one.
      max_new_tokens: the most tokens to add.
      sampling: how they are chosen.
      is_done: the new tokens so far to whether the text ends there; for ends that are not one token.
    """

    prompt: np.ndarray
    max_new_tokens: int
    sampling: SamplingSettings = SamplingSettings()
    is_done: IsDone | None = None


class Token(NamedTuple):
    """One new token.

    Attributes:
      request: which text it continues, a number in the order of the requests.
      id: the token.
      end: why the text ends with it: `stop` (a stop token or `is_done`) or `length`; "" where it goes on.
    """

    request: int
    id: int
    end: str


class Counts(NamedTuple):
    """What steps have run since `Decoder.run` began.

    Attributes:
      tokens: tokens that steps have read. (Those of the prompts are read by prefills.)
      steps: calls of the compiled step.
      core_calls: passes through a core's weights, for however many rows at once.
      runs: for each iteration, rows for which its core ran.
    """

    tokens: int
    steps: int
    core_calls: int
    runs: tuple[int, ...]


class Rows(NamedTuple):
    """What the devices hold between steps, a pytree.

    Attributes:
      state: of decoding.
      token_B: each row's newest token, which no step has read yet.
      active_B: whether the row goes on.
      left_B: tokens still to make.
      sampling: the rows' settings.
    """

    state: DecodeState
    token_B: jax.Array
    active_B: jax.Array
    left_B: jax.Array
    sampling: Sampling


def bytes_per_row(config: ModelConfig, capacity: int) -> int:
    """Bytes that a row's state takes: caches, open chunks and what the cores made of the last ones."""
    state = jax.eval_shape(lambda: empty_state(config, 1, capacity))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state._replace(work=())))


def has_stop(tokenizer: Tokenizer, ids: Sequence[int], stops: Sequence[str]) -> bool:
    """Whether one of the texts `stops` is among these tokens; an empty one never is."""
    text = tokenizer.decode(ids)
    return any(stop in text for stop in stops if stop)


def text_before_stop(tokenizer: Tokenizer, ids: list[int], stops: Sequence[str] = ()) -> str:
    """The text of these tokens up to a separator or one of `stops`."""
    end = ids.index(tokenizer.separator_id) if tokenizer.separator_id in ids else len(ids)
    text = tokenizer.decode(ids[:end])
    for stop in filter(None, stops):
        text = text.split(stop)[0]
    return text


class Decoder:
    """Continues texts with the parameters of one model on its mesh."""

    def __init__(
        self,
        model: SpiralFormer,
        mesh: Mesh,
        *,
        rows: int,
        capacity: int,
        num_ids: int,
        stop_ids: Sequence[int] = (),
    ):
        """Compiles nothing yet.

        Args:
          model: the model, tied to `mesh`.
          mesh: the devices.
          rows: texts at a time, rounded up to what divides over the mesh.
          capacity: the most tokens of a prompt and its continuation.
          num_ids: ids from here on stand for no token and are never generated.
          stop_ids: tokens that end a text.

        Raises:
          SpiralError: no rows or no capacity.
        """
        require(rows >= 1, "batch_size", rows, "1 or more")
        require(capacity >= 2, "max_length", capacity, "2 or more")
        self.capacity = capacity
        self.rows = rounded_to_mesh(rows, mesh)
        self._config = model.config
        self._narrow = rounded_to_mesh(1, mesh)
        self._by_row = batch_sharding(mesh)
        stop_S = np.array(sorted(set(stop_ids)), np.int32)
        make = functools.partial(_no_rows, model.config, self.rows, capacity)
        shapes = jax.eval_shape(make)
        by_row = jax.tree.map(lambda _: self._by_row, shapes)
        place = by_row._replace(state=state_shardings(shapes.state, mesh))
        compiled = functools.partial(jax.jit, donate_argnums=1, out_shardings=(place, replicated(mesh)))
        self._make = jax.jit(make, out_shardings=place)
        self._admit = compiled(functools.partial(_admit, model, num_ids, stop_S))
        self._step = compiled(functools.partial(_step, model, num_ids, stop_S))
        is_large = layer_weights(model.config) >= _SEPARATE_FROM
        self._separates = is_large and mesh.devices.flat[0].platform == "cpu"
        self._separate = jax.jit(with_separate_layers)
        self._newest: tuple[Any, Any] | None = None
        self._counted = Counts(0, 0, 0, (0,) * model.config.num_iterations)

    def run(self, params: Any, requests: Sequence[Request]) -> Iterator[Token]:
        """Continues texts; what a text becomes does not depend on the others.

        Args:
          params: the model's parameters, where the mesh wants them.
          requests: the texts, which are begun in this order.

        Yields:
          Tokens as they are made: those of one text in order, those of different texts in turn.

        Raises:
          SpiralError: before anything runs, a request that does not fit.
        """
        for number, request in enumerate(requests):
            self._check(number, request)
        return self._run(params, requests)

    def counts(self) -> Counts:
        """What the steps of the newest `run` ran, complete when it has ended."""
        return self._counted

    def _check(self, number: int, request: Request) -> None:
        length, new = len(request.prompt), request.max_new_tokens
        if not length:
            raise SpiralError(f"prompt {number + 1} has no tokens; allowed: 1 or more")
        require(new >= 1, "max_new_tokens", new, "1 or more")
        if length + new > self.capacity:
            allowed = f"{self.capacity} together (max_length)"
            raise SpiralError(f"prompt {number + 1} has {length} tokens and {new} to add; allowed: {allowed}")
        low, high = int(np.min(request.prompt)), int(np.max(request.prompt))
        if low < 0 or high >= self._config.vocab_size:
            allowed = f"0 to {self._config.vocab_size - 1}"
            raise SpiralError(f"prompt {number + 1} has ids from {low} to {high}; allowed: {allowed}")

    def _run(self, params: Any, requests: Sequence[Request]) -> Iterator[Token]:
        rows = self._make()
        waiting = collections.deque(range(len(requests)))
        new_ids: list[list[int]] = [[] for _ in requests]
        holder: list[int | None] = [None] * self.rows  # the request in each row that has not ended as far as we know
        ended_B = np.zeros(self.rows, bool)  # rows whose text ended by `is_done`, which the devices do not know of
        asked = [0] * len(requests)  # tokens on their way or read
        unread: collections.deque[tuple[list[tuple[int, int | None]], Any]] = collections.deque()
        steps = tokens = 0

        def read(members: list[tuple[int, int | None]], made: Any) -> Iterator[Token]:
            nonlocal tokens
            ids_N, said_N = (array.tolist() for array in map(np.asarray, made))
            for (row, number), id_, said in zip(members, ids_N, said_N, strict=False):
                # A text that had ended when this step began is not gone on with; one that we ended may have been.
                if number is None or said == _RESTING or holder[row] != number:
                    continue
                is_done = requests[number].is_done
                tokens += len(new_ids[number]) > 0
                new_ids[number].append(id_)
                end = ""
                if said == _STOPPED:
                    end = "stop"
                elif is_done is not None and is_done(new_ids[number]):
                    end = "stop"
                    ended_B[row] = True
                elif said == _LAST:
                    end = "length"
                if end:
                    holder[row] = None
                yield Token(number, id_, end)

        def go_on() -> list[int]:
            held = (number for number in holder if number is not None)
            return [number for number in held if asked[number] < requests[number].max_new_tokens]

        while True:
            free = [row for row, number in enumerate(holder) if number is None]
            while waiting and free:
                # Many at once share one pass; a few would leave most of a wide one empty.
                width = self.rows if 2 * min(len(free), len(waiting)) >= self.rows else self._narrow
                chosen = {free.pop(0): waiting.popleft() for _ in range(min(width, len(free), len(waiting)))}
                for row, number in chosen.items():
                    holder[row], asked[number], ended_B[row] = number, 1, False
                members = [requests[number] for number in chosen.values()]
                rows, made = self._admit(params, rows, *self._arrays(members, list(chosen), width))
                unread.append((list(chosen.items()), made))
            if numbers := go_on():
                for number in numbers:
                    asked[number] += 1
                rows, made = self._step(self._for_steps(params), rows, self._put(ended_B))
                unread.append((list(enumerate(holder)), made))
                steps += 1
            # The newest step is read when the next one is on its way, so that the devices do not wait for us.
            while unread and (len(unread) > 1 or not go_on()):
                yield from read(*unread.popleft())
            if not waiting and not unread and not go_on():
                break
        work = rows.state.work
        self._counted = Counts(tokens, steps, int(work.core_calls), tuple(np.asarray(work.runs_T).tolist()))

    def _for_steps(self, params: Any) -> Any:
        """The parameters as steps read them fastest; a copy of the layers, on a CPU."""
        if not self._separates:
            return params
        if self._newest is None or self._newest[0] is not params:
            self._newest = params, self._separate(params)
        return self._newest[1]

    def _arrays(self, requests: list[Request], rows: list[int], width: int) -> tuple:
        """What `_admit` wants of some requests and the rows for them, filled up with rows that are put nowhere."""
        P = bucket_of(max(len(request.prompt) for request in requests), self.capacity)
        tokens_WxP = np.zeros((width, P), np.int32)
        lengths_W, left_W = np.ones(width, np.int32), np.zeros(width, np.int32)
        rows_W = np.full(width, self.rows, np.int32)
        for i, (request, row) in enumerate(zip(requests, rows, strict=True)):
            tokens_WxP[i, : len(request.prompt)] = request.prompt
            lengths_W[i], left_W[i], rows_W[i] = len(request.prompt), request.max_new_tokens, row
        padding = [SamplingSettings()] * (width - len(requests))
        sampling = Sampling.of([request.sampling for request in requests] + padding)
        return jax.tree.map(self._put, (tokens_WxP, lengths_W, rows_W, left_W, sampling))

    def _put(self, array_W: np.ndarray) -> jax.Array:
        # A copy: on a CPU the device may read the host's buffer while it is being written to.
        return jax.make_array_from_callback(array_W.shape, self._by_row, array_W.copy().__getitem__)


# Numbers in a layer's matrices from which steps on a CPU get layers by themselves: smaller ones stay in its caches, and
# a step compiles in the time of one layer.
_SEPARATE_FROM = 2**20

# What a row's entry beside a new token says. (Of NumPy's type: Python's numbers would leave arrays that compile twice.)
_RESTING, _GOES_ON, _LAST, _STOPPED = np.arange(-1, 3, dtype=np.int32)


def _no_rows(config: ModelConfig, rows: int, capacity: int) -> Rows:
    zeros_B = jnp.zeros(rows, jnp.int32)
    sampling = Sampling.of([SamplingSettings()] * rows)
    return Rows(empty_state(config, rows, capacity), zeros_B, jnp.zeros(rows, bool), zeros_B, sampling)


def _admit(model: SpiralFormer, num_ids: int, stop_S, params, rows: Rows, tokens_WxP, lengths_W, rows_W, left_W, new):
    """Reads prompts and puts them into rows.

    Args:
      model, num_ids, stop_S: static.
      params: the model's.
      rows: before.
      tokens_WxP, lengths_W: the prompts.
      rows_W: where each goes; a number behind the last row is nowhere.
      left_W: tokens to make of each.
      new: their sampling settings.

    Returns:
      The rows after, and (first tokens [W], what they are to their texts [W]).
    """
    W, P = tokens_WxP.shape
    logits_WxV, state = cached.prefill(model, params, tokens_WxP, lengths_W, empty_state(model.config, W, P))
    token_W = next_tokens(logits_WxV, new, lengths_W, num_ids)
    said_W = _said(token_W, left_W - 1, stop_S)
    after = jax.tree.map(
        lambda old, x: old.at[rows_W].set(x, mode="drop"), rows[1:], (token_W, said_W == _GOES_ON, left_W - 1, new)
    )
    return Rows(put_rows(rows.state, state, rows_W), *after), (token_W, said_W)


def _step(model: SpiralFormer, num_ids: int, stop_S, params, rows: Rows, ended_B):
    """One more token for the rows that go on.

    Returns:
      The rows after, and (tokens [B], what they are to their texts [B]).
    """
    active_B = rows.active_B & ~ended_B
    logits_BxV, state = cached.step(model, params, rows.token_B, rows.state, active_B)
    token_B = jnp.where(active_B, next_tokens(logits_BxV, rows.sampling, state.position_B, num_ids), rows.token_B)
    left_B = rows.left_B - active_B.astype(jnp.int32)
    said_B = jnp.where(active_B, _said(token_B, left_B, stop_S), _RESTING)
    return Rows(state, token_B, said_B == _GOES_ON, left_B, rows.sampling), (token_B, said_B)


def _said(token_B, left_B, stop_S):
    stops_B = jnp.any(token_B[:, None] == stop_S, axis=1)
    return jnp.where(stops_B, _STOPPED, jnp.where(left_B > 0, _GOES_ON, _LAST))
