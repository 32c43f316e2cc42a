"""A sample of the training text, to train a tokenizer on."""

import hashlib
from collections.abc import Sequence

from spiral_jax.data.text.parts import InvalidInput, Recipe, split_of
from spiral_jax.data.text.records import read_span
from spiral_jax.data.text.spans import Text
from spiral_jax.data.text.units import Source, cut_into_units

# More text does not make a small vocabulary better in a way one can measure, only slower to train.
SAMPLE_BYTES = 8_000_000


def sample_texts(sources: Sequence[Source], recipe: Recipe) -> list[str]:
    """Documents to train on, about SAMPLE_BYTES of them; the same for the same input.

    Args:
      sources: The input.
      recipe: What of it is text.

    Raises:
      SpiralError: Input that is no text or cannot be read.
    """
    texts: list[str] = []
    num_bytes = 0
    # In the order of a hash, so that the sample is not just the first folder.
    train = [source for source in sources if source.split != "validation"]
    for source in sorted(train, key=lambda source: hashlib.sha256(_name(source)).digest()):
        for unit in cut_into_units([source], recipe.text_field):  # a large file is not read whole
            for span in unit.spans:
                for found in read_span(span, unit.content, recipe.text_field):
                    if num_bytes >= SAMPLE_BYTES:
                        return texts
                    if not isinstance(found, Text):
                        if recipe.invalid == "error":
                            raise InvalidInput(found)
                    elif split_of(found, source.split, recipe) == "train":
                        texts.append(found.text[: SAMPLE_BYTES - num_bytes])
                        num_bytes += len(texts[-1].encode("utf-8"))
    return texts


def _name(source: Source) -> bytes:
    return source.document.name.encode("utf-8", "surrogateescape")
