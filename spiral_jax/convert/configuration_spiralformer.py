# SPDX-License-Identifier: Apache-2.0
"""Configuration of exported SpiralFormers for `transformers`: the fields of `config.json`, checked.

This file travels with the exported weights, next to `modeling_spiralformer.py`, and needs nothing but `transformers`.
"""

from typing import NamedTuple

from transformers import PretrainedConfig


class Level(NamedTuple):
    """One iteration of the loop: `chunk(i) = (i + offset) // chunk`, and token i reads what is due at i - shift."""

    chunk: int
    offset: int
    shift: int


class SpiralFormerConfig(PretrainedConfig):
    """A looped transformer: `prelude`, T iterations of a core at the resolutions of `schedule`, `coda`.

    Attributes:
      vocab_size: rows of the embedding and of the head.
      hidden_size: width d.
      intermediate_size: hidden width of the MLPs.
      num_attention_heads: H; the head width is d / H.
      prelude_layers: layers before the loop.
      core_layers: layers of the core.
      coda_layers: layers after the loop.
      shared_core: False gives every iteration core layers of its own.
      schedule: for each iteration, `chunk`, `offset` and `shift` in tokens.
      topology: `base`, `residual`, `anchor`, `anchor_star`, `gated`, `injection` or `mesh`: what becomes of an
        iteration's update.
      memory_slots: slots of the memory of `mesh`; None for T + 3.
      pooling: `self_aggregation` or `mean`: how a chunk becomes one vector.
      allocation: `learned` or `uniform`: the shares of a chunk's update that its tokens get.
      update_scale: `sqrt`, `linear` or `none`: the factor of the update, sqrt(chunk), chunk or 1.
      rotary_pct: part of each head that is rotated.
      rotary_emb_base: base of the rotary frequencies.
      layer_norm_eps: epsilon of every LayerNorm.
      max_position_embeddings: length the model was trained at; nothing in the model depends on it.
      hidden_act: `gelu`, the exact one; nothing else is supported.
      use_cache: whether `forward` returns a cache unless told otherwise.
      bos_token_id: the separator of texts.
      eos_token_id: the same.
      pad_token_id: what a classifier of texts passes over at their end.
    """

    model_type = "spiralformer"
    # The cache, as versions of `transformers` before 5.24 and since call it. `Trainer` appends to this list's copy.
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012

    def __init__(
        self,
        vocab_size=50304,
        hidden_size=768,
        intermediate_size=None,
        num_attention_heads=12,
        prelude_layers=2,
        core_layers=4,
        coda_layers=2,
        shared_core=True,
        schedule=({"chunk": 1, "offset": 0, "shift": 0},),  # noqa: B006
        topology="mesh",
        memory_slots=None,
        pooling="self_aggregation",
        allocation="learned",
        update_scale="sqrt",
        rotary_pct=0.25,
        rotary_emb_base=10000.0,
        layer_norm_eps=1e-5,
        max_position_embeddings=4096,
        hidden_act="gelu",
        use_cache=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        tie_word_embeddings=False,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = 4 * hidden_size if intermediate_size is None else intermediate_size
        self.num_attention_heads = num_attention_heads
        self.prelude_layers = prelude_layers
        self.core_layers = core_layers
        self.coda_layers = coda_layers
        self.shared_core = shared_core
        self.schedule = [dict(level) for level in schedule]
        self.topology = topology
        if topology == "mesh":
            self.memory_slots = len(self.schedule) + 3 if memory_slots is None else memory_slots
        self.pooling = pooling
        self.allocation = allocation
        self.update_scale = update_scale
        self.rotary_pct = rotary_pct
        self.rotary_emb_base = rotary_emb_base
        self.layer_norm_eps = layer_norm_eps
        self.max_position_embeddings = max_position_embeddings
        self.hidden_act = hidden_act
        self.use_cache = use_cache
        self._check(tie_word_embeddings)
        tokens = dict(bos_token_id=bos_token_id, eos_token_id=eos_token_id, pad_token_id=pad_token_id)
        super().__init__(tie_word_embeddings=tie_word_embeddings, **tokens, **kwargs)

    def _check(self, tie_word_embeddings):
        """Refuses what this code would compute otherwise than the config says."""
        for field, allowed in (
            ("hidden_act", ("gelu",)),
            ("topology", ("base", "residual", "anchor", "anchor_star", "gated", "injection", "mesh")),
            ("pooling", ("self_aggregation", "mean")),
            ("allocation", ("learned", "uniform")),
            ("update_scale", ("sqrt", "linear", "none")),
        ):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} is {getattr(self, field)!r}; allowed: {', '.join(allowed)}")
        if tie_word_embeddings:
            raise ValueError("tie_word_embeddings is true; the head of a SpiralFormer is untied")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} does not divide hidden_size {self.hidden_size}"
            )
        if self.rotary_dims % 2:
            raise ValueError(f"rotary_pct {self.rotary_pct} rotates {self.rotary_dims} dimensions; it must be even")
        for t, (chunk, offset, shift) in enumerate(self.levels):
            if chunk < 1 or not 0 <= offset < chunk:
                raise ValueError(f"schedule[{t}]: chunk {chunk}, offset {offset}; allowed: 0 <= offset < chunk")
            if shift < chunk - 1 or (chunk == 1 and shift):
                least = "0" if chunk == 1 else f"at least {chunk - 1}, or the model sees the future"
                raise ValueError(f"schedule[{t}]: chunk {chunk}, shift {shift}; the shift must be {least}")

    @property
    def levels(self) -> list[Level]:
        """The schedule as tuples."""
        return [Level(**level) for level in self.schedule]

    @property
    def rotary_dims(self) -> int:
        """Rotated dimensions of each head."""
        return int(self.hidden_size // self.num_attention_heads * self.rotary_pct)

    @property
    def num_hidden_layers(self) -> int:
        """Layers that a token passes through: prelude + T core + coda."""
        return self.prelude_layers + len(self.schedule) * self.core_layers + self.coda_layers
