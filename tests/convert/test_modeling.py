"""The PyTorch model that travels with exported weights: against the goldens, our JAX model, and itself with a cache."""

import collections
import copy
import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import reference

torch = pytest.importorskip("torch", reason="the exported model's PyTorch code needs torch (extra `hf`)")
transformers = pytest.importorskip("transformers", reason="the exported model's code needs transformers (extra `hf`)")

from safetensors.numpy import load_file, save_file  # noqa: E402

from spiral_jax.convert.architecture import config_from_huggingface  # noqa: E402
from spiral_jax.convert.configuration_spiralformer import SpiralFormerConfig  # noqa: E402
from spiral_jax.convert.modeling_spiralformer import (  # noqa: E402
    Span,
    SpiralFormerCache,
    SpiralFormerForCausalLM,
    SpiralFormerModel,
)
from spiral_jax.convert.tensors import params_from_tensors  # noqa: E402

GOLDEN = Path(__file__).parent.parent / "golden"
LOOPED = sorted(p.parent.name for p in GOLDEN.glob("*/config.json") if "spiralformer" in p.read_text())
CODE = Path(importlib.util.find_spec("spiral_jax.convert").origin).parent
FILES = ("configuration_spiralformer.py", "modeling_spiralformer.py")
AUTO_MAP = {
    "AutoConfig": "configuration_spiralformer.SpiralFormerConfig",
    "AutoModelForCausalLM": "modeling_spiralformer.SpiralFormerForCausalLM",
}
DTYPES = {"float32": (torch.float32, 2e-4), "float64": (torch.float64, 1e-9)}


pytestmark = pytest.mark.usefixtures("trusted_code")


def make(config: dict, tensors: dict, dtype=torch.float64) -> SpiralFormerForCausalLM:
    """The model of an exported folder's contents, for evaluation. Every tensor must have its place."""
    model = SpiralFormerForCausalLM(SpiralFormerConfig(**config))
    model.load_state_dict({name: torch.tensor(tensor) for name, tensor in tensors.items()}, strict=True)
    return model.to(dtype).eval()


@pytest.fixture(scope="session")
def golden_model():
    """Name to a golden's model in float64."""
    models = {}

    def load(name):
        if name not in models:
            config = json.loads((GOLDEN / name / "config.json").read_text())
            models[name] = make(config, load_file(GOLDEN / name / "model.safetensors"))
        return models[name]

    return load


def spiral(levels, seed=1, **fields) -> SpiralFormerForCausalLM:
    """A random model whose scorers, allocators and routers are far from zero."""
    config = {
        "model_type": "spiralformer", "hidden_act": "gelu", "tie_word_embeddings": False, "vocab_size": 29,
        "hidden_size": 24, "intermediate_size": 96, "num_attention_heads": 3, "rotary_pct": 0.5,
        "rotary_emb_base": 10000, "layer_norm_eps": 1e-5, "max_position_embeddings": 64, "prelude_layers": 1,
        "core_layers": 1, "coda_layers": 1, "shared_core": True, "topology": "mesh", "pooling": "self_aggregation",
        "allocation": "learned", "update_scale": "sqrt",
        "schedule": [dict(zip(("chunk", "offset", "shift"), level, strict=True)) for level in levels],
    } | fields  # fmt: skip
    if config["topology"] == "mesh":
        config.setdefault("memory_slots", len(levels) + 3)
    tensors = reference.random_tensors(config, np.random.default_rng(seed))
    for name, tensor in tensors.items():
        if ".scorer." in name:
            tensor *= 3  # scores that grow along a chunk are where a running softmax can go wrong
    return make(config, tensors)


def random_tokens(model, *shape, seed=0) -> torch.Tensor:
    return torch.tensor(np.random.default_rng(seed).integers(1, model.config.vocab_size, shape))


@torch.no_grad()
def full(model, tokens_BxL, mask_BxL=None):
    return model(tokens_BxL, attention_mask=mask_BxL, use_cache=False).logits


@torch.no_grad()
def in_calls(model, tokens_BxL, sizes, mask_BxL=None, cache=None):
    """Logits of calls of these sizes with a cache, the last size repeated to the end."""
    logits, seen = [], 0
    for size in [*sizes, *[sizes[-1]] * tokens_BxL.shape[1]]:
        end = min(seen + size, tokens_BxL.shape[1])
        if end > seen:
            mask = None if mask_BxL is None else mask_BxL[:, :end]
            out = model(tokens_BxL[:, seen:end], attention_mask=mask, past_key_values=cache, use_cache=True)
            cache, seen = out.past_key_values, end
            logits.append(out.logits)
    return torch.cat(logits, dim=1)


def close(got, want, atol=1e-9):
    torch.testing.assert_close(got, want, atol=atol, rtol=0)


def padded(rows, side="left"):
    """Rows of different lengths as one batch and its mask."""
    L = max(len(row) for row in rows)
    tokens, mask = torch.zeros(len(rows), L, dtype=torch.long), torch.zeros(len(rows), L, dtype=torch.long)
    for b, row in enumerate(rows):
        at = slice(L - len(row), L) if side == "left" else slice(len(row))
        tokens[b, at], mask[b, at] = row, 1
    return tokens, mask


# Loading


def export(folder, config: dict, tensors: dict) -> Path:
    """A folder as the export writes it."""
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": AUTO_MAP}))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name in FILES:
        shutil.copy(CODE / name, folder)
    return folder


@pytest.mark.parametrize("dtype", DTYPES)
def test_goldens_load_and_agree(golden, dtype, tmp_path):
    """Through AutoModelForCausalLM, with every tensor in its place; vanilla is transformers' own GPT-NeoX."""
    vanilla = golden.config["model_type"] == "gpt_neox"
    if vanilla:
        (tmp_path / "config.json").write_text(json.dumps(golden.config))
        save_file(golden.tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    else:
        export(tmp_path, golden.config, golden.tensors)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, trust_remote_code=not vanilla, dtype=DTYPES[dtype][0], output_loading_info=True
    )
    assert not any(info.values()), info
    assert type(model).__name__ == golden.config["architectures"][0]
    assert type(model).__module__.startswith("transformers.models" if vanilla else "transformers_modules")
    # transformers keeps GPT-NeoX's rotary angles in float32, whatever the model's dtype.
    atol = 2e-4 if vanilla else DTYPES[dtype][1]
    logits = full(model, torch.tensor(golden.tokens_BxL, dtype=torch.long))
    assert logits.dtype == DTYPES[dtype][0]
    close(logits.double(), torch.tensor(golden.logits_BxLxV), atol)


def test_save_and_load_again(tmp_path):
    """Saved by transformers: same tensors under the same names, the same config fields, and the code beside them."""
    (tmp_path / "first").mkdir()
    config = json.loads((GOLDEN / "spiral_b_mesh" / "config.json").read_text())
    tensors = load_file(GOLDEN / "spiral_b_mesh" / "model.safetensors")
    first = export(tmp_path / "first", config, tensors)
    model = transformers.AutoModelForCausalLM.from_pretrained(first, trust_remote_code=True)
    model.save_pretrained(tmp_path / "second")
    saved = json.loads((tmp_path / "second" / "config.json").read_text())
    ours = {field: value for field, value in config.items() if field != "torch_dtype"}
    assert {field: saved.get(field) for field in ours} == ours
    assert {name: target.split("--")[-1] for name, target in saved["auto_map"].items()} == AUTO_MAP
    again = load_file(tmp_path / "second" / "model.safetensors")
    assert again.keys() == tensors.keys()
    assert all(again[name].tobytes() == tensor.tobytes() for name, tensor in tensors.items())
    assert {path.name for path in (tmp_path / "second").glob("*.py")} >= set(FILES)
    tokens = random_tokens(model, 1, 20)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "second", trust_remote_code=True)
    assert torch.equal(full(loaded, tokens), full(model, tokens))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schedule": [{"chunk": 4, "offset": 1, "shift": 2}]}, r"schedule\[0\].*sees? the future"),
        ({"schedule": [{"chunk": 1, "offset": 0, "shift": 1}]}, "shift must be 0"),
        ({"schedule": [{"chunk": 4, "offset": 4, "shift": 3}]}, "0 <= offset < chunk"),
        ({"hidden_act": "gelu_new"}, "hidden_act"),
        ({"topology": "ring"}, "topology is 'ring'"),
        ({"tie_word_embeddings": True}, "untied"),
        ({"rotary_pct": 0.05}, "even"),
        ({"num_attention_heads": 7}, "does not divide"),
    ],
)
def test_config_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        SpiralFormerConfig(**fields)


# The function


JAX_CASES = {
    "anchor": dict(levels=[(5, 3, 4), (1, 0, 0)], topology="anchor"),
    "residual_mean": dict(levels=[(4, 3, 4), (3, 0, 2)], topology="residual", pooling="mean", update_scale="linear"),
    "star_uniform": dict(levels=[(3, 2, 8)], topology="anchor_star", allocation="uniform", update_scale="none"),
    "base_no_core": dict(levels=[(4, 2, 3), (1, 0, 0)], topology="base", core_layers=0),
    "mesh": dict(levels=[(8, 3, 7), (4, 1, 13), (2, 1, 2), (1, 0, 0)]),
    "unshared_mesh": dict(levels=[(2, 0, 1), (1, 0, 0)], shared_core=False, memory_slots=3, core_layers=2),
    "no_outside": dict(levels=[(3, 1, 3), (1, 0, 0)], prelude_layers=0, coda_layers=0),
    "gated": dict(levels=[(4, 3, 3), (2, 0, 2), (1, 0, 0)], topology="gated"),
    "injection": dict(levels=[(4, 1, 3), (2, 1, 1), (1, 0, 0)], topology="injection"),
}


@pytest.mark.parametrize("name", JAX_CASES)
def test_agrees_with_jax(name, forward):
    model = spiral(**JAX_CASES[name])
    config = config_from_huggingface(model.config.to_dict(), dtype="float64")
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    tokens = random_tokens(model, 2, 23)
    want = forward(config, params_from_tensors(config, tensors), tokens.numpy())
    assert np.abs(want).max() > 1
    close(full(model, tokens), torch.tensor(want))
    close(in_calls(model, tokens, [4, 1]), torch.tensor(want))


def test_bfloat16_computes_wide_where_it_must(golden_model):
    """Close to float64, float32 logits, and a cache that makes no difference beyond rounding."""
    model = golden_model("spiral_b_mesh")
    tokens = random_tokens(model, 2, 40)
    want = full(model, tokens)
    config, state = model.config, model.state_dict()
    narrow = SpiralFormerForCausalLM(config).to(torch.bfloat16).eval()
    narrow.load_state_dict(state)
    logits = full(narrow, tokens)
    assert logits.dtype == torch.float32
    assert narrow(tokens).past_key_values.open[0].sum_BxD.dtype == torch.float32
    assert (logits - want).abs().mean() < 0.05 * want.abs().mean()
    assert (in_calls(narrow, tokens, [7, 1]) - want).abs().mean() < 0.05 * want.abs().mean()


@torch.no_grad()
def test_bfloat16_operators_round_once():
    """Pooling (in one call and token by token), allocation and routing: the exact result, rounded at the end."""
    narrow = spiral([(8, 3, 7), (1, 0, 0)]).bfloat16().spiralformer
    h_1xLxD = torch.tensor(np.random.default_rng(0).standard_normal((1, 45, 24))).bfloat16()
    results = {}
    for calls in (1, 45):
        for dtype in (torch.bfloat16, torch.float64):
            model, h, cache, chunks = copy.deepcopy(narrow).to(dtype), h_1xLxD.to(dtype), SpiralFormerCache(), []
            for i, part in enumerate(h.chunk(calls, dim=1)):
                size = part.shape[1]
                tokens = Span(model.config, torch.tensor([i * size]), torch.tensor([size]), part)
                chunks.append(model.steps[0].down_scale(part, tokens, cache)[0])
            tokens = Span(model.config, torch.tensor([0]), torch.tensor([45]), h)
            routed = model.memory[1](h, h.flip(1), [(h.roll(1, 1), torch.full((5,), 0.25, dtype=dtype))])
            results[dtype] = [torch.cat(chunks, 1), model.steps[0].up_scale(h[:, :6], tokens), routed]
        for got, exact in zip(results[torch.bfloat16], results[torch.float64], strict=True):
            assert got.dtype == torch.bfloat16
            assert (got != exact.bfloat16()).double().mean() < 0.01  # where float32 falls on the other side


def test_loss_hidden_states_and_logits_to_keep(golden_model):
    model = golden_model("spiral_b_mesh")
    tokens = random_tokens(model, 2, 13)
    labels = tokens.clone()
    labels[0, :5] = -100
    out = model(tokens, labels=labels, output_hidden_states=True)
    scores = full(model, tokens).log_softmax(-1)
    terms = [scores[b, i, labels[b, i + 1]] for b in range(2) for i in range(12) if labels[b, i + 1] >= 0]
    close(out.loss, -sum(terms) / len(terms))
    assert len(out.hidden_states) == len(model.config.schedule) + 3
    close(model.embed_out(out.hidden_states[-1]), out.logits)
    close(out.hidden_states[0], model.get_input_embeddings()(tokens))
    close(model(tokens, logits_to_keep=3).logits, out.logits[:, -3:])
    close(model(inputs_embeds=out.hidden_states[0]).logits, out.logits)
    logits, cache = model(tokens, return_dict=False)
    close(logits, out.logits)
    assert isinstance(cache, SpiralFormerCache)


def test_gradients_are_finite_and_reach_every_parameter():
    model = spiral([(4, 2, 3), (2, 1, 1), (1, 0, 0)]).train()
    tokens, mask = padded([random_tokens(model, 15), random_tokens(model, 9)])
    out = model(tokens, attention_mask=mask, labels=tokens.masked_fill(mask == 0, -100))
    assert out.past_key_values is None
    out.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_fresh_weights():
    """Initialised as for training: zero scorers and allocators, random routers, small outputs."""
    config = SpiralFormerConfig(
        vocab_size=200, hidden_size=160, num_attention_heads=4, core_layers=2,
        schedule=[{"chunk": 4, "offset": 2, "shift": 3}, {"chunk": 1, "offset": 0, "shift": 0}],
    )  # fmt: skip
    std = {
        name: p.detach().std().item() for name, p in SpiralFormerForCausalLM(config).named_parameters() if p.numel() > 1
    }
    small, unrolled = (2 / (5 * 160)) ** 0.5, 2 + 2 * 2 + 2
    assert std["embed_out.weight"] == pytest.approx(small, rel=0.05)
    assert std["spiralformer.embed_in.weight"] == pytest.approx(small * 160**0.5, rel=0.05)
    assert std["spiralformer.core.0.mlp.dense_h_to_4h.weight"] == pytest.approx(small, rel=0.05)
    for name in ("attention.dense", "mlp.dense_4h_to_h"):
        assert std[f"spiralformer.coda.1.{name}.weight"] == pytest.approx(small / (2 * unrolled) ** 0.5, rel=0.05)
    assert std["spiralformer.steps.0.scorer.weight"] == std["spiralformer.steps.0.allocator.weight"] == 0
    assert std["spiralformer.memory.0.write.weight"] == pytest.approx((2 / (5 * 160)) ** 0.5, rel=0.1)


# Padding


@pytest.mark.parametrize("name", ["spiral_b_mesh", "spiral_odd", "spiral_residual_none", "looped_anchor"])
def test_padded_rows_are_what_they_are_alone(name, golden_model):
    """In front (counted from the first real token, in one call and in many) and behind, with a mask or without."""
    model = golden_model(name)
    rows = [random_tokens(model, length, seed=length) for length in (1, 23, 2, 11, 18)]
    alone = [full(model, row[None])[0] for row in rows]
    tokens, mask = padded(rows)
    calls = {"one": full(model, tokens, mask)}
    # In calls of 3 some rows have had nothing but padding for several calls.
    calls |= {str(sizes): in_calls(model, tokens, sizes, mask) for sizes in ([23], [1], [3], [20, 1], [6, 1, 9, 2])}
    for how, logits in calls.items():
        for row, want in zip(logits, alone, strict=True):
            torch.testing.assert_close(row[-len(want) :], want, atol=1e-9, rtol=0, msg=lambda m, how=how: f"{how}: {m}")
    tokens, mask = padded(rows, side="right")
    for logits in (full(model, tokens, mask), full(model, tokens), full(model, tokens, mask.bool())):
        for row, want in zip(logits, alone, strict=True):
            close(row[: len(want)], want)


def test_hidden_states_of_padded_rows_are_in_their_places():
    model = spiral([(4, 2, 3), (1, 0, 0)])
    rows = [random_tokens(model, 9), random_tokens(model, 4, seed=1)]
    tokens, mask = padded(rows)
    with torch.no_grad():
        states = model(tokens, attention_mask=mask, output_hidden_states=True).hidden_states
        alone = model(rows[1][None], output_hidden_states=True).hidden_states
    for state, want in zip(states, alone, strict=True):
        close(state[1:, -4:], want)


def test_a_row_of_padding_is_harmless():
    """It gives finite numbers, and starts with its first token whenever that comes."""
    model = spiral([(4, 2, 3), (1, 0, 0)])
    tokens = random_tokens(model, 2, 12)
    mask = torch.ones_like(tokens)
    mask[1, :9] = 0
    logits = in_calls(model, tokens, [5, 2], mask)
    assert logits.isfinite().all()
    close(logits[1, 9:], full(model, tokens[1:, 9:])[0])


def test_masks_refused():
    model = spiral([(4, 2, 3), (1, 0, 0)])
    tokens = random_tokens(model, 2, 6)
    with pytest.raises(ValueError, match="zeros between ones"):
        model(tokens, attention_mask=torch.tensor([[0, 1, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]]))
    cache = model(tokens).past_key_values
    with pytest.raises(ValueError, match="must cover all tokens"):
        model(tokens[:, :1], attention_mask=torch.ones(2, 1), past_key_values=cache)
    with pytest.raises(ValueError, match="calls before"):
        model(tokens[:, :1], attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1] * 7]), past_key_values=cache)


# The cache


@pytest.mark.parametrize("name", LOOPED)
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
            lambda _, args, runs=runs: runs[args[3]].append(args[0].shape[1])
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


# generate()


def greedy(model, row, count):
    """The argmax over full passes, token by token; never token 0, which is the padding."""
    for _ in range(count):
        row = torch.cat([row, full(model, row[None])[0, -1:, 1:].argmax(-1) + 1])
    return row


GENERATE = {"max_new_tokens": 22, "do_sample": False, "pad_token_id": 0, "suppress_tokens": [0]}


@pytest.mark.parametrize("name", ["spiral_b_mesh", "spiral_odd", "spiral_far_shift", "vanilla_mesh"])
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


def test_the_base_model_alone(golden_model):
    model = golden_model("looped_anchor")
    assert isinstance(model.base_model, SpiralFormerModel)
    tokens = random_tokens(model, 1, 4)
    close(model.embed_out(model.base_model(tokens).last_hidden_state), full(model, tokens))
