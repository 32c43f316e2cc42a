"""What a task of the harness says about a text to be generated: where it ends. Greedy decoding only."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from spiral_jax.data.tokenizers import Tokenizer
from spiral_jax.decoding.decoder import IsDone, has_stop, text_before_stop
from spiral_jax.errors import SpiralError

# The harness's names for the most tokens to generate, and its default; the first one that is set counts.
_LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_DEFAULT_LENGTH = 256
# They change nothing when the likeliest token is taken.
_ONLY_FOR_SAMPLING = ("top_p", "top_k")


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
    """Where a generated text ends.

    Attributes:
      max_new_tokens: the most tokens.
      until: texts that end it and are not part of it; a separator does, too.
    """

    max_new_tokens: int
    until: tuple[str, ...]

    @classmethod
    def of(cls, values: Mapping[str, Any], max_length: int) -> "GenerationSettings":
        """Reads a task's `generation_kwargs`.

        Args:
          values: the settings.
          max_length: the longest input of the model.

        Raises:
          SpiralError: sampling, a setting that is not supported, or more tokens than the model's context has.
        """
        values = dict(values)
        lengths = [values.pop(name, None) for name in _LENGTH_NAMES]
        max_new_tokens = int(next((length for length in lengths if length is not None), _DEFAULT_LENGTH))
        if not 1 <= max_new_tokens < max_length:
            raise SpiralError(
                f"generation_kwargs: max_gen_toks is {max_new_tokens} (default {_DEFAULT_LENGTH}); allowed: 1 to "
                f"{max_length - 1}, as the model's sequences have {max_length} tokens"
            )
        until = values.pop("until", None) or []
        do_sample, temperature = values.pop("do_sample", None), float(values.pop("temperature", None) or 0)
        if do_sample or (do_sample is None and temperature > 0):
            raise SpiralError(
                f"generation_kwargs: do_sample is {do_sample} with temperature {temperature}; allowed: greedy "
                "decoding, do_sample false"
            )
        unknown = sorted(values.keys() - set(_ONLY_FOR_SAMPLING))
        if unknown:
            raise SpiralError(
                f"generation_kwargs has {unknown[0]}; allowed: until, do_sample, temperature, "
                f"{', '.join(_LENGTH_NAMES + _ONLY_FOR_SAMPLING)}"
            )
        return cls(max_new_tokens, (until,) if isinstance(until, str) else tuple(until))

    def is_done(self, tokenizer: Tokenizer) -> IsDone:
        """New tokens to whether the text has ended."""

        def is_done(ids: list[int]) -> bool:
            return ids[-1] == tokenizer.separator_id or has_stop(tokenizer, ids, self.until)

        return is_done

    def text(self, tokenizer: Tokenizer, ids: list[int]) -> str:
        """New tokens to the text without what ended it."""
        return text_before_stop(tokenizer, ids, self.until)
