"""Cached decoding against the full forward pass, with weights at unit scale."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow

from spiral_jax.decoding import cached, entry, state
from spiral_jax.errors import SpiralError
from spiral_jax.model.config import ModelConfig
from spiral_jax.model.pooling import Pooling, SelfAggregation, poolings
from spiral_jax.model.spiralformer import SpiralFormer

V, LENGTH, CAPACITY = 20, 40, 42
SMALL = ModelConfig(vocab_size=V, d_model=16, num_heads=2, prelude_layers=1, core_layers=1, coda_layers=1,
                    rotary_fraction=0.5, dtype="float32")  # fmt: skip


@poolings.register("kept_members")
class KeptMembers(SelfAggregation):
    """Self-aggregation whose pass of one token at a time is the one that follows from `pool`."""

    open, add, close = Pooling.open, Pooling.add, Pooling.close


def small(**fields) -> ModelConfig:
    return dataclasses.replace(SMALL, **fields)


# Offsets 2, 1, 1 let levels 4 and 2, and 3 and 2, close at one token: two rounds. Shifts: g - 1, g, beyond 2 g.
FAR = dict(chunks=(4, 3, 2), offsets=(0, 1, 1), shifts=(3, 3, 5))
FAST = {
    "spiral_b": small(chunks=(8, 4, 2, 1), topology="mesh", core_layers=2),
    "far": small(**FAR, topology="mesh", memory_slots=3, prelude_layers=0, pooling="mean", update_scale="linear"),
    "injection": small(chunks=(4, 2, 1), topology="injection"),
}
SLOW = {
    "between": small(chunks=(4, 1, 3, 3), topology="residual", coda_layers=0, allocation="uniform"),
    "vanilla": small(chunks=(), prelude_layers=2),
    "looped": small(chunks=(1, 1), topology="mesh"),
    "spiral_l": small(chunks=(16, 8, 4, 2), topology="mesh", core_layers=2),
    "spiral_l_all_outer": small(chunks=(16, 8, 4, 2), topology="anchor", prelude_layers=2, coda_layers=2),
    "unshared": small(chunks=(4, 4, 2, 1), topology="mesh", shared_core=False),
    "no_core": small(chunks=(4, 2, 1), core_layers=0, topology="mesh"),
    "no_outer": small(chunks=(4, 2, 1), prelude_layers=0, coda_layers=0, topology="anchor_star"),
    "beyond": small(chunks=(64, 2), topology="base"),
    "unrolled": small(chunks=(4, 2), core_layers=2, unroll=True, update_scale="none"),
    "gated": small(chunks=(4, 2, 1), topology="gated"),
    "injection_far": small(**FAR, topology="injection", shared_core=False),
    "kept": small(chunks=(5, 3, 1), offsets=(0, 2, 0), topology="gated", pooling="kept_members"),
    "no_rotary": small(chunks=(4, 2), rotary_fraction=0.0),
    **{
        f"{topology}_{pooling}_{allocation}_{scale}": small(
            **schedule, topology=topology, pooling=pooling, allocation=allocation, update_scale=scale
        )
        for topology, pooling, allocation, scale, schedule in [
            ("base", "self_aggregation", "learned", "sqrt", dict(chunks=(4, 2), offsets=(0, 0))),
            ("residual", "mean", "uniform", "linear", dict(chunks=(7, 5, 3), offsets=(3, 0, 2), shifts=(6, 4, 2))),
            ("anchor", "mean", "learned", "none", dict(chunks=(8, 4, 2, 1), shifts=(8, 4, 2, 0))),
            ("anchor_star", "self_aggregation", "uniform", "sqrt", dict(chunks=(3, 3), offsets=(1, 2), shifts=(9, 7))),
            ("mesh", "self_aggregation", "learned", "sqrt", dict(chunks=(6, 4), offsets=(5, 3), shifts=(12, 4))),
        ]
    },
}
CONFIGS = [
    *(
        pytest.param(config, id=name, marks=[pytest.mark.slow] * (name in ("far", "injection")))
        for name, config in FAST.items()
    ),
    *(pytest.param(config, id=name, marks=pytest.mark.slow) for name, config in SLOW.items()),
]
# One, shorter than every chunk but the smallest, not at a chunk's end, and the longest.
LENGTHS = np.array([1, 2, 5, 11])


def config_of_reference(config: ModelConfig) -> ModelConfig:
    """With a pooling that the reference knows, of the same function and parameters."""
    return dataclasses.replace(config, pooling=config.pooling.replace("kept_members", "self_aggregation"))


def tokens(rows: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, V, (rows, LENGTH))


def decode(config, params, tokens_BxL, lengths_B, padded=None):
    """Logits [B, steps, V] of a prefill and then one token at a time; row b's first is that of token lengths[b] - 1."""
    steps = LENGTH - int(np.max(lengths_B))
    P = padded or int(np.max(lengths_B))

    def run(params, prompts_BxP, next_BxM, lengths_B):
        empty = state.empty_state(config, len(lengths_B), CAPACITY)
        first_BxV, after = cached.prefill(SpiralFormer(config), params, prompts_BxP, lengths_B, empty)

        def body(carry, token_B):
            logits_BxV, carry = cached.step(SpiralFormer(config), params, token_B, carry)
            return carry, logits_BxV

        _, rest_MxBxV = jax.lax.scan(body, after, next_BxM.T)
        return jnp.concatenate([first_BxV[None], rest_MxBxV]).swapaxes(0, 1)

    prompts_BxP = np.full((len(lengths_B), P), V - 1)  # padding that would show
    for b, length in enumerate(lengths_B):
        prompts_BxP[b, :length] = tokens_BxL[b, :length]
    next_BxM = np.stack([row[length : length + steps] for row, length in zip(tokens_BxL, lengths_B, strict=True)])
    # A new function each time, so that what a test replaces is what runs.
    return np.asarray(jax.jit(run)(params, prompts_BxP, next_BxM, jnp.asarray(lengths_B)))


def expected(full_BxLxV, lengths_B, steps):
    return np.stack([row[n - 1 : n + steps] for row, n in zip(full_BxLxV, lengths_B, strict=True)])


def error(found, wanted) -> float:
    """The largest difference, relative to the logits' scale; no number is an infinite one."""
    return float(np.nan_to_num(np.max(np.abs(found - wanted)) / np.std(wanted), nan=np.inf))


@pytest.mark.parametrize("config", CONFIGS)
def test_cached_logits_are_those_of_the_full_pass(config, random_model, forward):
    """Ragged rows together; then a row alone, which has a program of its own, from its first token on."""
    _, _, params = random_model(config_of_reference(config))
    tokens_BxL = tokens(len(LENGTHS))
    full_BxLxV = forward(config, params, tokens_BxL)
    found = decode(config, params, tokens_BxL, LENGTHS)
    assert error(found, expected(full_BxLxV, LENGTHS, LENGTH - max(LENGTHS))) < 1e-4
    alone = decode(config, params, tokens_BxL[1:2], np.array([1]))
    assert alone.shape == (1, LENGTH, V)
    assert error(alone, full_BxLxV[1:2]) < 1e-4


@pytest.mark.slow
def test_where_the_prefill_ends_does_not_matter(random_model, forward):
    """From every length within a period of the schedule, in a bucket that is longer than the prompts."""
    config = FAST["spiral_b"]
    _, _, params = random_model(config)
    lengths_B = np.arange(1, 18)
    tokens_BxL = np.broadcast_to(tokens(1), (17, LENGTH))
    full_BxLxV = np.broadcast_to(forward(config, params, tokens(1)), (17, LENGTH, V))
    found = decode(config, params, tokens_BxL, lengths_B, padded=20)
    assert error(found, expected(full_BxLxV, lengths_B, LENGTH - 17)) < 1e-4


def misplaced(position_B, level):
    return LOCATE(position_B + 1, level)


def early(config, iteration, slots_BxRxD, position_B):
    return UPDATE(config, iteration, slots_BxRxD, jnp.maximum(position_B, iteration.level.shift))


def never_opens(position_B, level):
    return position_B == 0


def not_rescaled(self, chunk, place_B, h_BxD, level, linears):
    after = ADD(self, chunk, place_B, h_BxD, level, linears)
    weight_B = jnp.exp(linears["scorer"](h_BxD)[:, 0] - after.top_B)
    sum_BxD = chunk.sum_BxD + weight_B[:, None] * h_BxD
    return after._replace(total_B=chunk.total_B + weight_B, sum_BxD=sum_BxD)


def at_the_next_place(self, chunk, place_B, h_BxD, level, linears):
    return KEEP(self, chunk, (place_B + 1) % level.chunk, h_BxD, level, linears)


def at_the_place_of_the_first_row(model, params, token_B, before):
    logits_BxV, after = STEP(
        model, params, token_B, before._replace(position_B=jnp.full_like(before.position_B, before.position_B[0]))
    )
    return logits_BxV, after


LOCATE, UPDATE, ADD, KEEP, STEP = entry.locate, entry.update, SelfAggregation.add, Pooling.add, cached.step
BREAKS = [
    (entry, "locate", LOCATE),
    (entry, "locate", misplaced),
    (entry, "update", early),
    (entry, "opens", never_opens),
    (SelfAggregation, "add", not_rescaled),
    (KeptMembers, "add", at_the_next_place),
    (cached, "step", at_the_place_of_the_first_row),
]


@pytest.mark.parametrize(
    ("module", "name", "wrong"),
    [BREAKS[1], *(slow(*broken) for broken in (BREAKS[0], *BREAKS[2:]))],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_the_comparison_sees_a_broken_step(module, name, wrong, monkeypatch, random_model, forward):
    """Against the same comparison with nothing broken, the first case."""
    config = small(chunks=(4, 2), topology="mesh")
    _, _, params = random_model(config)
    tokens_BxL, lengths_B = tokens(2), np.array([1, 4])
    wanted = expected(forward(config, params, tokens_BxL), lengths_B, LENGTH - 4)
    if wrong is at_the_next_place:
        config = dataclasses.replace(config, pooling="kept_members")
    monkeypatch.setattr(module, name, wrong)
    found = error(decode(config, params, tokens_BxL, lengths_B), wanted)
    assert found < 1e-4 if wrong is LOCATE else found > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [misplaced, early], ids=lambda x: x.__name__)
@pytest.mark.parametrize("config", [case for case in CONFIGS if any(g > 1 for g in case.values[0].chunks)])
def test_the_comparison_sees_a_broken_step_in_every_case(config, wrong, monkeypatch, random_model, forward):
    """A place off by one; chunk 0 read before the shift is over."""
    _, _, params = random_model(config_of_reference(config))
    tokens_BxL, lengths_B = tokens(2), np.array([1, 4])
    wanted = expected(forward(config, params, tokens_BxL), lengths_B, LENGTH - 4)
    monkeypatch.setattr(entry, "locate" if wrong is misplaced else "update", wrong)
    assert error(decode(config, params, tokens_BxL, lengths_B), wanted) > 1e-3


def test_work_that_is_not_due_is_in_a_branch(random_model):
    """One row: a branch for every coarse iteration. Several: one for all of them, however many levels there are."""
    config = FAST["spiral_b"]
    _, _, params = random_model(config)

    def primitives(batch):
        empty = state.empty_state(config, batch, CAPACITY)
        jaxpr = jax.make_jaxpr(lambda *x: cached.step(SpiralFormer(config), *x))(params, jnp.zeros(batch, int), empty)
        return [equation.primitive.name for equation in jaxpr.jaxpr.eqns]

    # The scans over layers outside any branch are the prelude's, the full-resolution iteration's and the coda's.
    for batch, branches in ((1, 3), (3, 1)):
        found = primitives(batch)
        assert (found.count("cond"), found.count("scan")) == (branches, 3)


def wide_products(hlo: str, width: int) -> tuple[int, int]:
    """Matrix products of results this wide in a compiled program: (always run, in branches only)."""
    bodies, name, entry_name = {}, None, None
    for line in hlo.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
        if head:
            name = head[2]
            bodies[name] = []
            entry_name = name if head[1] else entry_name
        elif name:
            bodies[name].append(line)

    def reached(start, into_branches):
        seen, waiting = set(), [start]
        while waiting:
            at = waiting.pop()
            if at in seen:
                continue
            seen.add(at)
            for line in bodies[at]:
                if not into_branches and re.search(r"\bconditional\(", line):
                    continue
                waiting += [called for called in re.findall(r"%([\w.\-]+)", line) if called in bodies]
        return seen

    def products(names):
        is_wide = re.compile(rf"[\[,]{width}[\],]")
        return sum(" dot(" in line and bool(is_wide.search(line)) for name in names for line in bodies[name])

    always = reached(entry_name, False)
    return products(always), products(reached(entry_name, True) - always)


@pytest.mark.parametrize(
    ("batch", "chunks", "branches"),
    [(1, (8, 4, 2), 3), (3, (8, 4, 2), 1), slow(1, (4, 1), 1)],
)
def test_compiled_core_products_are_in_branches(batch, chunks, branches, random_model):
    """Without layers of the prelude and coda, what is as wide as an MLP is the core's: one product a run."""
    config = small(chunks=chunks, prelude_layers=0, coda_layers=0)
    _, _, params = random_model(config)
    empty = state.empty_state(config, batch, CAPACITY)
    step = jax.jit(lambda *x: cached.step(SpiralFormer(config), *x))
    hlo = step.lower(params, jnp.zeros(batch, int), empty).compile().as_text()
    fine = chunks.count(1)
    assert wide_products(hlo, config.d_ff) == (fine, branches)


def test_levels_closing_at_one_token():
    assert entry.most_at_once(list(small(chunks=(16, 8, 4, 2)).schedule), 64) == 1
    assert entry.most_at_once(list(small(chunks=(4, 2), offsets=(0, 0)).schedule), 64) == 2
    assert entry.most_at_once(list(small(chunks=(64,)).schedule), 8) == 0


def test_shapes_and_dtypes_of_the_state(random_model):
    config = small(chunks=(4, 1), shifts=(4, 0), dtype="bfloat16")
    found = state.empty_state(config, 3, 11)
    assert found.prelude.keys.shape == (1, 3, 11, 2, 8)
    coarse, fine = found.iterations
    assert (coarse.cache.keys.shape, fine.cache.values.shape) == ((1, 3, 3, 2, 8), (1, 3, 11, 2, 8))
    assert (coarse.zhat_BxRxD.shape, fine.open, fine.zhat_BxRxD) == ((3, 2, 16), None, None)
    assert {x.dtype.name for x in coarse.open} == {"float32"}
    assert {x.dtype.name for x in (*coarse.cache, *found.coda, coarse.zhat_BxRxD)} == {"bfloat16"}
    kept = state.empty_state(dataclasses.replace(config, pooling="kept_members"), 3, 11).iterations[0].open
    assert (kept.shape, kept.dtype.name) == ((3, 4, 16), "bfloat16")

    _, _, params = random_model(dataclasses.replace(config, dtype="float32"))
    read = jax.eval_shape(
        lambda *x: cached.prefill(SpiralFormer(config), *x), params, jnp.zeros((3, 5), int), jnp.ones(3, int), found
    )
    stepped = jax.eval_shape(lambda *x: cached.step(SpiralFormer(config), *x), params, jnp.zeros(3, int), found)
    kept = jax.tree.map(lambda x: (x.shape, x.dtype), found)
    for logits_BxV, after in (read, stepped):
        assert (logits_BxV.shape, logits_BxV.dtype) == ((3, V), jnp.float32)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == kept


def test_what_does_not_fit_is_refused(random_model):
    _, _, params = random_model(SMALL)
    with pytest.raises(SpiralError, match=r"^tokens of a decoding state is 0; allowed: 1 or more"):
        state.empty_state(SMALL, 1, 0)
    with pytest.raises(SpiralError, match=r"^shape of the prompts is \(2, 5\); allowed: 2 rows and 1 to 4 tokens"):
        cached.prefill(
            SpiralFormer(SMALL), params, jnp.zeros((2, 5), int), jnp.ones(2, int), state.empty_state(SMALL, 2, 4)
        )
