"""Speed of train steps: ours, and other programs' of a transformer of equal shape, beside the machine's products."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spiral_jax.benchmarks import nanodo
from spiral_jax.benchmarks.families import models
from spiral_jax.benchmarks.peer import gpt_neox, update_of
from spiral_jax.model.config import ModelConfig
from spiral_jax.parallel.mesh import MeshConfig, make_mesh
from spiral_jax.progress import Report
from spiral_jax.training.config import OptimizerConfig, StepConfig, TrainConfig
from spiral_jax.training.costs import flops
from spiral_jax.training.step import make_program


class Size(NamedTuple):
    """A model and its batch: `layers` of the transformer, of which the other families are cut."""

    width: int
    heads: int
    layers: int
    vocab_size: int
    batch_size: int
    sequence_length: int


SIZES = {
    "1.2m": Size(128, 2, 6, 256, 4, 256),
    "27m": Size(512, 8, 6, 8192, 1, 1024),
}
PEERS = {"torch": "PyTorch eager", "torch.compile": "torch.compile", "nanodo": "nanodo"}
# The side of the square matrices that show what the machine can do.
SGEMM = 2048


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """What is timed.

    Attributes:
      sizes: of SIZES.
      families: of `families.FAMILIES`.
      peers: of PEERS, beside `vanilla`.
      repeats: turns; in each, every program runs for `seconds`.
      seconds: at least, of steps of one program before the next has its turn.
      unroll: `model.unroll` of ours.
      nanodo: folder of the peer of that name.
    """

    sizes: tuple[str, ...] = ("1.2m", "27m")
    families: tuple[str, ...] = ("vanilla",)
    peers: tuple[str, ...] = ()
    repeats: int = 5
    seconds: float = 1.0
    unroll: bool = True
    nanodo: str = ""


class Timed(NamedTuple):
    """Something to time.

    Attributes:
      run: does it once, to its end; what it returns is of no interest.
      flops: that one run needs.
      tokens: of one run.
      first_seconds: of the first run, with what it compiles.
    """

    run: Callable[[], object]
    flops: float
    tokens: int
    first_seconds: float


def measure(settings: TrainingSettings, report: Report) -> dict[str, Any]:
    """Times every program in turn with the others, as a machine's speed drifts.

    Returns:
      For each `SIZE PROGRAM`: tokens/s (median, lower quartile and range over the repeats), GFLOP/s (of weights, and of
      attention below the diagonal, forward and backward), the share of the machine's best matrix product, seconds of
      the first step, and of ours the speed over each peer's.
    """
    out: dict[str, Any] = {}
    for name in settings.sizes:
        size = SIZES[name]
        configs = models(
            width=size.width, heads=size.heads, layers=size.layers, vocab_size=size.vocab_size, unroll=settings.unroll
        )
        programs = {}
        for family in settings.families:
            report(f"{name} {family}: compiling")
            programs[family] = _ours(configs[family], size)
        for peer in settings.peers:
            report(f"{name} {PEERS[peer]}: compiling")
            if peer == "nanodo":
                programs[peer] = _nanodo(settings.nanodo, configs["vanilla"], size)
            else:
                programs[peer] = _torch(configs["vanilla"], size, compiled=peer == "torch.compile")
        programs["sgemm"] = sgemm()
        if {"torch", "torch.compile"} & set(settings.peers):
            programs["torch sgemm"] = _torch_sgemm()
        seconds = _in_turn(programs, settings, name, report)
        best = max(programs[p].flops / statistics.median(seconds[p]) for p in programs if p.endswith("sgemm"))
        for program, timed in programs.items():
            median = statistics.median(seconds[program])
            row: dict[str, Any] = {"gflops": timed.flops / median / 1e9}
            if timed.tokens:
                row = {
                    "tokens_per_second": timed.tokens / median,
                    "lower_quartile": timed.tokens / float(np.quantile(seconds[program], 0.75)),
                    "slowest": timed.tokens / max(seconds[program]),
                    "fastest": timed.tokens / min(seconds[program]),
                    **row,
                    "of_sgemm": timed.flops / median / best,
                    "first_step_seconds": timed.first_seconds,
                }
            if program in settings.families:
                row |= {f"over_{peer}": statistics.median(seconds[peer]) / median for peer in settings.peers}
            out[f"{name} {program}"] = row
    return out


def _in_turn(
    programs: dict[str, Timed], settings: TrainingSettings, size: str, report: Report
) -> dict[str, list[float]]:
    """Seconds of one run of each program, per repeat."""
    seconds: dict[str, list[float]] = {program: [] for program in programs}
    for repeat in range(settings.repeats):
        report(f"{size}: repeat {repeat + 1} of {settings.repeats}")
        for program, timed in programs.items():
            seconds[program].append(seconds_of(timed.run, settings.seconds))
    return seconds


def seconds_of(run: Callable[[], object], at_least: float) -> float:
    """Of one run, the mean of as many as take `at_least` seconds; before them one that does not count."""
    run()  # caches belong to the program before
    begin, count = time.perf_counter(), 0
    while (passed := time.perf_counter() - begin) < at_least or not count:
        run()
        count += 1
    return passed / count


def step_config(model: ModelConfig, size: Size) -> StepConfig:
    """The recipe's optimizer (AdamW, clipping) on one device."""
    train = TrainConfig(steps=10_000, batch_size=size.batch_size, sequence_length=size.sequence_length)
    return StepConfig(model=model, train=train, optimizer=OptimizerConfig(), mesh=MeshConfig(1, 1, 1))


def _windows(size: Size) -> np.ndarray:
    shape = (size.batch_size, size.sequence_length + 1)
    return np.random.default_rng(0).integers(0, size.vocab_size, shape)


def _ours(model: ModelConfig, size: Size) -> Timed:
    config = step_config(model, size)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    begin = time.perf_counter()
    program = make_program(config, mesh)
    train_step = program.lowered().compile()
    windows_BxW = program.put_rows_of_process(_windows(size).astype(np.int32))
    state = [program.init(jax.random.key(0))]

    def run() -> None:
        state[0], metrics = train_step(state[0], windows_BxW)
        metrics["loss"].block_until_ready()

    run()
    return Timed(run, flops(config).causal, config.train.tokens_per_step, time.perf_counter() - begin)


def sgemm() -> Timed:
    """A product of two square matrices, float32."""
    a_NxN = jnp.ones((SGEMM, SGEMM), jnp.float32)
    product = jax.jit(jnp.dot)
    return Timed(lambda: product(a_NxN, a_NxN).block_until_ready(), 2.0 * SGEMM**3, 0, 0.0)


def _torch_sgemm() -> Timed:
    import torch

    a_NxN = torch.ones(SGEMM, SGEMM)
    return Timed(lambda: torch.mm(a_NxN, a_NxN).sum().item(), 2.0 * SGEMM**3, 0, 0.0)


def _torch(model: ModelConfig, size: Size, compiled: bool) -> Timed:
    """A train step of the peer: float32, AdamW, clipping, SDPA."""
    import torch

    peer = gpt_neox(model, size.sequence_length).train()
    update = update_of(peer)
    windows_BxW = torch.tensor(_windows(size))
    inputs, targets = windows_BxW[:, :-1].contiguous(), windows_BxW[:, 1:].reshape(-1)

    def loss_of(tokens, targets):
        logits_BxLxV = peer(tokens, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits_BxLxV.flatten(0, 1), targets)

    if compiled:
        loss_of = torch.compile(loss_of)

    def run() -> None:
        peer.zero_grad(set_to_none=True)
        loss = loss_of(inputs, targets)
        loss.backward()
        update()
        loss.item()

    begin = time.perf_counter()
    run()
    return _credited(run, model, size, begin)


def _nanodo(folder: str, model: ModelConfig, size: Size) -> Timed:
    """A train step of nanodo's transformer."""
    begin = time.perf_counter()
    run = nanodo.train_step(folder, model, _windows(size))
    run()
    return _credited(run, model, size, begin)


def _credited(run: Callable[[], object], model: ModelConfig, size: Size, begin: float) -> Timed:
    """A peer's step, with the FLOPs of ours; `begin` is when its first one began."""
    config = step_config(model, size)
    return Timed(run, flops(config).causal, config.train.tokens_per_step, time.perf_counter() - begin)
