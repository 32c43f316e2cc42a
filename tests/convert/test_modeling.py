"""The PyTorch model that travels with exported weights: how it loads, and against goldens and our JAX model."""

import copy
import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from exported import GOLDEN, close, full, in_calls, padded, random_tokens, spiral, torch, transformers
from safetensors.numpy import load_file, save_file

from spiral_jax.convert.architecture import config_from_huggingface
from spiral_jax.convert.configuration_spiralformer import SpiralFormerConfig
from spiral_jax.convert.modeling_spiralformer import (
    Span,
    SpiralFormerCache,
    SpiralFormerForCausalLM,
    SpiralFormerModel,
)
from spiral_jax.convert.tensors import params_from_tensors
from spiral_jax.export import AUTO_MAP

CODE = Path(importlib.util.find_spec("spiral_jax.convert").origin).parent
FILES = ("configuration_spiralformer.py", "modeling_spiralformer.py")
DTYPES = {"float32": (torch.float32, 2e-4), "float64": (torch.float64, 1e-9)}


pytestmark = pytest.mark.usefixtures("trusted_code")


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
                tokens = Span(model.config, i == 0, torch.tensor([i * size]), torch.tensor([size]), part)
                chunks.append(model.steps[0].down_scale(part, tokens, cache)[0])
            tokens = Span(model.config, True, torch.tensor([0]), torch.tensor([45]), h)
            routed = model.memory[1](h, h.flip(1), [(h.roll(1, 1), torch.full((5,), 0.25, dtype=dtype))])[0]
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
    close(out.loss.double(), -sum(terms) / len(terms), 1e-6)  # transformers' loss is in float32
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


def test_the_base_model_alone(golden_model):
    model = golden_model("looped_anchor")
    assert isinstance(model.base_model, SpiralFormerModel)
    tokens = random_tokens(model, 1, 4)
    close(model.embed_out(model.base_model(tokens).last_hidden_state), full(model, tokens))


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
