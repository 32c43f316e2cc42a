"""Speed of decoding for four models of equal width and depth: a transformer, a full-resolution loop, two spirals.

Beside them, if asked for, `transformers.generate` of the transformer.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from spiral_jax.benchmarks.families import models
from spiral_jax.benchmarks.peer import gpt_neox
from spiral_jax.decoding.decoder import Decoder, Request, bytes_per_row
from spiral_jax.errors import require
from spiral_jax.kernels.choose import backend_for
from spiral_jax.model.config import Dtype, ModelConfig
from spiral_jax.model.spiralformer import SpiralFormer, unembed
from spiral_jax.parallel.mesh import MeshConfig, make_mesh
from spiral_jax.parallel.placed_model import place
from spiral_jax.progress import Report

PEER = "transformers"


@dataclasses.dataclass(frozen=True)
class DecodingSettings:
    """What is timed.

    Attributes:
      width: d of every model; heads are 64 wide.
      layers: of the transformer, a multiple of 6; the others are cut as in the papers.
      vocab_size: ids.
      new_tokens: to add to every prompt.
      prompt_tokens: of the longest prompt; those of several rows go down to an eighth of it.
      batch_sizes: texts at a time.
      repeats: the median of as many.
      dtype: to compute in.
      peer: whether to time transformers' GPT-NeoX of the transformer's shape as well: greedy, float32, with its cache.
    """

    width: int = 768
    layers: int = 12
    vocab_size: int = 50304
    new_tokens: int = 256
    prompt_tokens: int = 64
    batch_sizes: tuple[int, ...] = (1, 8)
    repeats: int = 3
    dtype: Dtype = "float32"
    peer: bool = False

    def __post_init__(self):
        require(self.width >= 64 and self.width % 64 == 0, "--width", self.width, "a multiple of 64")
        require(self.layers >= 6 and self.layers % 6 == 0, "--layers", self.layers, "a multiple of 6")
        require(self.new_tokens >= 2, "--new_tokens", self.new_tokens, "2 or more")
        require(self.prompt_tokens >= 8, "--prompt_tokens", self.prompt_tokens, "8 or more")


def layer_runs(config: ModelConfig) -> float:
    """Layers that run per token, on average over a period of the schedule."""
    core = sum(config.core_layers / level.chunk for level in config.schedule)
    return config.prelude_layers + core + config.coda_layers


def measure(settings: DecodingSettings, report: Report) -> dict[str, Any]:
    """Times every model at every batch size.

    Returns:
      For each `MODEL xBATCH`: seconds of the prefill, tokens per second after it, the same without a cache (a full pass
      over all positions per token), layer runs per token, bytes of state per token; and `of_ceiling`, the speed over
      that of the transformer, divided by what the layer counts alone would give. For `transformers xBATCH` the first
      two, and what of ours is measured against them: `vanilla_over_it`, `vanilla_prefill_over_it`.
    """
    out: dict[str, Any] = {"new_tokens": settings.new_tokens, "width": settings.width, "layers": settings.layers}
    configs = models(
        width=settings.width,
        heads=settings.width // 64,
        layers=settings.layers,
        vocab_size=settings.vocab_size,
        dtype=settings.dtype,
    )
    for batch in settings.batch_sizes:
        cases = {name: _runs(config, batch, settings) for name, config in configs.items()}
        if settings.peer:
            cases[PEER] = _runs_of_peer(configs["vanilla"], batch, settings)
        for name, runs in cases.items():
            report(f"{name}, {batch} at a time: compiling")
            for run in runs.values():
                run()
        seconds: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in runs} for name, runs in cases.items()}
        # In turn, as a machine's speed drifts.
        for repeat in range(settings.repeats):
            report(f"{batch} at a time: repeat {repeat + 1} of {settings.repeats}")
            for name, runs in cases.items():
                for kind, run in runs.items():
                    begin = time.perf_counter()
                    run()
                    seconds[name][kind].append(time.perf_counter() - begin)
        capacity = settings.prompt_tokens + settings.new_tokens
        for name in cases:
            prefill, whole = (statistics.median(seconds[name][kind]) for kind in ("prefill", "all"))
            rate = batch * (settings.new_tokens - 1) / (whole - prefill)
            out[f"{name} x{batch}"] = {"prefill_seconds": prefill, "tokens_per_second": rate}
        for name, config in configs.items():
            out[f"{name} x{batch}"] |= {
                "uncached_tokens_per_second": batch / statistics.median(seconds[name]["uncached"]),
                "layer_runs_per_token": layer_runs(config),
                "bytes_per_token": bytes_per_row(config, capacity) / capacity,
            }
        rates = ", ".join(f"{name} {out[f'{name} x{batch}']['tokens_per_second']:.1f}" for name in cases)
        report(f"{batch} at a time, tokens/s: {rates}")
        plain = out[f"vanilla x{batch}"]
        for name in configs:
            entry = out[f"{name} x{batch}"]
            ceiling = plain["layer_runs_per_token"] / entry["layer_runs_per_token"]
            entry["of_ceiling"] = entry["tokens_per_second"] / plain["tokens_per_second"] / ceiling
        if settings.peer:
            theirs = out[f"{PEER} x{batch}"]
            theirs["vanilla_over_it"] = plain["tokens_per_second"] / theirs["tokens_per_second"]
            theirs["vanilla_prefill_over_it"] = theirs["prefill_seconds"] / plain["prefill_seconds"]
    return out


def _runs(config: ModelConfig, batch: int, settings: DecodingSettings) -> dict[str, Callable[[], Any]]:
    """What is timed of one model: reading the prompts, all of it, and one full pass over all positions."""
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    model = place(config, mesh, backend_for(mesh, config)).model
    init = jax.jit(lambda key: nn.unbox(model.init(key, jnp.zeros((1, 1), jnp.int32)))["params"])
    params = jax.block_until_ready(init(jax.random.key(0)))
    prompts, longest = _prompts(batch, settings), settings.prompt_tokens
    capacity = longest + settings.new_tokens
    decoder = Decoder(model, mesh, rows=batch, capacity=capacity, num_ids=config.vocab_size)
    full_pass = jax.jit(lambda params, tokens_BxL, position: _full_pass(model, params, tokens_BxL, position))
    tokens_BxL = np.zeros((batch, capacity), np.int32)

    def decode(new_tokens: int) -> None:
        for _ in decoder.run(params, [Request(prompt, new_tokens) for prompt in prompts]):
            pass

    return {
        "prefill": lambda: decode(1),
        "all": lambda: decode(settings.new_tokens),
        "uncached": lambda: jax.block_until_ready(full_pass(params, tokens_BxL, longest)),
    }


def _runs_of_peer(config: ModelConfig, batch: int, settings: DecodingSettings) -> dict[str, Callable[[], Any]]:
    """What is timed of transformers' model; shorter prompts are padded on the left, as it wants them."""
    import torch

    peer = gpt_neox(config, settings.prompt_tokens + settings.new_tokens).eval()
    tokens_BxP = torch.zeros(batch, settings.prompt_tokens, dtype=torch.long)
    mask_BxP = torch.zeros_like(tokens_BxP)
    for row, prompt in enumerate(_prompts(batch, settings)):
        tokens_BxP[row, -len(prompt) :], mask_BxP[row, -len(prompt) :] = torch.tensor(prompt), 1

    def generate(new_tokens: int) -> None:
        with torch.inference_mode():
            peer.generate(
                tokens_BxP, attention_mask=mask_BxP, max_new_tokens=new_tokens, min_new_tokens=new_tokens,
                do_sample=False, pad_token_id=0, eos_token_id=None,
            )  # fmt: skip

    return {"prefill": lambda: generate(1), "all": lambda: generate(settings.new_tokens)}


def _prompts(batch: int, settings: DecodingSettings) -> list[np.ndarray]:
    rng, longest = np.random.default_rng(0), settings.prompt_tokens
    lengths = [longest] if batch == 1 else np.linspace(longest // 8, longest, batch).astype(int)
    return [rng.integers(0, settings.vocab_size, length) for length in lengths]


def _full_pass(model: SpiralFormer, params, tokens_BxL, position):
    h_BxLxD, _ = model.apply({"params": params}, tokens_BxL, method="hidden")
    h_Bx1xD = jax.lax.dynamic_slice_in_dim(h_BxLxD, position, 1, axis=1)
    return jnp.argmax(unembed(h_Bx1xD, params["head"]["kernel"])[:, 0], axis=-1)
