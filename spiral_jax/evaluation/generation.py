"""Greedy continuations of many prompts at once, each until its own end."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from spiral_jax.decoding.decoder import Decoder, IsDone, Request
from spiral_jax.decoding.state import bucket_of
from spiral_jax.parallel.placed_model import PlacedModel
from spiral_jax.progress import Progress


class Generator:
    """Continues prompts with the parameters of one model on its mesh."""

    def __init__(self, placed: PlacedModel, *, max_length: int, batch_size: int, num_ids: int):
        """Compiles nothing yet.

        Args:
          placed: the model on its mesh.
          max_length: the most tokens of a prompt and its continuation.
          batch_size: prompts at a time, rounded up to what divides over the mesh.
          num_ids: ids from here on stand for no token and are never generated.
        """
        self.max_length = max_length
        self._placed = placed
        self._batch_size = batch_size
        self._num_ids = num_ids
        self._decoders: dict[int, Decoder] = {}  # by capacity: programs stay compiled from call to call

    def __call__(
        self,
        params: Any,
        prompts: Sequence[np.ndarray],
        *,
        max_new_tokens: int,
        is_done: Sequence[IsDone],
        report: Callable[[str], None] = lambda line: None,
        check: Callable[[], None] = lambda: None,
    ) -> list[list[int]]:
        """Continues prompts.

        Args:
          params: the model's.
          prompts: tokens, at least one each; what leaves no room for `max_new_tokens` is dropped on the left.
          max_new_tokens: the most tokens to add to each, below `max_length`.
          is_done: for each prompt, new tokens to whether it ends there.
          report: takes a line about the progress every few seconds.
          check: called after every token; raises to leave the rest.

        Returns:
          The new tokens of each prompt, the one that ended it included.
        """
        prompts = [prompt[-(self.max_length - max_new_tokens) :] for prompt in prompts]
        new_ids: list[list[int]] = [[] for _ in prompts]
        longest_first = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        requests = [Request(prompts[i], max_new_tokens, is_done=is_done[i]) for i in longest_first]
        capacity = bucket_of(max(map(len, prompts), default=0) + max_new_tokens, self.max_length)
        progress = Progress(f"generating {len(prompts):,} texts", len(prompts), unit="texts", report=report, seconds=5)
        for token in self._decoder(capacity).run(params, requests):
            check()
            new_ids[longest_first[token.request]].append(token.id)
            if token.end:
                progress.advance(1)
        return new_ids

    def _decoder(self, capacity: int) -> Decoder:
        if capacity not in self._decoders:
            self._decoders[capacity] = Decoder(
                self._placed.model,
                self._placed.mesh,
                rows=self._batch_size,
                capacity=capacity,
                num_ids=self._num_ids,
            )
        return self._decoders[capacity]
