"""Parameters and FLOPs: the papers' numbers, the formulas of `ModelConfig`, and what the model really holds."""

import csv
import dataclasses
import math
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from cases import slow

from spiral_jax.model.config import ModelConfig
from spiral_jax.model.spiralformer import SpiralFormer

# size: d, H, vanilla layers, layers of the full-resolution loops and Spiral-B, of Spiral-L, of Pythia+MeSH.
SIZES = {
    "160m": (768, 12, 12, (2, 4, 2), (4, 4, 4), (2, 4, 2)),
    "410m": (1024, 16, 24, (4, 8, 4), (8, 8, 8), (4, 8, 4)),
    "1b": (2048, 8, 16, (3, 5, 3), (5, 6, 5), (3, 5, 3)),
    "1.4b": (2048, 16, 24, (4, 8, 4), (8, 8, 8), (4, 8, 4)),
}
B, L = (8, 4, 2, 1), (16, 8, 4, 2)
# family: schedule, topology, column of SIZES.
FAMILIES = {
    "vanilla": ((), "base", 2),
    "vanilla_mesh": ((1, 1), "mesh", 5),
    "base": ((1, 1), "base", 3),
    "residual": ((1, 1), "residual", 3),
    "anchor": ((1, 1), "anchor", 3),
    "anchor_star": ((1, 1), "anchor_star", 3),
    "mesh": ((1, 1), "mesh", 3),
    "spiral_b": (B, "mesh", 3),
    "spiral_b_anchor": (B, "anchor", 3),
    "spiral_l": (L, "mesh", 4),
    "spiral_b_gated": (B, "gated", 3),
    "spiral_b_injection": (B, "injection", 3),
}
NON_EMBEDDING = {  # docs/spec.md sections 1 and 3
    "vanilla": (85_056_000, 302_311_424, 805_736_448, 1_208_602_624),
    "base": (56_704_512, 201_541_632, 553_945_088, 805_736_448),
    "residual": (56_704_512, 201_541_632, 553_945_088, 805_736_448),
    "anchor": (56_704_512, 201_541_632, 553_945_088, 805_736_448),
    "anchor_star": (56_704_512, 201_541_632, 553_945_088, 805_736_448),
    "mesh": (56_727_582, 201_572_382, 554_006_558, 805_797_918),
    "vanilla_mesh": (85_079_070, 302_342_174, 805_797_918, 1_208_664_094),
    "spiral_b": (56_771_412, 201_630_804, 554_123_348, 805_914_708),
    "spiral_l": (85_135_972, 302_418_020, 805_949_540, 1_208_815_716),
}
# Table 1 of the SpiralFormer paper.
TABLE = Path(__file__).parents[2] / "experiments/paper/main_table.csv"
PUBLISHED = list(csv.DictReader(TABLE.read_text(encoding="utf-8").splitlines()))


def paper_config(size: str, family: str) -> ModelConfig:
    d_model, num_heads = SIZES[size][:2]
    chunks, topology, column = FAMILIES[family]
    layers = SIZES[size][column]
    prelude, core, coda = (layers, 0, 0) if family == "vanilla" else layers
    return ModelConfig(d_model=d_model, num_heads=num_heads, prelude_layers=prelude, core_layers=core,
                       coda_layers=coda, chunks=chunks, topology=topology,
                       shared_core=family != "vanilla_mesh")  # fmt: skip


def parameter_shapes(config: ModelConfig, length: int = 1) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter by its path, nothing computed."""
    tokens_1xL = jax.ShapeDtypeStruct((1, length), jnp.int32)
    params = jax.eval_shape(SpiralFormer(config).init, jax.random.key(0), tokens_1xL)["params"]
    leaves = jax.tree.leaves_with_path(nn.meta.unbox(params))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}


def count(shapes: dict, *prefixes: str) -> int:
    return sum(math.prod(shape) for path, shape in shapes.items() if path.startswith(prefixes))


def own_counts(shapes: dict) -> tuple[int, int]:
    """Parameters of topologies, and of poolings and allocations."""
    own = {path: math.prod(shape) for path, shape in shapes.items() if path.startswith(("steps_", "entry/"))}
    scalers = sum(number for path, number in own.items() if path.split("/")[1] in ("scorer", "allocator"))
    return sum(own.values()) - scalers, scalers


# A size decides widths and depths, a family what else there is; all pairs are `slow`.
PAIRS = [(size, family) for size in SIZES for family in FAMILIES]
FEW = [(size, family) for size, family in PAIRS if size == "160m" or family in ("vanilla", "spiral_b")]


@pytest.mark.parametrize(("size", "family"), [pair if pair in FEW else slow(*pair) for pair in PAIRS])
def test_paper_models(size, family):
    config = paper_config(size, family)
    shapes = parameter_shapes(config)
    total = count(shapes, "")
    embeddings = count(shapes, "embed/", "head/")
    assert embeddings == 2 * 50304 * config.d_model
    assert config.total_parameters == total
    assert config.non_embedding_parameters == total - embeddings
    if family in NON_EMBEDDING:
        assert total - embeddings == NON_EMBEDDING[family][list(SIZES).index(size)]
    assert (config.router_parameters, config.scaler_parameters) == own_counts(shapes)


@pytest.mark.parametrize("size", SIZES)
def test_gates_and_injections(size):
    """One Linear d -> 1 or 2d -> d with bias per iteration; 4 L d^2 FLOPs for each of the latter, none for a gate."""
    base, gated, injection = (
        dataclasses.replace(paper_config(size, "spiral_b_anchor"), topology=topology)
        for topology in ("base", "gated", "injection")
    )
    d, T = base.d_model, 4
    assert gated.total_parameters - base.total_parameters == gated.router_parameters == T * (d + 1)
    assert injection.total_parameters - base.total_parameters == injection.router_parameters == T * (2 * d * d + d)
    assert gated.prefill_flops(4096) == base.prefill_flops(4096)
    assert injection.prefill_flops(4096) - base.prefill_flops(4096) == T * 4 * 4096 * d * d
    assert injection.train_flops_per_token(64) - base.train_flops_per_token(64) == pytest.approx(3 * T * 4 * d * d)


def test_router_example():
    """61,470 for Pythia-1.4B 4+8x{1,1}+4: d 2048, T 2, S 5."""
    assert paper_config("1.4b", "mesh").router_parameters == 61_470
    assert paper_config("1.4b", "anchor").router_parameters == 0


@pytest.mark.parametrize("size, layout", [("160m", "2+4+4+2"), ("410m", "4+8+8+4"), ("1b", "3+5+5+3"),
                                          ("1.4b", "4+8+8+4")])  # fmt: skip
def test_pythia_with_mesh_has_distinct_blocks(size, layout):
    config = paper_config(size, "vanilla_mesh")
    assert config.notation == layout
    assert config.stored_layers == config.unrolled_layers == SIZES[size][2]
    depth = {path: shape[0] for path, shape in parameter_shapes(config).items() if path.endswith("layers/qkv/kernel")}
    assert [depth[f"{part}/layers/qkv/kernel"] for part in ("prelude", "cores_0", "cores_1", "coda")] == [
        int(n) for n in layout.split("+")
    ]
    assert len(depth) == 4


@pytest.mark.parametrize("chunks", [(1,), (1, 1, 1), (4, 4, 1), (3, 2, 3, 3)])
@pytest.mark.parametrize("topology", ["residual", "mesh"])
def test_core_is_stored_once(chunks, topology):
    """Per path: one copy of each core parameter, stacked over core layers only, however often the core runs."""
    d, T = 12, len(chunks)
    config = ModelConfig(vocab_size=31, d_model=d, num_heads=1, rotary_fraction=0.5, prelude_layers=2, core_layers=5,
                         coda_layers=3, chunks=chunks, topology=topology)  # fmt: skip
    shapes = parameter_shapes(config, length=9)
    layer = {
        "attention_norm/bias": (d,),
        "attention_norm/scale": (d,),
        "mlp_norm/bias": (d,),
        "mlp_norm/scale": (d,),
        "qkv/kernel": (d, 1, 3, 12),
        "qkv/bias": (1, 3, 12),
        "out/kernel": (1, 12, d),
        "out/bias": (d,),
        "mlp_up/kernel": (d, 4 * d),
        "mlp_up/bias": (4 * d,),
        "mlp_down/kernel": (4 * d, d),
        "mlp_down/bias": (d,),
    }
    expected = {
        f"{stack}/layers/{name}": (depth, *shape)
        for stack, depth in (("prelude", 2), ("core", 5), ("coda", 3))
        for name, shape in layer.items()
    }
    expected |= {"embed/embedding": (31, d), "head/kernel": (d, 31), "final_norm/scale": (d,), "final_norm/bias": (d,)}
    for t, g in enumerate(chunks):
        if g > 1:
            expected[f"steps_{t}/scorer/kernel"] = (d, 1)
            expected[f"steps_{t}/allocator/kernel"] = (d, g)
            expected[f"steps_{t}/allocator/bias"] = (g,)
    if topology == "mesh":
        for group in ("entry", *(f"steps_{t}" for t in range(T))):
            for side in ("write", "read"):
                expected[f"{group}/{side}/kernel"] = (d, T + 3)
                expected[f"{group}/{side}/bias"] = (T + 3,)
    assert shapes == expected
    assert count(shapes, "") == config.total_parameters
    assert count(shapes, "core") == 5 * (12 * d**2 + 13 * d)


def test_parameters_do_not_depend_on_the_length_at_init():
    """Not even on one so short that no chunk closes and the core never runs."""
    config = ModelConfig(vocab_size=31, d_model=16, num_heads=1, chunks=(16, 16), topology="mesh")
    assert parameter_shapes(config, 1) == parameter_shapes(config, 30)


@pytest.mark.parametrize(
    "fields",
    [
        dict(pooling="mean"),
        dict(allocation="uniform"),
        dict(pooling="mean", allocation="uniform"),
        dict(memory_slots=1),
        dict(memory_slots=9),
        dict(shared_core=False),
        dict(core_layers=0),
        dict(prelude_layers=0, coda_layers=0),
        dict(chunks=()),
        dict(chunks=(), topology="anchor"),
        dict(chunks=(), shared_core=False),
    ],
)
def test_counts_of_variants(fields):
    config = ModelConfig(**(dict(vocab_size=31, d_model=16, num_heads=1, chunks=(4, 4, 1)) | fields))
    shapes = parameter_shapes(config)
    assert config.total_parameters == count(shapes, "")
    assert (config.router_parameters, config.scaler_parameters) == own_counts(shapes)
    layers = {path: shape[0] for path, shape in shapes.items() if path.endswith("qkv/bias")}
    assert config.stored_layers == sum(layers.values())


# FLOPs


def test_prefill_flops_of_every_published_row():
    """Within 1.5 % is asked for; 1.2 % is reached, and the parameters agree to the digits printed."""
    assert len(PUBLISHED) == 22
    deviations = []
    for row in PUBLISHED:
        config = paper_config(row["size"], row["family"])
        assert config.notation == row["layers"]
        deviations.append(abs(config.prefill_flops(4096) / (float(row["prefill_teraflop"]) * 1e12) - 1))
        assert deviations[-1] < 0.015, row
        assert abs(config.non_embedding_parameters / 1e6 - float(row["non_embedding_millions"])) < 0.0501, row
        # The papers' totals hold 2 d^2 more, unexplained (docs/spec.md section 1).
        assert abs((config.total_parameters + 2 * config.d_model**2) / 1e6 - float(row["total_millions"])) < 0.11, row
    assert max(deviations) < 0.012


def counted_flops(config: ModelConfig, length: int, causal: bool) -> int:
    """FLOPs of a forward pass, by walking over layers and tokens: 2 per multiply-add, matmuls only."""
    d, flops = config.d_model, 0
    lengths = [length] * (config.prelude_layers + config.coda_layers)
    for g, w in zip(config.chunks, config.offsets or [g // 2 for g in config.chunks], strict=True):
        chunks = [(i + w) // g for i in range(length)]
        closed = sum((i + w) % g == g - 1 for i in range(length))
        assert closed <= len(set(chunks))
        lengths += [closed] * config.core_layers
    for n in lengths:
        for i in range(n):
            flops += 2 * d * 3 * d  # qkv
            flops += 2 * 2 * d * (i + 1 if causal else n)  # scores and their sum over values
            flops += 2 * d * d  # out
            flops += 2 * 2 * d * 4 * d  # MLP
    return flops + sum(2 * d * config.vocab_size for _ in range(length))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 7, 64, 101])
@pytest.mark.parametrize("fields", [dict(), dict(chunks=()), dict(chunks=(16, 3, 3), offsets=(0, 2, 1)),
                                    dict(chunks=(1, 1), shared_core=False), dict(core_layers=0)])  # fmt: skip
def test_flops_match_a_count(fields, length, causal):
    config = ModelConfig(**(dict(vocab_size=100, d_model=12, num_heads=1, rotary_fraction=0.5) | fields))
    expected = counted_flops(config, length, causal)
    assert config.prefill_flops(length, causal=causal) == expected
    assert config.train_flops_per_token(length, causal=causal) == pytest.approx(3 * expected / length, rel=1e-12)


def test_flops_default_to_the_papers_convention():
    config = paper_config("160m", "spiral_b")
    assert config.prefill_flops() == config.prefill_flops(4096, causal=False)
    assert config.train_flops_per_token(4096) == config.train_flops_per_token(4096, causal=False)
