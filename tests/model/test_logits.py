"""Logits against the golden cases and against the NumPy reference, over random combinations of everything."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import reference
from cases import slow

from spiral_jax.convert.architecture import config_from_huggingface
from spiral_jax.convert.tensors import params_from_tensors
from spiral_jax.model.config import ModelConfig

VOCAB = 29
GOLDENS = sorted(path.parent.name for path in Path(__file__).parents[1].glob("golden/*/config.json"))
# Drawn from seed 140 on, so that what was drawn before stays.
LATER = ("gated", "injection")


def test_reference_reproduces_golden(golden):
    logits_BxLxV = reference.logits(golden.config, golden.tensors, golden.tokens_BxL)
    np.testing.assert_allclose(logits_BxLxV, golden.logits_BxLxV, rtol=0, atol=1e-9)


# The others are `slow`: what they have that these have not is in CHOSEN.
FEW = ("vanilla", "vanilla_mesh", "looped_mesh", "mesh_slots4", "spiral_b_mesh", "spiral_far_shift", "spiral_odd",
       "spiral_short")  # fmt: skip


@pytest.mark.parametrize(
    "golden",
    [name if name in FEW else slow(name) for name in GOLDENS],
    indirect=True,
)
@pytest.mark.parametrize("dtype, tolerance", [slow("float32", 2e-4), ("float64", 1e-9)])
def test_golden(golden, forward, dtype, tolerance):
    config = config_from_huggingface(golden.config, dtype)
    tensors = {name: tensor.astype(dtype) for name, tensor in golden.tensors.items()}
    logits_BxLxV = forward(config, params_from_tensors(config, tensors), golden.tokens_BxL)
    assert logits_BxLxV.dtype == dtype
    np.testing.assert_allclose(logits_BxLxV, golden.logits_BxLxV, rtol=0, atol=tolerance)


def combination(seed: int, length: int | None = None, **fixed) -> tuple[ModelConfig, np.ndarray]:
    """A random small model, with the fields in `fixed` as given, and tokens [2, L]."""
    rng = np.random.default_rng(seed)

    def pick(*options):
        return options[rng.integers(len(options))]

    length = length or int(rng.integers(1, 20))
    levels = []
    for _ in range(rng.integers(1, 5)):
        if levels and rng.random() < 0.4:
            levels.append(levels[-1])  # a run of equal levels, which is one scan
            continue
        g = pick(1, 2, 3, 4, 5, 7)
        levels.append((g, rng.integers(g), pick(g - 1, g - 1, g, g + 2, g + length) if g > 1 else 0))
    levels = fixed.pop("levels", levels)
    chunks, offsets, shifts = (tuple(int(level[i]) for level in levels) for i in range(3))
    d_model, num_heads = pick((16, 1), (24, 3), (32, 2))
    drawn = dict(
        prelude_layers=pick(0, 1, 2),
        core_layers=pick(0, 1, 2),
        coda_layers=pick(0, 1, 1),
        shared_core=rng.random() < 0.8,
        topology=pick(*(LATER if seed >= 140 else ("base", "residual", "anchor", "anchor_star", "mesh", "mesh"))),
        memory_slots=pick(None, 1, 2, 5),
        pooling=pick("self_aggregation", "mean"),
        allocation=pick("learned", "uniform"),
        update_scale=pick("sqrt", "linear", "none"),
        rotary_fraction=pick(0.25, 0.5, 1.0, 0.0),
        rotary_base=pick(10000.0, 100.0),
        layer_norm_epsilon=pick(1e-5, 1e-2),
    )
    drawn |= fixed
    if not drawn["prelude_layers"] + drawn["core_layers"] + drawn["coda_layers"]:
        drawn["coda_layers"] = 1  # a model has a layer
    sizes = dict(vocab_size=VOCAB, d_model=d_model, num_heads=num_heads, dtype="float64", scan_iterations_from=2)
    config = ModelConfig(**sizes, chunks=chunks, offsets=offsets, shifts=shifts, **drawn)
    return config, rng.integers(VOCAB, size=(2, length)).astype(np.int32)


# What must not be left to chance; the rest of each is drawn.
CHOSEN = {
    "loop_scanned": dict(levels=[(1, 0, 0)] * 3, topology="mesh", core_layers=2),
    "coarse_scanned": dict(levels=[(3, 1, 2)] * 3 + [(2, 1, 1)] * 2, topology="mesh", pooling="self_aggregation",
                           allocation="learned", core_layers=1, length=14, memory_slots=None),
    "residual_scanned": dict(levels=[(4, 2, 3)] * 2 + [(1, 0, 0)] * 2, topology="residual", core_layers=1, length=17),
    "scanned_between": dict(levels=[(2, 1, 1), (3, 2, 4), (3, 2, 4), (1, 0, 0)], topology="mesh", memory_slots=4,
                            core_layers=1, length=16),
    "one_slot": dict(levels=[(2, 1, 1), (1, 0, 0)], topology="mesh", memory_slots=1),
    "no_loop": dict(levels=[], topology="mesh", prelude_layers=1, coda_layers=1),
    "unshared": dict(levels=[(4, 2, 3), (4, 2, 3), (1, 0, 0)], topology="anchor", shared_core=False, core_layers=2),
    "odd": dict(levels=[(7, 3, 6), (5, 0, 4), (3, 2, 2)], topology="anchor", length=19, pooling="mean",
                allocation="learned", core_layers=1, update_scale="linear"),
    "no_core": dict(levels=[(4, 1, 3), (4, 1, 3), (2, 1, 1)], core_layers=0, prelude_layers=1, topology="mesh"),
    "core_alone": dict(levels=[(4, 3, 3), (2, 0, 1)], prelude_layers=0, coda_layers=0, core_layers=2,
                       topology="anchor_star", length=13),
    "length_1": dict(levels=[(4, 2, 3), (2, 1, 1), (1, 0, 0)], length=1, topology="residual"),
    "length_below_chunk": dict(levels=[(7, 1, 6), (7, 1, 6), (2, 0, 1)], length=3, topology="mesh", core_layers=1),
    "shift_above_chunk": dict(levels=[(3, 1, 8), (2, 1, 2)], length=17, topology="base", core_layers=1),
    "shift_above_length": dict(levels=[(2, 1, 9), (3, 1, 6), (1, 0, 0)], length=6, topology="mesh", core_layers=1),
    "offsets_apart": dict(levels=[(4, 0, 3), (4, 2, 3), (4, 2, 5)], length=15, topology="mesh", update_scale="none",
                          allocation="uniform", shared_core=True, core_layers=1),
    "gated_scanned": dict(levels=[(3, 1, 2)] * 2 + [(1, 0, 0)] * 2, topology="gated", core_layers=1,
                          shared_core=True, length=14),
    "gated_unshared": dict(levels=[(4, 2, 3), (2, 1, 1)], topology="gated", shared_core=False, core_layers=1),
    "injection_scanned": dict(levels=[(3, 1, 2)] * 2 + [(1, 0, 0)] * 2, topology="injection", core_layers=1,
                              prelude_layers=1, shared_core=True, length=14),
    "injection_unshared": dict(levels=[(1, 0, 0), (4, 2, 3)], topology="injection", shared_core=False, length=11),
}  # fmt: skip


def check(forward, random_model, config, tokens_BxL, seed, tolerance):
    hf_config, tensors, params = random_model(config, seed)
    if config.dtype == "float32":  # the reference sees the rounded weights
        tensors = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
    expected_BxLxV = reference.logits(hf_config, tensors, tokens_BxL)
    logits_BxLxV = forward(config, params, tokens_BxL)
    scale = max(1.0, np.abs(expected_BxLxV).max())
    np.testing.assert_allclose(logits_BxLxV, expected_BxLxV, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("name", CHOSEN)
def test_combination(name, forward, random_model):
    seed = list(CHOSEN).index(name)
    config, tokens_BxL = combination(seed, **CHOSEN[name])
    check(forward, random_model, config, tokens_BxL, seed, 1e-9)


@pytest.mark.parametrize(
    "name",
    ["coarse_scanned"] + [slow(name) for name in ("unshared", "shift_above_length")],
)
def test_combination_float32(name, forward, random_model):
    seed = list(CHOSEN).index(name)
    config, tokens_BxL = combination(seed, **CHOSEN[name])
    check(forward, random_model, dataclasses.replace(config, dtype="float32"), tokens_BxL, seed, 2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 160))
def test_random_combination(seed, forward, random_model):
    config, tokens_BxL = combination(seed)
    check(forward, random_model, config, tokens_BxL, seed, 1e-9)


def test_chosen_combinations_cover_the_options():
    configs = [combination(seed, **fixed)[0] for seed, fixed in enumerate(CHOSEN.values())]
    for field, values in {
        "topology": {"base", "residual", "anchor", "anchor_star", "mesh", "gated", "injection"},
        "pooling": {"self_aggregation", "mean"},
        "allocation": {"learned", "uniform"},
        "update_scale": {"sqrt", "linear", "none"},
        "shared_core": {True, False},
        "memory_slots": {None, 1, 4},
        "prelude_layers": {0, 1},
        "core_layers": {0, 1, 2},
        "coda_layers": {0, 1},
    }.items():
        coarse = [config for config in configs if any(g > 1 for g in config.chunks)]
        assert values <= {getattr(config, field) for config in coarse}, field
    scanned = [config for config in configs if any(config.scans(n) for _, n in config.runs)]
    assert {"mesh", "residual", "gated", "injection"} <= {config.topology for config in scanned}
    assert any(level.chunk > 1 and n > 2 and config.scans(n) for config in scanned for level, n in config.runs)
