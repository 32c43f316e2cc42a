"""A SpiralFormer-B on the Python sources of this machine, or on your own text, in a few minutes on two CPU cores.

    make quickstart
    python -m spiral_jax.train --config=experiments/quickstart.py --workdir=runs/quickstart
    python -m spiral_jax.train --config=experiments/quickstart.py --workdir=runs/mine --config.data.paths=my/texts

Expect: about 30 MB of `.py` files, tokenised in ten to twenty seconds by a BPE trained on the spot; a model of 1.9M
parameters; three to five minutes of training; 1.71 bits per byte on held-out files, where `gzip -9` needs 1.80.
"""

import sysconfig
from pathlib import Path

from spiral_jax.errors import require
from spiral_jax.run.config import default_config

# A standard library installed without its tests is too little text; the packages beside us are added then.
ENOUGH_BYTES = 20_000_000


def get_config(argument: str = ""):
    """The configuration; the machine is searched for sources here, so that config.json names what was read."""
    require(argument == "", "experiments/quickstart.py: the argument", argument, "none, as it takes no argument")
    config = default_config()
    config.data.paths, config.data.exclude = python_sources()
    config.data.invalid = "skip"
    config.data.validation_fraction = 0.03
    config.data.tokenizer = "bpe"
    config.data.bpe_vocab_size = 4096

    config.model.vocab_size = 4096
    config.model.d_model = 128
    config.model.num_heads = 2
    config.model.prelude_layers, config.model.core_layers, config.model.coda_layers = 1, 2, 1
    config.model.chunks = (8, 4, 2, 1)
    config.model.dtype = "float32"
    config.model.unroll = True

    config.train.steps = 800
    config.train.batch_size = 8
    config.train.sequence_length = 256
    config.train.loss_block = 128
    config.optimizer.peak_learning_rate = 4e-3
    config.optimizer.warmup_fraction = 0.05

    config.evaluation.every_steps = 400
    config.checkpoint.every_steps = 200
    config.summary.sample_tokens = 160
    config.summary.plot = True
    return config


def python_sources() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Patterns of the Python files to train on, and of those to leave out."""
    standard_library = Path(sysconfig.get_paths()["stdlib"])
    packages = Path(sysconfig.get_paths()["purelib"])
    # The interpreter's own packages: not the standard library, and different on every machine.
    excluded = tuple(f"{standard_library}/{folder}/*" for folder in ("site-packages", "dist-packages"))
    sources = (f for f in standard_library.rglob("*.py") if not {"site-packages", "dist-packages"} & set(f.parts))
    if sum(f.stat().st_size for f in sources) >= ENOUGH_BYTES:
        return (f"{standard_library}/**/*.py",), excluded
    return (f"{standard_library}/**/*.py", f"{packages}/**/*.py"), excluded
