"""The papers' pretraining runs: four sizes of nine families on the Pile (docs/spec.md section 5).

    python -m spiral_jax.train --config=experiments/pile.py:1.4b,spiral_b --workdir=DIR --config.data.stores=PILE
    python -m spiral_jax.train --config=experiments/pile.py:410m,vanilla,v5p-128 --workdir=DIR ...
    python -m spiral_jax.describe --config=experiments/pile.py:160m,spiral_l

SIZE is 160m, 410m, 1b or 1.4b; FAMILY is vanilla, vanilla_mesh, base, residual, anchor, anchor_star, mesh (the
full-resolution loops), spiral_b or spiral_l. PILE is where the deduplicated Pile is in the GPT-NeoX tokenizer's ids, a
path or a URL (`gs://...`): a folder written by `python -m spiral_jax.prepare`, or one with EleutherAI's published
`.idx` and parts of its `.bin` as they are (docs/pile.md), and the tokenizer as `tokenizer.json`; for validation
losses, also a token store `validation/` (prepare one from the Pile's `val.jsonl.zst`, or name it with
`--config.data.validation_store`). The 207B tokens are 1.2 epochs of the run; each epoch has its own order.

Expect, after 120,818 steps of 512 x 4096 tokens, perplexities on the Pile near the papers' tables: at 160m 11.31 for
vanilla, 11.29 for spiral_b and 10.94 for spiral_l; at 1.4b 7.44, 7.30 and 7.14. Every
device has a part of the parameters (`mesh.fsdp=-1`). With a SLICE (LAYOUTS has them) micro-batches, `model.remat` and
`train.gather_core` are those that closed forms put first (`aot --search`); vanilla_mesh has vanilla's, the loops and
spiral_l have spiral_b's. Of those in tpu/predictions two were compiled and the faster is here; no chip has confirmed
it. Without a SLICE little memory is used, and `--config.train.accumulation` is to be raised until the activations fit.
"""

from typing import Any

from spiral_jax.errors import require
from spiral_jax.hardware import parse_slice
from spiral_jax.run.config import default_config

# width, heads, peak learning rate, layers of vanilla, of the full-resolution loop and Spiral-B (prelude, core, coda),
# of Spiral-L, and of one of vanilla_mesh's two inner blocks.
SIZES: dict[str, dict[str, Any]] = {
    "160m": dict(d_model=768, num_heads=12, peak=6e-4, vanilla=12, loop=(2, 4, 2), spiral_l=(4, 4, 4)),
    "410m": dict(d_model=1024, num_heads=16, peak=3e-4, vanilla=24, loop=(4, 8, 4), spiral_l=(8, 8, 8)),
    "1b": dict(d_model=2048, num_heads=8, peak=3e-4, vanilla=16, loop=(3, 5, 3), spiral_l=(5, 6, 5)),
    "1.4b": dict(d_model=2048, num_heads=16, peak=2e-4, vanilla=24, loop=(4, 8, 4), spiral_l=(8, 8, 8)),
}
# Of 512 sequences on a slice: micro-batches, model.remat, train.gather_core. `python -m tpu.predict` compiles them, and
# what comes second; for the points of tpu/predictions that were searched, the faster of the two is here.
LAYOUTS: dict[str, dict[str, dict[str, tuple[int, str, str]]]] = {
    "v5p:4x4x4": {
        "160m": {"vanilla": (1, "keep_products", "iteration"), "spiral_b": (1, "keep_products", "step")},
        "410m": {"vanilla": (1, "keep_products", "iteration"), "spiral_b": (1, "keep_products", "step")},
        "1b": {"vanilla": (1, "keep_products", "iteration"), "spiral_b": (1, "keep_products", "step")},
        "1.4b": {"vanilla": (1, "keep_products", "iteration"), "spiral_b": (1, "keep_products", "step")},
    },
    "v6e:8x8": {
        "160m": {"spiral_b": (1, "keep_attention", "step")},
        "410m": {"spiral_b": (1, "keep_products", "step")},
    },
}
LOOPS = ("base", "residual", "anchor", "anchor_star", "mesh")
FAMILIES = ("vanilla", "vanilla_mesh", *LOOPS, "spiral_b", "spiral_l")
# Whose layout a family takes.
NEIGHBOURS = dict.fromkeys(FAMILIES, "spiral_b") | {"vanilla": "vanilla", "vanilla_mesh": "vanilla"}


def get_config(argument: str = "160m,spiral_b"):
    """The configuration of `SIZE,FAMILY` or `SIZE,FAMILY,SLICE`."""
    size, _, family = argument.partition(",")
    family, _, where = family.partition(",")
    require(size in SIZES, "experiments/pile.py: the size", size, ", ".join(SIZES))
    require(family in FAMILIES, "experiments/pile.py: the family", family, ", ".join(FAMILIES))
    layout = SIZES[size]

    config = default_config()
    config.model.d_model = layout["d_model"]
    config.model.num_heads = layout["num_heads"]
    config.model.remat = "keep_inputs"
    chunks: tuple[int, ...]
    if family == "vanilla":
        layers, chunks, topology = (layout["vanilla"], 0, 0), (), "base"
    elif family in LOOPS:
        layers, chunks, topology = layout["loop"], (1, 1), family
    elif family == "vanilla_mesh":
        layers, chunks, topology = layout["loop"], (1, 1), "mesh"
        config.model.shared_core = False
    elif family == "spiral_b":
        layers, chunks, topology = layout["loop"], (8, 4, 2, 1), "mesh"
    else:
        layers, chunks, topology = layout["spiral_l"], (16, 8, 4, 2), "mesh"
    config.model.prelude_layers, config.model.core_layers, config.model.coda_layers = layers
    config.model.chunks = chunks
    config.model.topology = topology

    config.optimizer.peak_learning_rate = layout["peak"]
    config.mesh.data, config.mesh.fsdp = 1, -1
    config.evaluation.batches = 20
    config.checkpoint.every_steps = 500
    config.checkpoint.keep_every_steps = 10_000
    if where:
        chips = str(parse_slice(where, "experiments/pile.py: the slice"))
        found = {name: sizes[size] for name, sizes in LAYOUTS.items() if NEIGHBOURS[family] in sizes.get(size, ())}
        require(chips in found, f"experiments/pile.py: the slice of {size},{family}", chips, ", ".join(found))
        config.train.accumulation, config.model.remat, config.train.gather_core = found[chips][NEIGHBOURS[family]]
    return config
