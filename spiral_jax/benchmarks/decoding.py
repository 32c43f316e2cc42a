"""Speed of decoding for four models of equal width and depth: a transformer, a full-resolution loop, two spirals."""

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
from spiral_jax.decoding.decoder import Decoder, Request, bytes_per_row
from spiral_jax.errors import require
from spiral_jax.model.config import Dtype, ModelConfig
from spiral_jax.model.spiralformer import SpiralFormer, unembed
from spiral_jax.parallel.mesh import MeshConfig, make_mesh
from spiral_jax.progress import Report


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
    """

    width: int = 768
    layers: int = 12
    vocab_size: int = 50304
    new_tokens: int = 256
    prompt_tokens: int = 64
    batch_sizes: tuple[int, ...] = (1, 8)
    repeats: int = 3
    dtype: Dtype = "float32"

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
      that of the transformer, divided by what the layer counts alone would give.
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
        for name, config in configs.items():
            prefill, whole, uncached = (
                statistics.median(seconds[name][kind]) for kind in ("prefill", "all", "uncached")
            )
            out[f"{name} x{batch}"] = {
                "prefill_seconds": prefill,
                "tokens_per_second": batch * (settings.new_tokens - 1) / (whole - prefill),
                "uncached_tokens_per_second": batch / uncached,
                "layer_runs_per_token": layer_runs(config),
                "bytes_per_token": bytes_per_row(config, capacity) / capacity,
            }
        rates = ", ".join(f"{name} {out[f'{name} x{batch}']['tokens_per_second']:.1f}" for name in configs)
        report(f"{batch} at a time, tokens/s: {rates}")
        plain = out[f"vanilla x{batch}"]
        for name in configs:
            entry = out[f"{name} x{batch}"]
            ceiling = plain["layer_runs_per_token"] / entry["layer_runs_per_token"]
            entry["of_ceiling"] = entry["tokens_per_second"] / plain["tokens_per_second"] / ceiling
    return out


def _runs(config: ModelConfig, batch: int, settings: DecodingSettings) -> dict[str, Callable[[], Any]]:
    """What is timed of one model: reading the prompts, all of it, and one full pass over all positions."""
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    model = SpiralFormer(config)
    init = jax.jit(lambda key: nn.unbox(model.init(key, jnp.zeros((1, 1), jnp.int32)))["params"])
    params = jax.block_until_ready(init(jax.random.key(0)))
    rng = np.random.default_rng(0)
    longest = settings.prompt_tokens
    lengths = [longest] if batch == 1 else np.linspace(longest // 8, longest, batch).astype(int)
    prompts = [rng.integers(0, config.vocab_size, length) for length in lengths]
    capacity = longest + settings.new_tokens
    decoder = Decoder(model, mesh, rows=batch, capacity=capacity, num_ids=config.vocab_size)
    full_pass = jax.jit(lambda params, tokens_BxL, position: _full_pass(model, params, tokens_BxL, position))
    tokens_BxL = rng.integers(0, config.vocab_size, (batch, capacity))

    def decode(new_tokens: int) -> None:
        for _ in decoder.run(params, [Request(prompt, new_tokens) for prompt in prompts]):
            pass

    return {
        "prefill": lambda: decode(1),
        "all": lambda: decode(settings.new_tokens),
        "uncached": lambda: jax.block_until_ready(full_pass(params, tokens_BxL, longest)),
    }


def _full_pass(model: SpiralFormer, params, tokens_BxL, position):
    h_BxLxD, _ = model.apply({"params": params}, tokens_BxL, method="hidden")
    h_Bx1xD = jax.lax.dynamic_slice_in_dim(h_BxLxD, position, 1, axis=1)
    return jnp.argmax(unembed(h_Bx1xD, params["head"]["kernel"])[:, 0], axis=-1)
