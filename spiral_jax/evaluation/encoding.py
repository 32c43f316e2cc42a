"""Texts of the LM Evaluation Harness to tokens: where a context ends and what its continuation is."""

from collections.abc import Sequence

import numpy as np

from spiral_jax.data.tokenizers import Tokenizer
from spiral_jax.errors import SpiralError
from spiral_jax.evaluation.scoring import Request


def encode_pairs(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> list[Request]:
    """(context, continuation) texts to tokens, as the harness does for its own causal models.

    White space at the end of a context belongs to its continuation. Both are encoded as one text, and what goes beyond
    the context's own tokens is the continuation. An empty context is a separator.

    Raises:
      SpiralError: a continuation without a token of its own.
    """
    contexts = [context.rstrip() for context, _ in pairs]
    unique = list(dict.fromkeys(contexts))  # a multiple-choice question comes once per choice
    context_ids = dict(zip(unique, tokenizer.encode_batch(unique), strict=True))
    wholes = tokenizer.encode_batch([context + continuation for context, continuation in pairs])
    separator = np.array([tokenizer.separator_id], np.int32)
    requests = []
    for context, whole, (_, continuation) in zip(contexts, wholes, pairs, strict=True):
        ids = context_ids[context]
        if len(whole) <= len(ids):
            raise SpiralError(
                f"--tasks has the continuation {continuation!r}, which adds no token to a context that ends in "
                f"{context[-20:]!r}; allowed: continuations of at least one token"
            )
        requests.append(Request(ids if len(ids) else separator, whole[len(ids) :]))
    return requests


def encode_documents(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Request]:
    """Whole texts as continuations of a separator."""
    separator = np.array([tokenizer.separator_id], np.int32)
    return [Request(separator, ids) for ids in tokenizer.encode_batch(list(texts))]


def encode_prompts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Texts to continue, as they are; an empty one is a separator."""
    separator = np.array([tokenizer.separator_id], np.int32)
    return [ids if len(ids) else separator for ids in tokenizer.encode_batch(list(texts))]
