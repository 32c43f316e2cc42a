"""The model card of an export: what the model is, what it was trained on, how to load it."""

from collections.abc import Mapping, Sequence
from typing import Any

import spiral_jax
from spiral_jax.convert.architecture import is_vanilla
from spiral_jax.data.tokenizers import Tokenizer
from spiral_jax.training.config import StepConfig

_TEXT = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- spiral_jax
---

# {m.notation}, {m.topology}

A language model trained with spiral_jax. {kind}

| | |
|---|---|
| architecture | `{m.notation}`, topology {m.topology}, width {m.d_model}, {m.num_heads} heads, vocabulary {vocab:,} |
| parameters | {m.total_parameters:,} ({m.non_embedding_parameters:,} non-embedding) |
| weights | {dtype} |
| trained for | {step:,} of {t.steps:,} steps of {t.batch_size} x {t.sequence_length} tokens: {tokens:,} tokens |
| last training loss | {training_loss} |
| last validation loss | {validation_loss} |
| data (fingerprints of the token stores) | {fingerprints} |
| tokenizer fingerprint | `{tokenizer.fingerprint}` |
| trained with | {versions} |
| exported with | spiral_jax {version} |

Losses are nats per token. The full configuration of the run is in `export.json`.

## Loading it

With `transformers` (FOLDER is this folder):

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER"{trust})
tokenizer = AutoTokenizer.from_pretrained("FOLDER"{trust})
```

With spiral_jax, in JAX; or as a run that `train` goes on with and `evaluate` scores:

```python
import spiral_jax

model, params = spiral_jax.load("FOLDER")
```
```
python -m spiral_jax.import_hf --input=FOLDER --workdir=RUN
```

The tokenizer puts no separator before a text. Training documents are each followed by one, and `evaluate` scores a
text as what follows a separator, id {tokenizer.separator_id}. A text that spells the separator encodes to it; with
`tokenizer(text, split_special_tokens=True)` it encodes as in training, to ordinary tokens.

## Fine-tuning it

- **Length.** Training windows were of {t.sequence_length:,} tokens, and `tokenizer.model_max_length` says so:
  `truncation=True` cuts there. Nothing in the model forbids more, but it has not learned it.
- **The end of a text.** Nothing is added: `text + tokenizer.eos_token` ends a text as in training.
- **Padding and labels.** `pad_token` is the separator, `{separator}`, too; batches are padded on the left. A collator
  that takes the labels of padding tokens out, such as `DataCollatorForLanguageModeling`, also takes out every end of a
  text, and the model does not learn to stop. Let `DataCollatorForSeq2Seq` pad `labels`, with -100, or add a padding
  token: `tokenizer.add_special_tokens({{"pad_token": "<|pad|>"}})`.
- **Tokens of your own.** {rows} Ids that stand for no token come up in generation until training has learned that they
  never do; `generate(suppress_tokens=list(range(len(tokenizer), model.config.vocab_size)))` keeps them out.
- **Packing.** Texts in one row whose `position_ids` start again, without a mask, as `DataCollatorWithFlattening` makes
  them, do not see each other in training.
- **Back in JAX.** What `Trainer` or `save_pretrained` writes, with the tokenizer beside it, loads as above, also with a
  vocabulary of another size.
"""
_ROWS = (
    "The vocabulary has {free} rows more than the tokenizer has ids ({ids:,}): `tokenizer.add_tokens([...], "
    "special_tokens=True)` takes them in order; for more, `model.resize_token_embeddings(len(tokenizer))`."
)
_NO_ROWS = (
    "Every row of the vocabulary is taken: after `tokenizer.add_tokens([...], special_tokens=True)`, "
    "`model.resize_token_embeddings(len(tokenizer))`."
)
_VANILLA = "It is a plain GPT-NeoX: `transformers` needs no other code for it."
_SPIRAL = "Its code for `transformers` is in `modeling_spiralformer.py`, beside this file."


def model_card(
    config: StepConfig,
    step: int,
    *,
    rows: Sequence[Mapping[str, Any]],
    start: Mapping[str, Any] | None,
    fingerprints: list[str],
    tokenizer: Tokenizer,
    dtype: str,
) -> str:
    """The card as Markdown, the same for the same checkpoint.

    Args:
      config: the run's, as saved with the checkpoint.
      step: of the checkpoint.
      rows: of the run's metrics; those after the checkpoint do not count.
      start: what the run's last start recorded of its environment; None if that is not known.
      fingerprints: of the training tokens.
      tokenizer: the run's.
      dtype: of the exported tensors.
    """
    rows = [row for row in rows if row["step"] <= step]
    vanilla = is_vanilla(config.model)
    free = config.model.vocab_size - tokenizer.vocab_size
    return _TEXT.format(
        m=config.model,
        vocab=config.model.vocab_size,
        t=config.train,
        tokenizer=tokenizer,
        separator=tokenizer.decode([tokenizer.separator_id]),
        rows=_ROWS.format(free=free, ids=tokenizer.vocab_size) if free > 0 else _NO_ROWS,
        kind=_VANILLA if vanilla else _SPIRAL,
        dtype=dtype,
        step=step,
        tokens=step * config.train.tokens_per_step,
        training_loss=_last(rows, "loss"),
        validation_loss=_last(rows, "validation_loss"),
        fingerprints=", ".join(f"`{fingerprint}`" for fingerprint in fingerprints) or "none: not trained here",
        versions=_versions(start),
        version=spiral_jax.__version__,
        trust="" if vanilla else ", trust_remote_code=True",
    )


def _last(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    # What was not finite is null there.
    values = [f"{row[name]:.4f} (step {row['step']:,})" for row in rows if row.get(name) is not None]
    return values[-1] if values else "not recorded"


def _versions(start: Mapping[str, Any] | None) -> str:
    """What the run's last start ran with."""
    if start is None:
        return "not recorded"
    packages = ", ".join(f"{name} {version}" for name, version in start["packages"].items() if version)
    return f"{packages}; git commit {start['git_commit'] or 'unknown'}"
