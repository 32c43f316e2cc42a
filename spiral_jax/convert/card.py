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
text as what follows a separator, id {tokenizer.separator_id}.
"""
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
    return _TEXT.format(
        m=config.model,
        vocab=config.model.vocab_size,
        t=config.train,
        tokenizer=tokenizer,
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
