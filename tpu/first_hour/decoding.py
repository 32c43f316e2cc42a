"""Decoding token by token against the full forward pass, and its speed."""

import dataclasses
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from spiral_jax.decoding import cached
from spiral_jax.decoding.decoder import Decoder, Request
from spiral_jax.decoding.state import empty_state
from spiral_jax.kernels.choose import backend_for
from spiral_jax.model.spiralformer import SpiralFormer
from spiral_jax.parallel.mesh import make_mesh
from spiral_jax.parallel.placed_model import PlacedModel, place
from spiral_jax.training.config import StepConfig
from tpu.first_hour import points, training
from tpu.first_hour.findings import Findings, relative_error, worst_element

# Of logits: of all, and of the worst at a token. float32 is computed in float32.
ALLOWED = {"float32": (1e-4, 1e-3), "bfloat16": (0.03, 0.3)}
PROMPT, NEW = 13, 20  # prompts end inside chunks; every level closes chunks in 20 tokens
ROWS = 4


def run(findings: Findings, size: str, workdir: str, argument: str) -> None:
    """Compares logits of small models, then times those of the points."""
    for family, dtype in training.CASES[size]:
        allowed, worst = ALLOWED[dtype]
        with findings.case(f"{family} {dtype}: cached logits against those of the full pass"):
            with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
                found, truth = logits(training.step_config(family, dtype, size))
            name = f"{family} {dtype}: cached logits"
            findings.at_most(f"{name}, relative error", relative_error(found, truth), allowed)
            findings.at_most(f"{name}, worst element", worst_element(found, truth), worst)
    for point in ("160m-vanilla", "160m-spiral_b"):
        with findings.case(f"{point}: speed of decoding"):
            findings.measured[point] = {
                f"tokens_per_second x{rows}": speed(points.step_config(point, size), rows, size) for rows in (1, 8)
            }


def logits(config: StepConfig) -> tuple[np.ndarray, np.ndarray]:
    """Logits [B, NEW, V] at tokens behind a prompt: by a prefill and single steps, and by one full pass."""
    placed = _placed(config)
    model, params = placed.model, _params(placed)
    tokens_BxL = np.random.default_rng(0).integers(0, config.model.vocab_size, (ROWS, PROMPT + NEW), np.int32)

    @jax.jit
    def by_step(params, tokens_BxL):
        state = empty_state(config.model, ROWS, PROMPT + NEW)
        lengths_B = jnp.full(ROWS, PROMPT, jnp.int32)
        first_BxV, state = cached.prefill(model, params, tokens_BxL[:, :PROMPT], lengths_B, state)

        def one(state, token_B):
            logits_BxV, state = cached.step(model, params, token_B, state)
            return state, logits_BxV

        _, rest_NxBxV = jax.lax.scan(one, state, tokens_BxL[:, PROMPT:-1].T)
        return jnp.concatenate([first_BxV[:, None], rest_NxBxV.swapaxes(0, 1)], axis=1)

    full = jax.jit(lambda params, tokens_BxL: model.apply({"params": params}, tokens_BxL))
    return np.asarray(by_step(params, tokens_BxL)), np.asarray(full(params, tokens_BxL))[:, PROMPT - 1 : -1]


def speed(config: StepConfig, rows: int, size: str) -> float:
    """Tokens per second over all rows, behind the prefill, without a stop."""
    new = 128 if size == "full" else 16
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, remat="keep_all"))
    placed = _placed(config)
    params = _params(placed)
    decoder = Decoder(placed.model, placed.mesh, rows=rows, capacity=64 + new, num_ids=config.model.vocab_size)
    prompts = np.random.default_rng(0).integers(0, config.model.vocab_size, (rows, 64), np.int32)

    def seconds(new_tokens: int) -> float:
        began = time.perf_counter()
        for _ in decoder.run(params, [Request(prompt, new_tokens) for prompt in prompts]):
            pass
        return time.perf_counter() - began

    seconds(2)  # compiles
    return rows * (new - 1) / max(seconds(new) - seconds(1), 1e-9)


def _placed(config: StepConfig) -> PlacedModel:
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    return place(config.model, mesh, backend_for(mesh, config.model))


def _params(placed: PlacedModel):
    model = SpiralFormer(placed.model.config)

    def init(key):
        return nn.unbox(model.init(key, jnp.zeros((1, 1), jnp.int32)))["params"]

    return jax.jit(init, out_shardings=placed.param_shardings)(jax.random.key(0))
