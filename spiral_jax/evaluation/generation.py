"""Greedy continuations of many prompts at once, each until its own end."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spiral_jax.evaluation.scoring import input_bucket
from spiral_jax.model.spiralformer import unembed
from spiral_jax.progress import Progress
from spiral_jax.sharding import batch_sharding, replicated
from spiral_jax.training.step import Program

IsDone = Callable[[list[int]], bool]


class Generator:
    """Continues prompts with the parameters of one model on its mesh."""

    def __init__(self, program: Program, *, max_length: int, batch_size: int, num_ids: int):
        """Compiles nothing yet.

        Args:
          program: the model and its mesh.
          max_length: the most tokens of a prompt and its continuation.
          batch_size: prompts at a time, rounded up to what divides over the mesh.
          num_ids: ids from here on stand for no token and are never generated.
        """
        self.max_length = max_length
        parts = program.mesh.shape["data"] * program.mesh.shape["fsdp"]
        self._batch_size = -(-batch_size // parts) * parts
        self._put = program.put
        batch, everywhere = batch_sharding(program.mesh), replicated(program.mesh)
        self._next = jax.jit(
            functools.partial(_next_ids, program.model, num_ids),
            in_shardings=(jax.tree.map(lambda x: x.sharding, program.abstract_state.params), batch, batch),
            out_shardings=everywhere,
        )

    def __call__(
        self,
        params: Any,
        prompts: Sequence[np.ndarray],
        *,
        max_new_tokens: int,
        is_done: Sequence[IsDone],
        report: Callable[[str], None] = lambda line: None,
    ) -> list[list[int]]:
        """Continues prompts.

        Args:
          params: the model's.
          prompts: tokens, at least one each; what leaves no room for `max_new_tokens` is dropped on the left.
          max_new_tokens: the most tokens to add to each, below `max_length`.
          is_done: for each prompt, new tokens to whether it ends there.
          report: takes a line about the progress every few seconds.

        Returns:
          The new tokens of each prompt, the one that ended it included.
        """
        prompts = [prompt[-(self.max_length - max_new_tokens) :] for prompt in prompts]
        new_ids: list[list[int]] = [[] for _ in prompts]
        longest_first = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        progress = Progress(f"generating {len(prompts):,} texts", len(prompts), unit="texts", report=report, seconds=5)
        for first in range(0, len(prompts), self._batch_size):
            members = longest_first[first : first + self._batch_size]
            batch = [prompts[i] for i in members]
            for i, ids in zip(
                members, self._continue(params, batch, max_new_tokens, [is_done[i] for i in members]), strict=True
            ):
                new_ids[i] = ids
            progress.advance(len(members))
        return new_ids

    def _continue(
        self, params: Any, prompts: list[np.ndarray], max_new_tokens: int, is_done: list[IsDone]
    ) -> list[list[int]]:
        """One batch: a full forward pass over a padded buffer per token. (Decoding with a cache belongs here.)"""
        length = input_bucket(max(map(len, prompts)) + max_new_tokens, self.max_length)
        tokens_BxL = np.zeros((self._batch_size, length), np.int32)
        position_Bx1 = np.zeros((self._batch_size, 1), np.int32)
        for row, prompt in enumerate(prompts):
            tokens_BxL[row, : len(prompt)] = prompt
            position_Bx1[row] = len(prompt) - 1
        new_ids: list[list[int]] = [[] for _ in prompts]
        running = set(range(len(prompts)))
        while running:
            # A copy: on a CPU the device may read the host's buffer while it is being written to here.
            ids_B = np.asarray(self._next(params, self._put(tokens_BxL.copy()), self._put(position_Bx1.copy())))
            for row in sorted(running):
                new_ids[row].append(int(ids_B[row]))
                if len(new_ids[row]) == max_new_tokens or is_done[row](new_ids[row]):
                    running.remove(row)
                    continue
                position_Bx1[row] += 1
                tokens_BxL[row, position_Bx1[row]] = ids_B[row]
        return new_ids


def _next_ids(model, num_ids: int, params, tokens_BxL: jax.Array, position_Bx1: jax.Array) -> jax.Array:
    """The likeliest token after the one at each row's position [B]."""
    h_BxLxD, _ = model.apply({"params": params}, tokens_BxL, method="hidden")
    h_Bx1xD = jnp.take_along_axis(h_BxLxD, position_Bx1[..., None], axis=1)
    kernel_DxV = model.backend.constrain(params["head"]["kernel"], "activation_embed", "vocab")
    logits_Bx1xV = model.backend.constrain(unembed(h_Bx1xD, kernel_DxV), "batch", "length", "vocab")
    exists_V = jnp.arange(logits_Bx1xV.shape[-1]) < num_ids
    return jnp.argmax(jnp.where(exists_V, logits_Bx1xV, -jnp.inf), axis=-1)[:, 0]
