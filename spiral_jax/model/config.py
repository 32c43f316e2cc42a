"""What a model is: sizes, layers, schedule, operators, topology, and the counts that follow from them."""

import dataclasses
import itertools
import math
from typing import Literal, NamedTuple, get_args

from spiral_jax.errors import SpiralError, require
from spiral_jax.model.chunks import Level
from spiral_jax.model.neox import layer_parameters, layer_weights
from spiral_jax.model.operators import Linear
from spiral_jax.model.pooling import Pooling, poolings
from spiral_jax.model.spreading import Spreading, spreadings
from spiral_jax.model.topology import Topology, topologies

UpdateScale = Literal["sqrt", "linear", "none"]
Remat = Literal["keep_all", "keep_products", "keep_attention", "keep_inputs"]
Dtype = Literal["float32", "bfloat16", "float64"]

# Fields of `ModelConfig` that change the compiled program and not the function that it computes.
PROGRAM = ("remat", "unroll", "scan_iterations_from")
# No model comes near these. Files that say more are damaged or hostile, and what is made of a configuration (names,
# abstract arrays) would take all memory before anything could be compared with the weights.
_LARGEST = {
    "vocab_size": 2**24,
    "d_model": 2**20,
    **dict.fromkeys(("prelude_layers", "core_layers", "coda_layers"), 10_000),
    "memory_slots": 10_000,
}
_MOST_LAYERS, MOST_ITERATIONS, _LARGEST_CHUNK, _LARGEST_SHIFT = 10_000, 512, 2**20, 2**30


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A model of any family (docs/spec.md sections 1 to 3).

    Every family is `prelude + core x schedule + coda`. Vanilla has an empty schedule, a full-resolution loop a
    schedule of ones. Validation happens on construction and raises `SpiralError` naming `model.<field>`. Sizes that no
    model has are refused: above 10,000 layers, 512 iterations, a width of 2**20, a vocabulary of 2**24.

    Attributes:
      vocab_size: rows of the embedding and columns of the head (the tokenizer's ids, padded).
      d_model: width d.
      num_heads: attention heads H; d_model / num_heads is the head width.
      prelude_layers: layers before the loop, run on every token.
      core_layers: layers of the weight-shared core, run once per iteration at that iteration's resolution.
      coda_layers: layers after the loop.
      chunks: chunk size g of each iteration, coarse to fine in the paper: (8, 4, 2, 1) is SpiralFormer-B.
      offsets: offset w of each iteration; None for g // 2.
      shifts: right shift s of each iteration; None for g - 1, the least that keeps the model causal.
      shared_core: False gives every iteration layers of its own (Pythia+MeSH).
      topology: how an iteration's update e(t) becomes the next state: alone (`base`), added to h(t) (`residual`), to
        the prelude's output (`anchor`), to the embeddings (`anchor_star`), mixed with h(t) by a gate (`gated`), through
        a memory of slots (`mesh`); or alone, with the embeddings mixed into what the core starts from (`injection`); or
        one of your own (docs/topologies.md).
      memory_slots: MeSH slots S; None for T + 3. Only read by topology `mesh`.
      pooling: how a chunk becomes one vector: a learned weighted mean (`self_aggregation`), the `mean`, or your own.
      allocation: how a chunk's update is spread over its tokens: in `learned` or `uniform` shares, or your own way.
      update_scale: lambda of the up-scale: sqrt(g), g or 1.
      rotary_fraction: part of each head that is rotated.
      rotary_base: base of the rotary frequencies.
      layer_norm_epsilon: epsilon of every LayerNorm.
      dtype: compute dtype. Parameters are float32 (float64 when computing in float64, which needs jax_enable_x64).
        Commands compute products of `float32` in float32 on accelerators, too; a program of one's own sets
        `jax_default_matmul_precision` for that.
      remat: what the forward pass keeps of a layer for the backward pass, which recomputes the rest: all activations
        (`keep_all`), its input and the outputs of weight products and attention (`keep_products`), its input and
        attention's output (`keep_attention`), or its input alone (`keep_inputs`). Splash attention is then not
        computed again; the other kinds are, for what their own gradients need.
      unroll: unrolls the scans over layers and iterations: faster steps on CPU, compile time grows with depth.
      scan_iterations_from: neighbouring iterations of one level are one scan if they are at least this many, and are
        written out one after another if fewer. A scan compiles in the same time however many there are, and holds what
        one iteration keeps for the backward pass twice: for a loop of two, a quarter of the activations on top.
    """

    vocab_size: int = 50304
    d_model: int = 768
    num_heads: int = 12
    prelude_layers: int = 2
    core_layers: int = 4
    coda_layers: int = 2
    chunks: tuple[int, ...] = (8, 4, 2, 1)
    offsets: tuple[int, ...] | None = None
    shifts: tuple[int, ...] | None = None
    shared_core: bool = True
    topology: str = "mesh"
    memory_slots: int | None = None
    pooling: str = "self_aggregation"
    allocation: str = "learned"
    update_scale: UpdateScale = "sqrt"
    rotary_fraction: float = 0.25
    rotary_base: float = 10000.0
    layer_norm_epsilon: float = 1e-5
    dtype: Dtype = "bfloat16"
    remat: Remat = "keep_all"
    unroll: bool = False
    scan_iterations_from: int = 4

    def __post_init__(self):
        def check(field: str, ok: bool, allowed: str) -> None:
            require(ok, f"model.{field}", getattr(self, field), allowed)

        for field in ("vocab_size", "d_model", "num_heads"):
            check(field, getattr(self, field) >= 1, "1 or more")
        for field in ("prelude_layers", "core_layers", "coda_layers"):
            check(field, getattr(self, field) >= 0, "0 or more")
        for field, largest in _LARGEST.items():
            check(field, (getattr(self, field) or 0) <= largest, f"up to {largest}")
        if self.num_iterations > MOST_ITERATIONS:
            raise SpiralError(f"model.chunks has {self.num_iterations} iterations; allowed: up to {MOST_ITERATIONS}")
        for name, layers in (("stored", self.stored_layers), ("run", self.unrolled_layers)):
            few = f"1 to {_MOST_LAYERS}, in prelude, core and coda"
            require(1 <= layers <= _MOST_LAYERS, f"model: the number of layers that are {name}", layers, few)
        for field, options in (("update_scale", UpdateScale), ("dtype", Dtype), ("remat", Remat)):
            check(field, getattr(self, field) in get_args(options), ", ".join(get_args(options)))
        for registry, name in ((topologies, self.topology), (poolings, self.pooling), (spreadings, self.allocation)):
            registry.check(name)
        check("num_heads", self.d_model % self.num_heads == 0, f"a divisor of model.d_model, {self.d_model}")
        check("rotary_fraction", 0 <= self.rotary_fraction <= 1, "0 to 1")
        even = f"a part of the head width {self.head_width} that is an even number of dimensions"
        check("rotary_fraction", self.rotary_dims % 2 == 0, even)
        for field in ("rotary_base", "layer_norm_epsilon"):
            check(field, 0 < getattr(self, field) < math.inf, "a positive number")
        check("memory_slots", self.memory_slots is None or self.memory_slots >= 1, "1 or more, or None")
        check("scan_iterations_from", self.scan_iterations_from >= 2, "2 or more")
        for field in ("offsets", "shifts"):
            has_all = getattr(self, field) is None or len(getattr(self, field)) == self.num_iterations
            check(field, has_all, f"{self.num_iterations} entries, one for each of model.chunks")
        check("chunks", all(1 <= g <= _LARGEST_CHUNK for g in self.chunks), f"chunk sizes of 1 to {_LARGEST_CHUNK}")
        for t, (g, w, s) in enumerate(self.schedule):
            require(0 <= w < g, f"model.offsets[{t}]", w, f"0 to {g - 1}, as the chunk size is {g}")
            least = f"{g - 1} or more, as the chunk size is {g} and less leaks the future"
            require(s >= g - 1, f"model.shifts[{t}]", s, least)
            require(s <= _LARGEST_SHIFT, f"model.shifts[{t}]", s, f"up to {_LARGEST_SHIFT}")
            require(g > 1 or s == 0, f"model.shifts[{t}]", s, "0, as the chunk size is 1 (full resolution)")

    @property
    def schedule(self) -> tuple[Level, ...]:
        """The level of each iteration, offsets and shifts resolved."""
        offsets = self.offsets if self.offsets is not None else [g // 2 for g in self.chunks]
        shifts = self.shifts if self.shifts is not None else [g - 1 for g in self.chunks]
        return tuple(Level(*level) for level in zip(self.chunks, offsets, shifts, strict=True))

    @property
    def runs(self) -> tuple[tuple[Level, int], ...]:
        """Neighbouring iterations of one level, as (level, how many)."""
        return tuple((level, len(list(group))) for level, group in itertools.groupby(self.schedule))

    def scans(self, count: int) -> bool:
        """Whether a run of `count` iterations is one scan."""
        return (
            self.shared_core
            and not self.unroll
            and count >= self.scan_iterations_from
            and self.operators.topology.scans
        )

    @property
    def num_iterations(self) -> int:
        """T."""
        return len(self.chunks)

    @property
    def num_slots(self) -> int:
        """S, MeSH memory slots."""
        return self.memory_slots if self.memory_slots is not None else self.num_iterations + 3

    @property
    def head_width(self) -> int:
        return self.d_model // self.num_heads

    @property
    def rotary_dims(self) -> int:
        return int(self.head_width * self.rotary_fraction)

    @property
    def d_ff(self) -> int:
        """Hidden width of the MLP."""
        return 4 * self.d_model

    @property
    def unrolled_layers(self) -> int:
        """Layers a token passes through: prelude + T core + coda."""
        return self.prelude_layers + self.num_iterations * self.core_layers + self.coda_layers

    @property
    def stored_layers(self) -> int:
        """Layers that have parameters of their own."""
        cores = min(self.num_iterations, 1) if self.shared_core else self.num_iterations
        return self.prelude_layers + cores * self.core_layers + self.coda_layers

    @property
    def notation(self) -> str:
        """The papers' notation, as in `4+8x{1/8,1/4,1/2,1}+4`."""
        if not self.chunks:
            return f"{self.prelude_layers + self.coda_layers} layers"
        if not self.shared_core:
            parts = [self.prelude_layers, *[self.core_layers] * self.num_iterations, self.coda_layers]
            return "+".join(map(str, parts))
        resolutions = ",".join("1" if g == 1 else f"1/{g}" for g in self.chunks)
        return f"{self.prelude_layers}+{self.core_layers}x{{{resolutions}}}+{self.coda_layers}"

    @property
    def operators(self) -> "Operators":
        """The operators that `topology`, `pooling` and `allocation` name."""
        return Operators(
            topologies[self.topology](self), poolings[self.pooling](self), spreadings[self.allocation](self)
        )

    # Parameter counts (docs/spec.md sections 1 to 3).

    @property
    def router_parameters(self) -> int:
        """Parameters of the topology: of `mesh` 2 S (T + 1)(d + 1), its T + 1 pairs of routers d -> S with bias."""
        return sum(found.linear.parameters for found in self.operators.declared() if found.field == "topology")

    @property
    def scaler_parameters(self) -> int:
        """Parameters of pooling and allocation where g > 1: scorers d -> 1 (no bias), allocators d -> g (bias)."""
        return sum(found.linear.parameters for found in self.operators.declared() if found.field != "topology")

    @property
    def non_embedding_parameters(self) -> int:
        """Everything but the input embedding and the output head."""
        final_norm = 2 * self.d_model
        layers = self.stored_layers * layer_parameters(self)
        return layers + final_norm + self.router_parameters + self.scaler_parameters

    @property
    def total_parameters(self) -> int:
        return self.non_embedding_parameters + 2 * self.vocab_size * self.d_model

    # FLOPs (docs/spec.md section 3).

    def executed_layers(self, length: int) -> tuple[tuple[int, int], ...]:
        """Layers run on an input of `length` tokens, as (layers, length they run at)."""
        core = [(self.core_layers, level.num_chunks(length)) for level in self.schedule]
        return ((self.prelude_layers, length), *core, (self.coda_layers, length))

    def layer_flops(self, length: int) -> int:
        """FLOPs of the layers' matrix products in one forward pass over `length` tokens."""
        return sum(2 * layers * n * layer_weights(self) for layers, n in self.executed_layers(length))

    def operator_vectors(self, found: "Declared", length: int) -> int:
        """Vectors that a declared Linear takes in one pass over `length` tokens: chunks of a spreading, else tokens."""
        return self.schedule[found.t].num_chunks(length) if found.field == "allocation" else length

    def operator_flops(self, length: int) -> int:
        """FLOPs of the matrix products that operators declare, in one forward pass over `length` tokens."""
        matrices = [found for found in self.operators.declared() if found.linear.is_matrix]
        return sum(2 * self.operator_vectors(found, length) * found.linear.weights for found in matrices)

    def attention_flops(self, length: int, *, causal: bool) -> int:
        """FLOPs of the layers' scores and weighted sums in one forward pass: all, or those below the diagonal."""
        d = self.d_model
        return sum(
            layers * (2 * n * (n + 1) * d if causal else 4 * n**2 * d) for layers, n in self.executed_layers(length)
        )

    def head_flops(self, length: int) -> int:
        """FLOPs of the output head in one forward pass."""
        return 2 * length * self.vocab_size * self.d_model

    def prefill_flops(self, length: int = 4096, *, causal: bool = False) -> int:
        """FLOPs of one forward pass over `length` tokens.

        Args:
          length: tokens of the sequence.
          causal: count only the attention scores a causal mask keeps; the papers count all of them.
        """
        products = self.layer_flops(length) + self.operator_flops(length) + self.head_flops(length)
        return products + self.attention_flops(length, causal=causal)

    def train_flops_per_token(self, length: int, *, causal: bool = False) -> float:
        """FLOPs per token of a training step (forward and backward) at sequence length `length`."""
        return 3 * self.prefill_flops(length, causal=causal) / length


class Declared(NamedTuple):
    """A Linear that an operator of a model declares.

    Attributes:
      field: the field of ModelConfig that names the operator.
      group: the group of the parameter tree that it is in, `steps_{t}` or `entry`.
      t: the iteration; -1 for the entry.
      name: its name within the group.
      linear: its sizes and axes.
    """

    field: str
    group: str
    t: int
    name: str
    linear: Linear


class Operators(NamedTuple):
    """The operators of a model, one for each of the fields `topology`, `pooling` and `allocation`."""

    topology: Topology
    pooling: Pooling
    spreading: Spreading

    def declared(self) -> list[Declared]:
        """All Linears that they declare; pooling and spreading have none at full resolution."""
        entry = self.topology.entry_linears()
        found = [Declared("topology", "entry", -1, name, linear) for name, linear in entry.items()]
        for t, level in enumerate(self.topology.config.schedule):
            own = {"topology": self.topology.linears(level)}
            if level.chunk > 1:
                own |= {"pooling": self.pooling.linears(level), "allocation": self.spreading.linears(level)}
            for field, linears in own.items():
                found += [Declared(field, f"steps_{t}", t, name, linear) for name, linear in linears.items()]
        return found
