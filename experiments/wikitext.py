"""A SpiralFormer-B on a text corpus in the GPT-NeoX tokenizer's ids: WikiText, or any folder laid out like it.

    python -m spiral_jax.train --config=experiments/wikitext.py:wikitext-2 --workdir=runs/wikitext \
        --config.data.tokenizer=20B_tokenizer.json

The argument is a folder with files `*train*` and `*valid*` (text, jsonl or parquet, perhaps gz or zst: `train.txt`,
`wiki.valid.raw`, `validation-00000-of-00001.parquet`); the tokenizer is EleutherAI's `20B_tokenizer.json`.

Expect, on WikiText-2 (2.4M tokens; a quarter of them is seen): 5.14 nats per token, 1.71 bits per byte on the first
validation tokens, after some ten to twenty minutes on two CPU cores, most of them for the vocabulary of 50,304.
On an accelerator, raise `--config.model.d_model`, `--config.train.sequence_length` and `--config.train.steps`.
"""

from spiral_jax.errors import require
from spiral_jax.run.config import default_config


def get_config(folder: str = ""):
    """The configuration for a corpus in `folder`."""
    require(folder != "", "experiments/wikitext.py: the folder", folder, "experiments/wikitext.py:FOLDER")
    config = default_config()
    config.data.paths = (f"{folder}/*train*",)
    config.data.validation_paths = (f"{folder}/*valid*",)

    config.model.d_model = 128
    config.model.num_heads = 2
    config.model.prelude_layers, config.model.core_layers, config.model.coda_layers = 1, 2, 1
    config.model.chunks = (8, 4, 2, 1)
    config.model.dtype = "float32"
    config.model.unroll = True

    config.train.steps = 300
    config.train.batch_size = 8
    config.train.sequence_length = 256
    config.train.loss_block = 128
    config.optimizer.peak_learning_rate = 3e-3
    config.optimizer.warmup_fraction = 0.05

    config.evaluation.every_steps = 100
    config.evaluation.batches = 16
    config.checkpoint.every_steps = 100
    config.summary.sample_tokens = 80
    config.summary.plot = True
    return config
