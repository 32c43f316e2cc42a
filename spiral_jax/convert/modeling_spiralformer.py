# SPDX-License-Identifier: Apache-2.0
"""SpiralFormers in PyTorch for `transformers`: looped transformers whose core runs at several sequence resolutions.

This file travels with the exported weights, next to `configuration_spiralformer.py`, and needs nothing but `torch` and
`transformers`. Load with `AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)`.

How it is laid out. A call brings each row of the batch some new entries, tokens or chunks of tokens, that follow those
of earlier calls. Rows are aligned to the left first: the padding in front of a row is moved behind it, where causality
keeps anything from seeing it, so that everything (rotary positions, chunks, shifts) counts from a row's first token
and entry i lies at index i of every buffer. A `Span` says where a call's entries go.

Shapes: B batch, M new entries of a call, N entries of the longest row so far, D width, H heads, K head width,
G chunk size, R chunks touched by a call, S memory slots, V vocabulary, T iterations.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation import GenerationMode
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from .configuration_spiralformer import Level, SpiralFormerConfig

logger = logging.get_logger(__name__)
M = TypeVar("M", bound=nn.Module)
# What the outputs of this version of `transformers` call the cache.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, softmax, routers, angles and logits: at least float32."""
    return torch.promote_types(dtype, torch.float32)


class WideLinear(nn.Linear):
    """A Linear computed and returned in at least float32, also under autocast.

    It is called like any other: hooks (offloading) and what replaces or wraps Linears (LoRA) work on it.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = wide(x.dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), self.weight.to(dtype), bias)


def starting(module: M, **how: float) -> M:
    """The module, marked with how `_init_weights` fills it: `init_std`, or `init_pass`."""
    for mark, value in how.items():
        setattr(module, mark, value)
    return module


def take(x_BxNxD: torch.Tensor, index_BxM: torch.Tensor) -> torch.Tensor:
    """Row b's entries at `index_BxM[b]`: [B, M, D]."""
    return x_BxNxD.gather(1, index_BxM[:, :, None].expand(-1, -1, x_BxNxD.shape[2]))


class Span:
    """Where the new entries of a call go: entry i of row b at index `first_B[b] + i`, and what attention needs there.

    The integers stay on the CPU, so that nothing waits for the device. Rows with fewer than M new entries end in
    stand-ins: causality hides them from the real entries, and whatever comes next takes their places in the cache.

    Attributes:
      is_start: whether this is the first call, so that `first_B` is 0 whatever the values: `torch.export` knows none.
      first_B: entries that each row had before, on the CPU.
      count_B: real entries among the M, on the CPU.
      length: entries of the longest row, stand-ins included: N.
      index_BxM: where each entry goes, on the device.
      mask_Bx1xMxN: which entries each sees; None where that is plain causal attention among the new ones.
    """

    def __init__(self, config: SpiralFormerConfig, is_start: bool, first_B, count_B: torch.Tensor, like_BxMxD):
        M, device, dtype = like_BxMxD.shape[1], like_BxMxD.device, wide(like_BxMxD.dtype)
        self.is_start, self.first_B, self.count_B = is_start, first_B, count_B
        most = 0 if is_start else int(first_B.max())
        self.length = most + M
        self.index_BxM = (first_B[:, None] + torch.arange(M)).to(device)
        self.mask_Bx1xMxN = None
        if most:
            self.mask_Bx1xMxN = (torch.arange(self.length, device=device) <= self.index_BxM[:, :, None])[:, None]
        power = torch.arange(0, config.rotary_dims, 2, device=device, dtype=dtype) / max(config.rotary_dims, 1)
        angle_BxMx1xJ = self.index_BxM[:, :, None, None].to(dtype) * config.rotary_emb_base**-power
        self.cos, self.sin = angle_BxMx1xJ.cos(), angle_BxMx1xJ.sin()

    def rotate(self, x_BxMxHxK: torch.Tensor) -> torch.Tensor:
        """Rotary embedding of the first dimensions of each head, in pairs (j, j + half)."""
        half = self.cos.shape[-1]
        a, b, rest = x_BxMxHxK.split([half, half, x_BxMxHxK.shape[-1] - 2 * half], dim=-1)
        turned = [a * self.cos - b * self.sin, b * self.cos + a * self.sin]
        return torch.cat([*(x.to(rest.dtype) for x in turned), rest], dim=-1)


class OpenChunk(NamedTuple):
    """A softmax-weighted sum on its way: members so far weigh exp(score - top_B).

    Attributes:
      top_B: largest score.
      total_B: sum of the weights.
      sum_BxD: weighted sum of the members.
    """

    top_B: torch.Tensor
    total_B: torch.Tensor
    sum_BxD: torch.Tensor

    @classmethod
    def empty(cls, like_BxMxD: torch.Tensor) -> "OpenChunk":
        B, _, D = like_BxMxD.shape
        zeros = like_BxMxD.new_zeros(B, D + 1, dtype=wide(like_BxMxD.dtype))
        return cls(torch.full_like(zeros[:, 0], torch.finfo(zeros.dtype).min), zeros[:, 0], zeros[:, 1:])

    def fold(self, G: int, place_B, count_B, score_BxM, h_BxMxD) -> tuple["OpenChunk", "OpenChunk"]:
        """Adds the first `count_B` new tokens of each row, the very first one at place `place_B` of the open chunk.

        Returns the R chunks that the new tokens may touch, with leading axes [B, R], and of these the one left open.
        """
        B, M, _ = h_BxMxD.shape
        R, device = (G - 1 + M) // G + 1, h_BxMxD.device
        token_BxP = torch.arange(R * G) - place_B[:, None]  # which new token is at each place of the R chunks
        member_BxRxG = ((token_BxP >= 0) & (token_BxP < count_B[:, None])).to(device).view(B, R, G)
        token_BxP = token_BxP.clamp(0, M - 1).to(device)
        score_BxRxG = score_BxM.gather(1, token_BxP).view(B, R, G)
        score_BxRxG = score_BxRxG.masked_fill(~member_BxRxG, torch.finfo(score_BxM.dtype).min)
        top_BxR = score_BxRxG.amax(-1).detach()  # cancels in the quotient, and so in its gradient
        top_BxR = torch.cat([torch.maximum(top_BxR[:, :1], self.top_B[:, None]), top_BxR[:, 1:]], dim=1)
        weight_BxRxG = (score_BxRxG - top_BxR[:, :, None]).exp() * member_BxRxG
        total_BxR = weight_BxRxG.sum(-1)
        h_BxRxGxD = take(h_BxMxD, token_BxP).view(B, R, G, -1)
        sum_BxRxD = (weight_BxRxG[..., None] * h_BxRxGxD.to(weight_BxRxG.dtype)).sum(2)
        # What the open chunk had before, on the scale of its new largest score.
        kept_B = (self.top_B - top_BxR[:, 0]).exp()
        is_open_R = torch.arange(R, device=device) == 0
        total_BxR = total_BxR + is_open_R * (kept_B * self.total_B)[:, None]
        sum_BxRxD = sum_BxRxD + is_open_R[:, None] * (kept_B[:, None] * self.sum_BxD)[:, None]
        every = OpenChunk(top_BxR, total_BxR, sum_BxRxD)
        rows, last_B = torch.arange(B, device=device), ((place_B + count_B) // G).to(device)
        return every, OpenChunk(*(x[rows, last_B] for x in every))


class SpiralFormerCache(Cache):
    """What decoding remembers: keys and values of prelude, coda and each iteration, chunk updates, open chunks.

    Buffers are indexed by a row's own tokens or chunks, so what follows overwrites stand-ins and removed tokens.

    Attributes:
      seen: tokens consumed, padding included.
      start_B: padding in front of each row, on the CPU (`seen` where a row has had no token yet).
      buffers: by name, [B, N, ...].
      open: by iteration, the unfinished chunk.
    """

    def __init__(self, config: SpiralFormerConfig | None = None):
        super().__init__(layers=[])
        self.recording = False
        self.reset()

    def reset(self):
        """Forgets everything."""
        self.seen, self.start_B, self.buffers, self.open = 0, None, {}, {}
        self._mark()

    def _mark(self):
        """`crop` can go back to here: folds since are kept, and the open chunks that they started from."""
        self.marked, self.marked_open, self.folds = self.seen, dict(self.open), []

    def put(self, name: str, new_BxMx: torch.Tensor, span: Span) -> torch.Tensor:
        """Stores the entries of a span; returns the whole buffer, [B, N, ...]."""
        old = self.buffers.get(name)
        if old is not None or span.length > new_BxMx.shape[1]:
            old = new_BxMx[:, :0] if old is None else old
            grown = new_BxMx.new_zeros(new_BxMx.shape[0], max(span.length - old.shape[1], 0), *new_BxMx.shape[2:])
            rows_Bx1 = torch.arange(new_BxMx.shape[0], device=new_BxMx.device)[:, None]
            new_BxMx = torch.cat([old, grown], dim=1).index_put((rows_Bx1, span.index_BxM), new_BxMx)
        self.buffers[name] = new_BxMx
        return new_BxMx[:, : span.length]

    def fold(self, t: int, level: Level, tokens: Span, score_BxM, h_BxMxD) -> OpenChunk:
        """Adds new tokens to iteration t's open chunk; returns the chunks touched, as `OpenChunk.fold`."""
        chunk = self.open.get(t) or OpenChunk.empty(h_BxMxD)
        place_B = (tokens.first_B + level.offset) % level.chunk
        every, self.open[t] = chunk.fold(level.chunk, place_B, tokens.count_B, score_BxM, h_BxMxD)
        if self.recording:
            self.folds.append((t, level, tokens.first_B, tokens.count_B, score_BxM, h_BxMxD))
        return every

    def advance(self, M: int, start_B: torch.Tensor):
        """Ends a call that brought M tokens."""
        self.seen += M
        self.start_B = start_B.clamp_max(self.seen)

    def activate_past_recording(self):
        """From here on `crop` can take tokens back, at the price of keeping the token states of coarse iterations."""
        self.recording = True
        self._mark()

    def crop(self, tokens_to_remove: int):
        """Takes back the last `-tokens_to_remove` tokens, at most those since recording began or the last crop."""
        tokens_to_remove = int(tokens_to_remove)  # some versions of `generate` give a tensor
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give the tokens to remove as a negative number")
        seen = self.seen + tokens_to_remove
        if tokens_to_remove and (seen < self.marked or not self.recording):
            raise ValueError("crop: this cache can only take back tokens since activate_past_recording() or a crop()")
        if tokens_to_remove:
            self.seen, self.start_B = seen, self.start_B.clamp_max(seen)
            tokens_B, self.open = seen - self.start_B, dict(self.marked_open)
            for t, level, first_B, count_B, score_BxM, h_BxMxD in self.folds:
                count_B = torch.minimum(count_B, (tokens_B - first_B).clamp_min(0))
                chunk = self.open.get(t) or OpenChunk.empty(h_BxMxD)
                place_B = (first_B + level.offset) % level.chunk
                _, self.open[t] = chunk.fold(level.chunk, place_B, count_B, score_BxM, h_BxMxD)
        self._mark()

    def batch_select_indices(self, indices: torch.Tensor):
        """Keeps these rows, in this order."""
        if self.start_B is None:
            return
        self.start_B = self.start_B[indices.cpu()]
        self.buffers = {name: x[indices.to(x.device)] for name, x in self.buffers.items()}
        self.open = {t: OpenChunk(*(x[indices.to(x.device)] for x in chunk)) for t, chunk in self.open.items()}
        self._mark()

    def reorder_cache(self, beam_idx: torch.LongTensor):
        """Rows of the beams that go on."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int):
        """Every row `repeats` times."""
        if self.start_B is not None:
            self.batch_select_indices(torch.arange(len(self.start_B)).repeat_interleave(repeats))

    @property
    def is_linear(self) -> list[bool]:
        """That it stores tokens, which `transformers` would ask of the layers that this cache does not have."""
        return [False]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens consumed, padding included."""
        return self.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """No limit."""
        return -1

    def __repr__(self) -> str:
        return f"SpiralFormerCache(seen={self.seen}, buffers={len(self.buffers)})"


class SpiralFormerAttention(nn.Module):
    """Causal attention with rotary positions; the rows of the fused projection are per head [q | k | v]."""

    def __init__(self, config: SpiralFormerConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = starting(nn.Linear(config.hidden_size, config.hidden_size), init_std=output_std(config))

    def forward(self, x_BxMxD: torch.Tensor, span: Span, cache: SpiralFormerCache | None, name: str) -> torch.Tensor:
        B, M, D = x_BxMxD.shape
        q, k, v = self.query_key_value(x_BxMxD).view(B, M, self.num_heads, 3, -1).unbind(3)
        q, k = span.rotate(q), span.rotate(k)
        if cache is not None:
            k, v = cache.put(f"{name}.key", k, span), cache.put(f"{name}.value", v, span)
        # Whatever its kernel, it keeps its softmax in at least float32.
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        mask = span.mask_Bx1xMxN
        mixed_BxHxMxK = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.dense(mixed_BxHxMxK.transpose(1, 2).reshape(B, M, D))


class SpiralFormerMLP(nn.Module):
    """Two projections with an exact GELU between them."""

    def __init__(self, config: SpiralFormerConfig):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.intermediate_size)
        self.dense_4h_to_h = starting(
            nn.Linear(config.intermediate_size, config.hidden_size), init_std=output_std(config)
        )

    def forward(self, x_BxMxD: torch.Tensor) -> torch.Tensor:
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x_BxMxD)))


class SpiralFormerLayer(GradientCheckpointingLayer):
    """Parallel residual: x + Attn(LN1(x)) + MLP(LN2(x))."""

    def __init__(self, config: SpiralFormerConfig):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = SpiralFormerAttention(config)
        self.mlp = SpiralFormerMLP(config)

    def forward(self, x_BxMxD: torch.Tensor, span: Span, cache: SpiralFormerCache | None, name: str) -> torch.Tensor:
        attended_BxMxD = self.attention(self.input_layernorm(x_BxMxD), span, cache, name)
        return x_BxMxD + attended_BxMxD + self.mlp(self.post_attention_layernorm(x_BxMxD))


class SpiralFormerStep(nn.Module):
    """What one iteration has of its own: the way from tokens to chunks and back, and what its topology needs."""

    def __init__(self, config: SpiralFormerConfig, t: int):
        super().__init__()
        self.t, self.level = t, config.levels[t]
        G, D = self.level.chunk, config.hidden_size
        self.scale = {"sqrt": math.sqrt(G), "linear": float(G), "none": 1.0}[config.update_scale]
        self.scorer = self.allocator = None
        if G > 1 and config.pooling == "self_aggregation":
            self.scorer = starting(WideLinear(D, 1, bias=False), init_std=0)
        if G > 1 and config.allocation == "learned":
            self.allocator = starting(WideLinear(D, G), init_std=0)
        self.topology = config.topology
        if self.topology == "gated":
            self.gate = starting(WideLinear(D, 1), init_std=0)
        if self.topology == "injection":
            self.inject = starting(nn.Linear(2 * D, D), init_pass=True)

    def core_input(self, h_BxMxD: torch.Tensor, emb_BxMxD: torch.Tensor) -> torch.Tensor:
        """What the core starts from, at token level."""
        if self.topology == "injection":
            return self.inject(torch.cat([h_BxMxD, emb_BxMxD], dim=-1))
        return h_BxMxD

    def next_state(self, e_BxMxD: torch.Tensor, h_BxMxD: torch.Tensor, start_BxMxD, emb_BxMxD) -> torch.Tensor:
        """h(t+1) of the topologies without a memory."""
        if self.topology == "gated":
            a_BxMx1 = self.gate(h_BxMxD).sigmoid()
            return (a_BxMx1 * e_BxMxD + (1 - a_BxMx1) * h_BxMxD).to(e_BxMxD.dtype)
        added = {"residual": h_BxMxD, "anchor": start_BxMxD, "anchor_star": emb_BxMxD}.get(self.topology)
        return e_BxMxD if added is None else e_BxMxD + added

    def down_scale(self, h_BxMxD: torch.Tensor, tokens: Span, cache: SpiralFormerCache):
        """The chunks that the new tokens close: z_BxNxD, and on the CPU which is each row's first and how many it has.

        The mean divides by the chunk size even where an offset makes the first chunk shorter.
        """
        G, offset, _ = self.level
        if self.scorer is None:
            score_BxM = torch.zeros_like(h_BxMxD[..., 0], dtype=wide(h_BxMxD.dtype))
        else:
            score_BxM = self.scorer(h_BxMxD)[..., 0]
        chunks = cache.fold(self.t, self.level, tokens, score_BxM, h_BxMxD)
        first_B = (tokens.first_B + offset) // G
        count_B = (tokens.first_B + tokens.count_B + offset) // G - first_B
        # The largest score weighs 1, so a chunk with members has a total of 1 or more.
        total_BxR = chunks.total_B.clamp_min(1.0) if self.scorer is not None else torch.full_like(chunks.total_B, G)
        z_BxRxD = (chunks.sum_BxD / total_BxR[..., None]).to(h_BxMxD.dtype)
        if not torch.compiler.is_exporting():  # which keeps one program for all lengths: open chunks reach no token
            z_BxRxD = z_BxRxD[:, : (h_BxMxD.shape[1] + offset) // G if tokens.is_start else int(count_B.max())]
        return z_BxRxD, first_B, count_B

    def up_scale(self, zhat_BxNxD: torch.Tensor, tokens: Span) -> torch.Tensor:
        """e(t) of the new tokens: token i reads its share of the chunk that token i - shift belongs to, [B, M, D]."""
        G, offset, shift = self.level
        source_BxM = tokens.index_BxM - shift
        place_BxM = (source_BxM + offset) % G
        chunk_BxM = torch.div(source_BxM + offset, G, rounding_mode="floor").clamp(0, zhat_BxNxD.shape[1] - 1)
        zhat_BxMxD = take(zhat_BxNxD, chunk_BxM)
        if self.allocator is None:
            share_BxM = torch.full_like(source_BxM, 1 / G, dtype=wide(zhat_BxMxD.dtype))
        else:
            share_BxMxG = self.allocator(zhat_BxMxD).softmax(-1)
            share_BxM = share_BxMxG.gather(2, place_BxM[:, :, None])[..., 0]
        factor_BxM = self.scale * share_BxM * (source_BxM >= 0)
        return (factor_BxM[:, :, None] * zhat_BxMxD.to(factor_BxM.dtype)).to(zhat_BxMxD.dtype)


class SpiralFormerMemoryRouter(nn.Module):
    """One write and read of the memory of slots, routed per token by the state."""

    def __init__(self, config: SpiralFormerConfig):
        super().__init__()
        S, D = config.memory_slots, config.hidden_size
        # Random, not zero: slots with equal routers would never part.
        self.write = starting(WideLinear(D, S), init_std=math.sqrt(2 / (S * D)))
        self.read = starting(WideLinear(D, S), init_std=math.sqrt(2 / (S * D)))

    def forward(self, state_BxMxD: torch.Tensor, new_BxMxD: torch.Tensor, written: list) -> tuple[torch.Tensor, list]:
        """Writes `new`, then reads: what was read, and the writes (values [B, M, D], shares [B, M, S]) with this one.

        The list is a new one: hooks of `accelerate` hand on copies, and what is appended to a copy is lost.
        """
        written = [*written, (new_BxMxD, self.write(state_BxMxD).softmax(-1))]
        read_BxMxS = self.read(state_BxMxD).softmax(-1)
        mixed = sum((read_BxMxS * share_BxMxS).sum(-1, keepdim=True) * value for value, share_BxMxS in written)
        return mixed.to(state_BxMxD.dtype), written


def hidden_std(config: SpiralFormerConfig) -> float:
    """Standard deviation of fresh weights."""
    return math.sqrt(2 / (5 * config.hidden_size))


def output_std(config: SpiralFormerConfig) -> float:
    """That of projections into the residual stream."""
    return hidden_std(config) / math.sqrt(max(2 * config.num_hidden_layers, 1))


class SpiralFormerPreTrainedModel(PreTrainedModel):
    """Initialisation, loading and saving."""

    config: SpiralFormerConfig
    config_class = SpiralFormerConfig
    base_model_prefix = "spiralformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SpiralFormerLayer"]  # noqa: RUF012 (what `transformers` wants)
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            if hasattr(module, "init_pass"):  # a Linear that begins by passing its first inputs on
                nn.init.eye_(module.weight)
            else:
                nn.init.normal_(module.weight, std=getattr(module, "init_std", hidden_std(self.config)))
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
        if isinstance(module, (nn.Linear, nn.LayerNorm)) and module.bias is not None:
            nn.init.zeros_(module.bias)


class SpiralFormerModel(SpiralFormerPreTrainedModel):
    """Embeddings, prelude, loop, coda and final LayerNorm."""

    def __init__(self, config: SpiralFormerConfig):
        super().__init__(config)
        T = len(config.schedule)
        cores = min(T, 1) if config.shared_core else T
        # The models' factor sqrt(d) is folded into the embedding.
        embed_std = hidden_std(config) * math.sqrt(config.hidden_size)
        self.embed_in: nn.Module = starting(nn.Embedding(config.vocab_size, config.hidden_size), init_std=embed_std)
        self.prelude = nn.ModuleList(SpiralFormerLayer(config) for _ in range(config.prelude_layers))
        self.core = nn.ModuleList(SpiralFormerLayer(config) for _ in range(cores * config.core_layers))
        self.coda = nn.ModuleList(SpiralFormerLayer(config) for _ in range(config.coda_layers))
        self.steps = nn.ModuleList(SpiralFormerStep(config, t) for t in range(T))
        if config.topology == "mesh":
            self.memory = nn.ModuleList(SpiralFormerMemoryRouter(config) for _ in range(T + 1))
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False  # set by `transformers`, here and in the layers
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_in

    def set_input_embeddings(self, value: nn.Module):
        self.embed_in = value

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: SpiralFormerCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        cache: SpiralFormerCache | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """The states before the head.

        Args:
          input_ids: [B, M] new tokens.
          attention_mask: [B, tokens so far + M], 0 where a token is padding. Padding may be in front of a row and
            behind it, not between tokens. What comes out at padding means nothing; it is 0 in front of a row.
          position_ids: [B, M] or [1, M]. They rise by one along a row, from anywhere; or, without a mask and a cache,
            they start again wherever another text begins that is packed into the row and sees nothing before it.
          inputs_embeds: [B, M, D] in place of input_ids, rows of `embed_in`.
          past_key_values: cache of the calls before.
          use_cache: whether to return a cache; by default as the config says, never in training. One given is used.
          output_hidden_states: whether to return the T + 3 states (embeddings, h(0), ..., h(T), output), [B, M, D].
          output_attentions: no weights are returned: the attention used never has them, as `transformers`' `sdpa`.
          return_dict: False for a tuple; by default as the config says.
          cache: another name of past_key_values, since transformers 5.24.
          is_causal: nothing but True is possible.
          **kwargs: what libraries hand to every model; without a meaning here.
        """
        cache = past_key_values if cache is None else cache
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if cache is not None and not isinstance(cache, SpiralFormerCache):
            raise TypeError(f"past_key_values is a {type(cache).__name__}; this model needs SpiralFormerCache()")
        if is_causal is False:
            raise ValueError("is_causal is False; a SpiralFormer is causal in itself: chunks are read when they close")
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_attentions:
            logger.warning_once("output_attentions: attention does not keep its weights here; none are returned")
        every = bool(self.config.output_hidden_states if output_hidden_states is None else output_hidden_states)
        use_cache = self._uses_cache(use_cache, cache)
        emb_BxMxD = self.embed_in(input_ids) if inputs_embeds is None else inputs_embeds
        if cache is None and attention_mask is None and (packed := packed_texts(position_ids, emb_BxMxD)):
            states, use_cache = self._packed(emb_BxMxD, packed, every), False
        else:
            check_positions(position_ids, attention_mask, emb_BxMxD)
            cache = SpiralFormerCache() if cache is None else cache
            states = self._aligned(emb_BxMxD, attention_mask, cache, use_cache, every)
        kept: dict[str, Any] = {CACHE: cache if use_cache else None}
        outputs = BaseModelOutputWithPast(
            last_hidden_state=states[-1],
            hidden_states=tuple(states) if every else None,
            attentions=() if output_attentions else None,
            **kept,
        )
        return outputs if return_dict or (return_dict is None and self.config.return_dict) else outputs.to_tuple()

    def _uses_cache(self, use_cache: bool | None, cache: SpiralFormerCache | None) -> bool:
        """Whether this call fills a cache: one that is given, or as asked for, or as the config says."""
        checkpoints = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        if cache is not None and checkpoints:
            raise ValueError("past_key_values with gradient checkpointing; allowed: one of them, or torch.no_grad()")
        if use_cache and checkpoints:
            logger.warning_once("use_cache=True does not go with gradient checkpointing: no cache is returned")
            return False
        if use_cache is None:  # `torch.export` could not return ours
            use_cache = self.config.use_cache and not self.training and not torch.compiler.is_exporting()
        return use_cache or cache is not None

    def _aligned(self, emb_BxMxD, attention_mask, cache: SpiralFormerCache, keep: bool, every: bool):
        """The states (`every`, or the last), computed with padding in front of a row's new tokens moved behind them."""
        M = emb_BxMxD.shape[1]
        start_B = row_starts(attention_mask, emb_BxMxD, cache)
        first_B = (cache.seen - start_B).clamp_min(0)
        count_B = (cache.seen + M - start_B).clamp_min(0) - first_B
        front_B, column_M = M - count_B, torch.arange(M)
        is_moved = attention_mask is not None if torch.compiler.is_exporting() else bool(front_B.any())
        if is_moved:
            emb_BxMxD = take(emb_BxMxD, (column_M + front_B[:, None]).clamp_max(M - 1).to(emb_BxMxD.device))
        span = Span(self.config, cache.seen == 0, first_B, count_B, emb_BxMxD)
        states = self._run(emb_BxMxD, span, cache, keep)[0 if every else -1 :]
        if is_moved:
            back_BxM = (column_M - front_B[:, None]).to(emb_BxMxD.device)
            # Zeros at padding: a label there, the first token of a row, teaches nothing.
            states = [take(h_BxMxD, back_BxM.clamp_min(0)) * (back_BxM >= 0)[:, :, None] for h_BxMxD in states]
        cache.advance(M, start_B)
        return states

    def _packed(self, emb_BxMxD: torch.Tensor, packed: tuple[torch.Tensor, torch.Tensor], every: bool):
        """The states of packed texts, each computed in a row of its own."""
        text_BxM, place_BxM = packed
        rows, L = int(text_BxM.max()) + 1, int(place_BxM.max()) + 1
        texts_RxLxD = emb_BxMxD.new_zeros(rows, L, emb_BxMxD.shape[2]).index_put(packed, emb_BxMxD)
        states = self._aligned(texts_RxLxD, None, SpiralFormerCache(), False, every)
        return [h_RxLxD[text_BxM, place_BxM] for h_RxLxD in states]

    def _run(self, emb_BxMxD: torch.Tensor, tokens: Span, cache: SpiralFormerCache, keep: bool) -> list[torch.Tensor]:
        """The states (embeddings, h(0), ..., h(T), output) of aligned rows; `keep` stores keys and values."""
        topology = self.config.topology
        written: list[tuple[torch.Tensor, torch.Tensor]] = []
        h_BxMxD = start_BxMxD = self._layers(self.prelude, emb_BxMxD, tokens, cache if keep else None, "prelude")
        if topology == "mesh":
            # The first slot starts as the embeddings, the others empty.
            first_S = torch.arange(self.config.memory_slots, device=emb_BxMxD.device) == 0
            written.append((emb_BxMxD, first_S.to(wide(emb_BxMxD.dtype))))
            h_BxMxD, written = self.memory[0](h_BxMxD, h_BxMxD, written)
        states = [emb_BxMxD, h_BxMxD]
        for step in cast("Iterable[SpiralFormerStep]", self.steps):
            e_BxMxD = self._update(step, step.core_input(h_BxMxD, emb_BxMxD), tokens, cache, keep)
            if topology == "mesh":
                h_BxMxD, written = self.memory[step.t + 1](h_BxMxD, e_BxMxD, written)
            else:
                h_BxMxD = step.next_state(e_BxMxD, h_BxMxD, start_BxMxD, emb_BxMxD)
            states.append(h_BxMxD)
        h_BxMxD = self._layers(self.coda, h_BxMxD, tokens, cache if keep else None, "coda")
        return [*states, self.final_layer_norm(h_BxMxD)]

    def _update(self, step: SpiralFormerStep, h_BxMxD, tokens: Span, cache: SpiralFormerCache, keep: bool):
        """e(t): the core at the resolution of an iteration, run on the chunks that the new tokens close, if any.

        Args:
          step: the iteration.
          h_BxMxD: what it starts from.
          tokens: where the new tokens go.
          cache: what came before.
          keep: whether to store keys and values.
        """
        t, first_layer = step.t, step.t * self.config.core_layers * (not self.config.shared_core)
        core = self.core[first_layer : first_layer + self.config.core_layers]
        kept = cache if keep else None
        if step.level.chunk == 1:
            return self._layers(core, h_BxMxD, tokens, kept, f"core.{t}")
        z_BxNxD, first_B, count_B = step.down_scale(h_BxMxD, tokens, cache)
        zhat_BxNxD = cache.buffers.get(f"core.{t}.zhat")
        if torch.compiler.is_exporting() or z_BxNxD.shape[1]:
            chunks = Span(self.config, tokens.is_start, first_B, count_B, z_BxNxD)
            zhat_BxNxD = self._layers(core, z_BxNxD, chunks, kept, f"core.{t}")
            if keep:
                zhat_BxNxD = cache.put(f"core.{t}.zhat", zhat_BxNxD, chunks)
        return torch.zeros_like(h_BxMxD) if zhat_BxNxD is None else step.up_scale(zhat_BxNxD, tokens)

    def _layers(self, layers, x_BxMxD: torch.Tensor, span: Span, cache: SpiralFormerCache | None, name: str):
        for i, layer in enumerate(layers):
            x_BxMxD = layer(x_BxMxD, span, cache=cache, name=f"{name}.{i}")
        return x_BxMxD


def row_starts(attention_mask: torch.Tensor | None, emb_BxMxD: torch.Tensor, cache: SpiralFormerCache) -> torch.Tensor:
    """Padding in front of each row, [B] on the CPU, from the mask or else from the calls before."""
    B, columns = emb_BxMxD.shape[0], cache.seen + emb_BxMxD.shape[1]
    before_B = torch.zeros(B, dtype=torch.long) if cache.start_B is None else cache.start_B
    if attention_mask is None:
        return before_B
    if attention_mask.shape != (B, columns):
        raise ValueError(f"attention_mask is {list(attention_mask.shape)}; it must cover all tokens: {[B, columns]}")
    mask_BxC = attention_mask.to("cpu", torch.bool)
    if not torch.compiler.is_exporting():
        rises_B = mask_BxC[:, 0] + (mask_BxC[:, 1:] & ~mask_BxC[:, :-1]).sum(1)
        if (rises_B > 1).any():
            raise ValueError("attention_mask has zeros between ones; padding must be in front of a row or behind it")
    start_B = torch.where(mask_BxC.any(1), mask_BxC.long().argmax(1), columns)
    if cache.seen and not torch.equal(start_B.clamp_max(cache.seen), before_B):
        raise ValueError("attention_mask has other padding in front of a row than in the calls before")
    return start_B


def labels_of_tokens(labels_BxM: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The labels without those that padding would be scored on, and the share that is left, on the labels' device.

    A row's first token is such a label wherever padding is in front of it, and `Trainer` counts it among
    `num_items_in_batch`: by the share, the loss does not depend on what a row is padded with.
    """
    padding_BxM = ~attention_mask[:, -labels_BxM.shape[1] :].to(labels_BxM.device, torch.bool)
    kept_BxM = labels_BxM.clone()
    kept_BxM[:, 1:] = kept_BxM[:, 1:].masked_fill(padding_BxM[:, :-1], -100)
    count, before = ((labels[:, 1:] != -100).sum().clamp_min(1) for labels in (kept_BxM, labels_BxM))
    return kept_BxM, count / before


def packed_texts(position_ids: torch.Tensor | None, emb_BxMxD: torch.Tensor):
    """Where the tokens of packed texts go: (text, place) [B, M] each, or None where every row is one text."""
    if position_ids is None or torch.compiler.is_exporting():
        return None
    is_first_BxM = position_ids.diff(prepend=position_ids[..., :1], dim=-1) != 1
    is_first_BxM = is_first_BxM.to(emb_BxMxD.device).expand(emb_BxMxD.shape[:2])
    if not is_first_BxM[:, 1:].any():
        return None
    column_BxM = torch.arange(emb_BxMxD.shape[1], device=emb_BxMxD.device).expand_as(is_first_BxM)
    text_BxM = is_first_BxM.flatten().cumsum(0).view_as(is_first_BxM) - 1
    return text_BxM, column_BxM - (column_BxM * is_first_BxM).cummax(1).values


def check_positions(position_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, emb_BxMxD: torch.Tensor):
    """Refuses positions that would be computed otherwise than asked for."""
    M = emb_BxMxD.shape[1]
    if position_ids is None or M == 1 or torch.compiler.is_exporting():
        return
    is_wrong_BxM = position_ids.diff(dim=-1) != 1
    if attention_mask is not None:  # whatever stands at padding
        mask_BxM = attention_mask[:, -M:].to(is_wrong_BxM.device, torch.bool)
        is_wrong_BxM = is_wrong_BxM & mask_BxM[:, 1:] & mask_BxM[:, :-1]
    if is_wrong_BxM.any():
        raise ValueError("position_ids do not rise by one; packed texts need a call without mask and cache")


class SpiralFormerWithHead(SpiralFormerPreTrainedModel):
    """What the models with a head have in common."""

    def __init__(self, config: SpiralFormerConfig):
        super().__init__(config)
        self.num_labels = cast("int", config.num_labels)
        self.spiralformer = SpiralFormerModel(config)

    def get_input_embeddings(self) -> nn.Module:
        return self.spiralformer.embed_in

    def set_input_embeddings(self, value: nn.Module):
        self.spiralformer.embed_in = value


class SpiralFormerForCausalLM(SpiralFormerWithHead, GenerationMixin):
    """A SpiralFormer and its head."""

    def __init__(self, config: SpiralFormerConfig):
        super().__init__(config)
        # Only of classes named here does `Trainer` shift the labels that it smooths; others would learn to copy.
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(config.model_type, "SpiralFormerForCausalLM")
        self.embed_out: nn.Linear = WideLinear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.embed_out

    def set_output_embeddings(self, new_embeddings: nn.Linear):
        if type(new_embeddings) is nn.Linear:
            new_embeddings.__class__ = WideLinear  # `resize_token_embeddings` makes a plain one
        self.embed_out = new_embeddings

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: SpiralFormerCache | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: SpiralFormerCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits [B, M, V], at least float32, and with labels the loss.

        Args:
          labels: [B, M], -100 where there is none. Position i is scored on label i + 1, unless it is padding.
          logits_to_keep: only the last so many positions, or these, [K] or [B, K]; or where True, [B, M], of all rows
            in one; 0 for all.
          input_ids, attention_mask, position_ids, inputs_embeds, past_key_values, use_cache, output_hidden_states,
            return_dict, cache: as in `SpiralFormerModel.forward`.
          **kwargs: others of it, and those of `transformers`' loss: `num_items_in_batch`, `shift_labels`.
        """
        outputs = self.spiralformer(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            cache=cache,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        h_BxMxD = outputs.last_hidden_state
        if isinstance(logits_to_keep, int):
            h_BxMxD = h_BxMxD[:, -logits_to_keep:]
        elif logits_to_keep.ndim == 1:
            h_BxMxD = h_BxMxD[:, logits_to_keep]
        else:
            is_mask = logits_to_keep.dtype == torch.bool
            h_BxMxD = h_BxMxD[logits_to_keep] if is_mask else take(h_BxMxD, logits_to_keep)
        logits_BxMxV = self.embed_out(h_BxMxD)
        loss = None
        if labels is not None:
            scored_BxM: torch.Tensor = labels
            is_unshifted = kwargs.get("shift_labels") is None
            if is_unshifted and logits_BxMxV.shape[:-1] != labels.shape:
                raise ValueError(f"labels are {list(labels.shape)}, logits {list(logits_BxMxV.shape)}")
            if is_unshifted and attention_mask is not None:
                scored_BxM, share = labels_of_tokens(labels, attention_mask)
                if kwargs.get("num_items_in_batch") is not None:
                    kwargs["num_items_in_batch"] = kwargs["num_items_in_batch"] * share
            V = logits_BxMxV.shape[-1]
            loss = self.loss_function(logits=logits_BxMxV, labels=scored_BxM, vocab_size=V, **kwargs)
        kept: dict[str, Any] = {name: getattr(outputs, name) for name in (CACHE, "hidden_states", "attentions")}
        result = CausalLMOutputWithPast(loss=loss, logits=logits_BxMxV, **kept)
        return result if return_dict or (return_dict is None and self.config.return_dict) else result.to_tuple()

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, generation_mode=None, *args, **kwargs):
        """`generate` begins with a cache of ours; `transformers` would make one of keys and values alone."""
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(f"cache_implementation {generation_config.cache_implementation!r}: this model has its own")
        if (cache := model_kwargs.get(CACHE)) is not None:
            cache._is_user_defined = True
        elif generation_config.use_cache is not False:
            cache = model_kwargs[CACHE] = SpiralFormerCache()
        speculative = generation_mode == GenerationMode.ASSISTED_GENERATION or generation_config.is_assistant
        if isinstance(cache, SpiralFormerCache) and speculative:
            cache.activate_past_recording()


# `forward` of the heads below is that of `transformers`, whose own `__init__` would look for a model of its own.


class SpiralFormerForSequenceClassification(GenericForSequenceClassification, SpiralFormerWithHead):
    """A SpiralFormer that scores a text by the state of its last token."""

    base_model_prefix = "spiralformer"

    def __init__(self, config: SpiralFormerConfig):
        SpiralFormerWithHead.__init__(self, config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()


class SpiralFormerForTokenClassification(GenericForTokenClassification, SpiralFormerWithHead):
    """A SpiralFormer that scores every token."""

    base_model_prefix = "spiralformer"

    def __init__(self, config: SpiralFormerConfig):
        SpiralFormerWithHead.__init__(self, config)
        self.dropout = nn.Dropout(0.1)
        self.score = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()


class SpiralFormerForQuestionAnswering(GenericForQuestionAnswering, SpiralFormerWithHead):
    """A SpiralFormer that scores every token as the first and as the last of an answer."""

    base_model_prefix = "spiralformer"

    def __init__(self, config: SpiralFormerConfig):
        SpiralFormerWithHead.__init__(self, config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    get_input_embeddings = SpiralFormerWithHead.get_input_embeddings
    set_input_embeddings = SpiralFormerWithHead.set_input_embeddings
