"""Where a generated text ends: at a separator, or at one of some texts, which are then no part of it."""

from collections.abc import Sequence

from spiral_jax.data.tokenizers import Tokenizer


def has_stop(tokenizer: Tokenizer, ids: Sequence[int], stops: Sequence[str]) -> bool:
    """Whether one of the texts `stops` is among these tokens; an empty one never is."""
    text = tokenizer.decode(ids)
    return any(stop in text for stop in stops if stop)


def text_before_stop(tokenizer: Tokenizer, ids: list[int], stops: Sequence[str] = ()) -> str:
    """The text of these tokens up to a separator or one of `stops`."""
    end = ids.index(tokenizer.separator_id) if tokenizer.separator_id in ids else len(ids)
    text = tokenizer.decode(ids[:end])
    for stop in stops:
        text = text.split(stop)[0] if stop else text
    return text
