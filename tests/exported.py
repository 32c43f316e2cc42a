"""Exported models in PyTorch, random or of goldens, and their logits in one call and in several."""

from pathlib import Path

import numpy as np
import pytest
import reference

torch = pytest.importorskip("torch", reason="the exported model's PyTorch code needs torch (extra `hf`)")
transformers = pytest.importorskip("transformers", reason="the exported model's code needs transformers (extra `hf`)")

from spiral_jax.convert.configuration_spiralformer import SpiralFormerConfig  # noqa: E402
from spiral_jax.convert.modeling_spiralformer import SpiralFormerForCausalLM  # noqa: E402

GOLDEN = Path(__file__).parent / "golden"


def make(config: dict, tensors: dict, dtype=torch.float64) -> SpiralFormerForCausalLM:
    """The model of an exported folder's contents, for evaluation. Every tensor must have its place."""
    model = SpiralFormerForCausalLM(SpiralFormerConfig(**config))
    model.load_state_dict({name: torch.tensor(tensor) for name, tensor in tensors.items()}, strict=True)
    return model.to(dtype).eval()


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
