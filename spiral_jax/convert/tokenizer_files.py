"""A run's tokenizer in the files that `transformers` reads."""

import json
from pathlib import Path

import tokenizers

from spiral_jax.data.atomic import write_text
from spiral_jax.data.json_files import read_json_object, write_json
from spiral_jax.data.tokenizers import ByteTokenizer, Tokenizer


def write_tokenizer(folder: Path, tokenizer: Tokenizer, max_length: int) -> None:
    """Writes tokenizer.json, tokenizer_config.json and what `load_tokenizer` reads.

    `transformers` then gives every text the ids that training saw and adds nothing. As with all its tokenizers, special
    tokens that are spelled in a text are read as such, the separator and those that a fine-tune adds; with
    `split_special_tokens=True` they are text, which is our tokenizers' rule for the separator.

    Args:
      folder: where to; it exists.
      tokenizer: the run's.
      max_length: tokens of the training windows.
    """
    tokenizer.save(folder)
    if isinstance(tokenizer, ByteTokenizer):
        write_text(folder / "tokenizer.json", byte_level_json(tokenizer))
    _drop_template(folder / "tokenizer.json")
    separator = tokenizer.decode([tokenizer.separator_id])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": separator,
        "eos_token": separator,
        # Batches are padded on the left for `generate`; what stands there is masked, so any token will do.
        "pad_token": separator,
        "padding_side": "left",
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    write_json(folder / "tokenizer_config.json", config)


def _drop_template(path: Path) -> None:
    """Takes out a post-processor that would put special tokens around a text; ours are not part of what gives ids."""
    spec = read_json_object(path)
    if (spec.get("post_processor") or {}).get("type", "ByteLevel") != "ByteLevel":
        write_text(path, json.dumps(spec | {"post_processor": None}, ensure_ascii=False, indent=2) + "\n")


def byte_level_json(tokenizer: ByteTokenizer) -> str:
    """The byte tokenizer as a `tokenizer.json`: a byte-level BPE whose 256 entries are never merged."""
    # The characters that stand for the bytes are those of GPT-2: the printable ones for themselves, the others, in
    # order, for 256, 257, ...
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=symbols, merges=[]))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    separator = tokenizer.decode([tokenizer.separator_id])
    bpe.add_special_tokens([tokenizers.AddedToken(separator, special=True, normalized=False)])
    return bpe.to_str(pretty=True) + "\n"
