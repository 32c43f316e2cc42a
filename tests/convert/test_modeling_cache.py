"""The PyTorch model that travels with exported weights: its cache, and `generate`."""

import collections

import numpy as np
import pytest
from cases import slow
from exported import GOLDEN, close, full, in_calls, padded, random_tokens, spiral, torch, transformers

from spiral_jax.convert.modeling_spiralformer import SpiralFormerCache

LOOPED = sorted(p.parent.name for p in GOLDEN.glob("*/config.json") if "spiralformer" in p.read_text())
# Every kind of schedule, and most topologies.
FEW = ("looped_anchor", "looped_mesh", "spiral_b_mesh", "spiral_far_shift", "spiral_odd", "spiral_residual_none",
       "spiral_short", "spiral_star")  # fmt: skip


pytestmark = pytest.mark.usefixtures("trusted_code")


@pytest.mark.parametrize("name", [name if name in FEW else slow(name) for name in LOOPED])
def test_cached_decoding_equals_the_full_pass(name, golden_model):
    """Token by token, after prompts of many lengths, and in calls that cross chunks; 45 tokens."""
    model = golden_model(name)
    tokens = random_tokens(model, 2, 45)
    want = full(model, tokens)
    for sizes in ([1], [2, 1], [3, 1], [17, 1], [16, 1], [5, 3, 1, 11, 2, 7], [45]):
        close(in_calls(model, tokens, sizes), want)


def test_the_core_runs_once_per_chunk(golden_model):
    """Of one sequence: iteration t's core sees each chunk when it closes, and never otherwise."""
    for name in ("spiral_b_mesh", "spiral_l_mesh", "spiral_odd", "spiral_far_shift"):
        model = golden_model(name)
        runs = collections.defaultdict(list)
        hook = model.spiralformer.core[0].register_forward_pre_hook(
            lambda _, args, kwargs, runs=runs: runs[kwargs["name"]].append(args[0].shape[1]), with_kwargs=True
        )
        try:
            tokens = random_tokens(model, 1, 41)
            for prompt in (1, 14):
                runs.clear()
                in_calls(model, tokens, [prompt, 1])
                for t, (g, w, _) in enumerate(model.config.levels):
                    closed = [(end + w) // g for end in range(prompt, 42)]
                    steps = np.diff([0, *closed])
                    assert runs[f"core.{t}.0"] == [n for n in steps if n], (name, t)
        finally:
            hook.remove()


def test_running_scores_that_grow():
    """A chunk's largest score arriving last, or first, leaves nothing behind in the running sums."""
    model = spiral([(8, 3, 7), (1, 0, 0)])
    with torch.no_grad():
        model.spiralformer.steps[0].scorer.weight *= 200
    tokens = random_tokens(model, 2, 30)
    close(in_calls(model, tokens, [1]), full(model, tokens))


def test_other_caches_are_refused():
    model = spiral([(4, 2, 3), (1, 0, 0)])
    tokens = random_tokens(model, 1, 5)
    with pytest.raises(TypeError, match="SpiralFormerCache"):
        model(tokens, past_key_values=transformers.DynamicCache())
    with pytest.raises(ValueError, match="cache_implementation"):
        model.generate(tokens, max_new_tokens=2, cache_implementation="static")


@pytest.mark.parametrize("name", ["spiral_b_mesh", "spiral_residual_none", "spiral_far_shift"])
def test_tokens_taken_back(name, golden_model):
    """Cropped to any length since the mark, also inside a call, what follows is as if they had never been there."""
    model = golden_model(name)
    rows = [random_tokens(model, 40), random_tokens(model, 31, seed=1)]
    tokens, mask = padded(rows)
    want = full(model, tokens, mask)[:, 30:]
    wrong = random_tokens(model, 2, 40, seed=2)
    for kept in (21, 25, 26, 29, 30):
        cache = SpiralFormerCache()
        in_calls(model, tokens[:, :21], [21], mask, cache)
        cache.activate_past_recording()
        mixed = torch.cat([tokens[:, :kept], wrong], dim=1)[:, 21:35]
        seen = 21
        for size in (5, 1, 8):
            with torch.no_grad():
                model(mixed[:, seen - 21 : seen - 21 + size], past_key_values=cache)
            seen += size
        cache.crop(-(35 - kept))
        assert cache.get_seq_length() == kept
        got = in_calls(model, tokens[:, kept:], [30 - kept, 1] if kept < 30 else [1], cache=cache)
        close(got[:, 30 - kept :], want)


def test_what_crop_refuses():
    model = spiral([(4, 2, 3), (1, 0, 0)])
    cache = model(random_tokens(model, 1, 5)).past_key_values
    with pytest.raises(ValueError, match="negative"):
        cache.crop(2)
    with pytest.raises(ValueError, match="only take back"):
        cache.crop(-1)
    cache.crop(0)
    cache.activate_past_recording()
    with pytest.raises(ValueError, match="only take back"):
        cache.crop(-1)


def test_rows_of_a_cache(golden_model):
    """Repeated, selected and reordered, a cache goes on as its rows would."""
    model = golden_model("spiral_odd")
    rows = [random_tokens(model, 9), random_tokens(model, 12, seed=1)]
    tokens, mask = padded(rows)
    cache = SpiralFormerCache()
    cache.batch_repeat_interleave(2)
    in_calls(model, tokens, [12], mask, cache)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 1, 0]))
    more = random_tokens(model, 3, 9, seed=2)
    got = in_calls(model, more, [1], cache=cache)
    for b, row in enumerate((rows[1], rows[0], rows[0])):
        close(got[b], full(model, torch.cat([row, more[b]])[None])[0, len(row) :])
    cache.reset()
    close(in_calls(model, tokens[1:], [1], cache=cache), full(model, tokens[1:]))


def greedy(model, row, count):
    """The argmax over full passes, token by token; never token 0, which is the padding."""
    for _ in range(count):
        row = torch.cat([row, full(model, row[None])[0, -1:, 1:].argmax(-1) + 1])
    return row


GENERATE = {"max_new_tokens": 22, "do_sample": False, "pad_token_id": 0, "suppress_tokens": [0]}


@pytest.mark.parametrize(
    "name",
    ["spiral_b_mesh"] + [slow(name) for name in ("spiral_odd", "spiral_far_shift", "vanilla_mesh")],
)
def test_generate_greedy(name, golden_model):
    """Prompts of one token, shorter than a chunk and longer, alone and as a ragged batch, prefilled whole or not."""
    model = golden_model(name)
    rows = [random_tokens(model, length, seed=length) for length in (1, 3, 14)]
    want = [greedy(model, row, 22) for row in rows]
    assert len({int(token) for row in want for token in row}) > 5
    for row, expected in zip(rows, want, strict=True):
        assert model.generate(row[None], **GENERATE)[0].tolist() == expected.tolist()
    tokens, mask = padded(rows)
    for options in ({}, {"use_cache": False}, {"prefill_chunk_size": 4}):
        got = model.generate(tokens, attention_mask=mask, **GENERATE, **options)
        for row, expected in zip(got, want, strict=True):
            assert row[-len(expected) :].tolist() == expected.tolist(), options


def test_generate_beams(golden_model):
    """With a cache, which follows the beams, as without."""
    model = golden_model("spiral_b_mesh")
    tokens, mask = padded([random_tokens(model, 4), random_tokens(model, 11, seed=1)])
    beams = {"num_beams": 3, "num_return_sequences": 2}
    got, want = (
        model.generate(tokens, attention_mask=mask, **GENERATE, **beams, use_cache=use_cache).tolist()
        for use_cache in (True, False)
    )
    assert got == want
    assert got[0] != model.generate(tokens, attention_mask=mask, **GENERATE)[0].tolist()


@pytest.mark.parametrize("assistant", ["prompt_lookup", "other", "itself"])
def test_generate_assisted(assistant, golden_model):
    """Candidates accepted and rejected, whoever makes them, change nothing."""
    model = golden_model("spiral_b_mesh")
    row = greedy(model, random_tokens(model, 6), 3)
    options = {
        "prompt_lookup": {"prompt_lookup_num_tokens": 3},
        "other": {"assistant_model": golden_model("spiral_l_mesh")},
        "itself": {"assistant_model": model},
    }[assistant]
    lengths = []
    hook = model.spiralformer.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    try:
        got = model.generate(row[None], **GENERATE, **options)[0]
    finally:
        hook.remove()
    assert any(length > 1 for length in lengths[1:])  # candidates there were
    assert got.tolist() == greedy(model, row, 22).tolist()


def test_generate_goes_on_from_a_cache(golden_model):
    """A conversation: the cache of one call is the start of the next."""
    model = golden_model("spiral_b_mesh")
    row, cache = random_tokens(model, 5), SpiralFormerCache()
    first = model.generate(row[None], past_key_values=cache, **GENERATE)
    longer = torch.cat([first, random_tokens(model, 1, 6, seed=3)], dim=1)
    runs = []
    hook = model.spiralformer.register_forward_pre_hook(lambda _, args: runs.append(args[0].shape[1]))
    try:
        second = model.generate(longer, past_key_values=cache, **GENERATE)
    finally:
        hook.remove()
    assert runs[0] == 7  # the last token of the first answer, which no call has seen, and the six new ones
    assert second[0].tolist() == greedy(model, longer[0], 22).tolist()
