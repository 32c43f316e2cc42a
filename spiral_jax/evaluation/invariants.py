"""What holds for every model whatever its operators, tried on a small model with the same ones.

Each check compares two ways to the same numbers, in float32 with weights at unit scale, nothing at zero, and gives a
`Finding`. The models are small so that each compiles in seconds; operators, schedule and optimizer are the given ones.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from spiral_jax.decoding import cached
from spiral_jax.decoding.state import empty_state
from spiral_jax.model.config import ModelConfig
from spiral_jax.model.spiralformer import SpiralFormer
from spiral_jax.parallel.mesh import MeshConfig, make_mesh
from spiral_jax.training.config import StepConfig, TrainConfig
from spiral_jax.training.step import make_program

# Relative to the numbers' scale. Rounding leaves 1e-6; what these checks look for leaves 1e-3 and more.
TOLERANCE = 1e-4
# Code generation in less time; the operations are the same.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a check has found.

    Attributes:
      name: of the check.
      compared: what was compared, in a few words.
      difference: the largest, relative to the scale of the numbers; None if there was nothing to compare.
      where: where it is.
    """

    name: str
    compared: str
    difference: float | None
    where: str = ""

    @property
    def ok(self) -> bool:
        # Written so that a difference that is no number fails.
        return self.difference is None or self.difference < TOLERANCE


def check(config: StepConfig) -> Iterator[Finding]:
    """All checks, each run when its finding is asked for."""
    model = small(config.model)
    yield causality(model)
    yield lengths(model)
    yield rows(model)
    yield scanned(model)
    yield decoded(model)
    yield sharded(dataclasses.replace(config, model=model))


def small(model: ModelConfig) -> ModelConfig:
    """A small model with the operators, schedule and parts of a given one."""
    parts = {part: min(getattr(model, part), 1) for part in ("prelude_layers", "core_layers", "coda_layers")}
    sizes = dict(vocab_size=64, d_model=64, num_heads=4, rotary_fraction=0.25)
    return dataclasses.replace(model, **sizes, **parts, dtype="float32", remat="keep_all", unroll=False)


def causality(model: ModelConfig) -> Finding:
    """Tokens from each position on are replaced by others: nothing before it may change. At several offsets."""
    worst, where, L = 0.0, "", window(model)
    tokens_1xL = _tokens(1, L)
    other_1xL = (tokens_1xL + 1 + np.arange(L) % 62) % 64
    cut_Cx1 = np.arange(1, L)[:, None]
    changed_CxL = np.where(np.arange(L) < cut_Cx1, tokens_1xL, other_1xL)
    tried = offsets(model)
    for chosen in tried:
        staggered = dataclasses.replace(model, offsets=chosen)
        logits_BxLxV = forward(staggered, np.concatenate([tokens_1xL, changed_CxL]))
        change_CxL = np.abs(logits_BxLxV[1:] - logits_BxLxV[0]).max(-1) / _scale(logits_BxLxV)
        change_CxL = np.nan_to_num(np.where(np.arange(L) < cut_Cx1, change_CxL, 0.0), nan=np.inf)
        if change_CxL.max() > worst:
            worst = float(change_CxL.max())
            # The latest cut that shows it is the nearest token of those seen.
            c, i = np.argwhere(change_CxL > min(TOLERANCE, worst / 2))[-1]
            where = f"with offsets {chosen} token {i} changes with token {c + 1} or later ones"
    return Finding("causality", f"{len(tried)} choices of offsets, each of {L} tokens' future", worst, where)


def lengths(model: ModelConfig) -> Finding:
    """The input cut short: what comes before the cut may not change."""
    G, L = max(model.chunks, default=1), window(model)
    tried = sorted({1, 2, max(G - 1, 1), G, G + 1, 2 * G + 1} & set(range(L)))
    tokens_1xL = _tokens(1, L)
    logits_BxLxV = forward(model, tokens_1xL)
    differences = {n: difference(forward(model, tokens_1xL[:, :n]), logits_BxLxV[:, :n]) for n in tried}
    n = max(differences, key=differences.get)
    return Finding("lengths", f"the first {', '.join(map(str, tried))} of {L} tokens", differences[n], f"at length {n}")


def rows(model: ModelConfig) -> Finding:
    """A row of a batch beside another one, and beside a third."""
    tokens_3xL = _tokens(3, window(model))
    beside = forward(model, tokens_3xL[:2])[0], forward(model, tokens_3xL[::2])[0]
    return Finding("rows", "a row of a batch beside other rows", difference(*beside), "the first row")


def scanned(model: ModelConfig) -> Finding:
    """Neighbouring iterations of one level as a scan, and written out: logits and gradients."""
    twice = tuple(itertools.chain(*((level, level) for level in dict.fromkeys(model.schedule))))
    chunks, offsets, shifts = zip(*twice, strict=True) if twice else ((), (), ())
    model = dataclasses.replace(model, chunks=chunks, offsets=offsets, shifts=shifts, scan_iterations_from=2)
    if not any(model.scans(count) for _, count in model.runs):
        return Finding("scanned", "nothing: this model never runs its iterations as a scan", None)
    tokens_BxL = _tokens(2, window(model))
    params = random_params(model)

    def logits_and_gradients(model):
        def loss(params):
            logits_BxLxV = SpiralFormer(model).apply({"params": params}, tokens_BxL)
            return jnp.mean(jnp.square(logits_BxLxV)), logits_BxLxV

        return jax.jit(jax.grad(loss, has_aux=True), compiler_options=QUICK)(params)

    grads, logits_BxLxV = logits_and_gradients(model)
    plain_grads, plain_logits_BxLxV = logits_and_gradients(dataclasses.replace(model, unroll=True))
    found = {"logits": difference(logits_BxLxV, plain_logits_BxLxV)} | _by_path(grads, plain_grads)
    worst = max(found, key=found.get)
    return Finding("scanned", f"logits and gradients of levels {chunks}, scanned and written out", found[worst], worst)


def decoded(model: ModelConfig) -> Finding:
    """A prefill and then one token at a time with caches, against the pass over all positions."""
    G, L = max(model.chunks, default=1), window(model)
    starts_B = np.array(sorted({1, 2, max(G - 1, 1), G + 1}))
    tokens_BxL = _tokens(len(starts_B), L)
    full_BxLxV, params = forward(model, tokens_BxL), random_params(model)
    longest = int(starts_B.max())

    def run(params, tokens_BxL, starts_B):
        module, B = SpiralFormer(model), tokens_BxL.shape[0]
        first_BxV, state = cached.prefill(
            module, params, tokens_BxL[:, :longest], starts_B, empty_state(model, B, L + 1)
        )

        def step(state, m):
            token_B = jnp.take_along_axis(tokens_BxL, (starts_B + m)[:, None], axis=1)[:, 0]
            logits_BxV, state = cached.step(module, params, token_B, state)
            return state, logits_BxV

        _, rest_MxBxV = jax.lax.scan(step, state, jnp.arange(L - longest))
        return jnp.concatenate([first_BxV[None], rest_MxBxV]).swapaxes(0, 1)

    run = jax.jit(run, compiler_options=QUICK)
    worst, where = -1.0, ""
    # A row alone runs a program of its own.
    for rows in (slice(None), slice(1)):
        found_BxMxV = np.asarray(run(params, jnp.asarray(tokens_BxL[rows]), jnp.asarray(starts_B[rows])))
        for row, start, full in zip(found_BxMxV, starts_B[rows], full_BxLxV[rows], strict=True):
            for m, (logits_V, wanted_V) in enumerate(zip(row, full[start - 1 :], strict=False)):
                found = difference(logits_V, wanted_V)
                if found > worst:
                    worst, where = found, f"after {start} tokens read at once and {m} by one"
    return Finding("decoded", f"{L} tokens one at a time, after {', '.join(map(str, starts_B))} at once", worst, where)


def sharded(config: StepConfig) -> Finding:
    """Two train steps on a mesh of eight devices and on one: loss, gradient norm and every parameter's change."""
    if jax.device_count() < 8:
        return Finding("sharded", f"nothing: jax has {jax.device_count()} devices here, and 8 are needed", None)
    # Gradients that are zero but for rounding stay without effect.
    optimizer = dataclasses.replace(config.optimizer, warmup_steps=None, epsilon=1e-3)
    train = TrainConfig(steps=100, batch_size=8, sequence_length=window(config.model), attention="xla")
    params = random_params(config.model)
    windows_BxW = _tokens(8, train.sequence_length + 1)

    def steps(mesh: MeshConfig):
        run = StepConfig(model=config.model, train=train, optimizer=optimizer, mesh=mesh)
        sizes = dataclasses.astuple(mesh)
        program = make_program(run, make_mesh(mesh, jax.devices()[: int(np.prod(sizes))]))
        state = program.init(jax.random.key(0))
        placed = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), params, program.abstract_state.params)
        state = state.replace(params=placed)
        step = program.train_step.lower(program.abstract_state, program.abstract_batch)
        step = step.compile(compiler_options=QUICK)
        for _ in range(2):
            state, metrics = step(state, program.put(windows_BxW))
        change = jax.tree.map(lambda x, before: np.asarray(x) - np.asarray(before), state.params, params)
        return {name: np.asarray(metrics[name]) for name in ("loss", "gradient_norm")}, change

    metrics, change = steps(MeshConfig(2, 2, 2))
    plain_metrics, plain_change = steps(MeshConfig(1, 1, 1))
    found = {name: difference(value, plain_metrics[name]) for name, value in metrics.items()}
    # An optimizer of one's own may know no epsilon, and divide rounding by rounding.
    found["parameters"] = relative(jax.tree.leaves(change), jax.tree.leaves(plain_change)) / 10
    worst = max(found, key=found.get)
    return Finding("sharded", "two train steps on data 2 x fsdp 2 x tensor 2 and on one device", found[worst], worst)


def window(model: ModelConfig) -> int:
    """Tokens in which every level closes three chunks, and that no chunk size divides."""
    return 3 * max(model.chunks, default=1) + max((s - g + 1 for g, _, s in model.schedule), default=0) + 3


def offsets(model: ModelConfig) -> list[tuple[int, ...]]:
    """Choices of offsets: the model's own, none, and the largest."""
    own = tuple(level.offset for level in model.schedule)
    return list(dict.fromkeys([own, tuple(0 for _ in own), tuple(g - 1 for g in model.chunks)]))


def forward(model: ModelConfig, tokens_BxL: np.ndarray) -> np.ndarray:
    """Logits [B, L, V]."""
    return np.asarray(_compiled(model)(random_params(model), tokens_BxL))


@functools.lru_cache(maxsize=16)
def _compiled(model: ModelConfig) -> Callable:
    return jax.jit(lambda params, tokens: SpiralFormer(model).apply({"params": params}, tokens), compiler_options=QUICK)


@functools.lru_cache(maxsize=16)
def random_params(model: ModelConfig) -> Any:
    """Parameters at unit scale, none of them at its initial zero or one: an error anywhere shows."""
    tokens_1x1 = np.zeros((1, 1), np.int32)
    init = jax.jit(SpiralFormer(model).init, compiler_options=QUICK)
    params = nn.unbox(init(jax.random.key(0), tokens_1x1)["params"])
    rng = np.random.default_rng(1)

    def draw(x):
        x, noise = np.asarray(x), rng.standard_normal(x.shape).astype(np.float32)
        if x.all() and not x.std():
            return x + 0.3 * noise  # scales of LayerNorms
        return np.where(x, 2 * x, (0.3 if x.ndim < 2 else 2 / x.shape[0] ** 0.5) * noise)

    return jax.tree.map(draw, params)


def difference(found: Any, wanted: Any) -> float:
    """The largest, relative to the scale of `wanted`; what is no number is infinitely different."""
    found, wanted = np.asarray(found), np.asarray(wanted)
    return float(np.nan_to_num(np.abs(found - wanted).max() / _scale(wanted), nan=np.inf))


def relative(found: list, wanted: list) -> float:
    """Norm of the difference of lists of arrays over the norm of `wanted`."""
    squares = [
        (np.sum(np.square(a - b, dtype=np.float64)), np.sum(np.square(b, dtype=np.float64)))
        for a, b in zip(found, wanted, strict=True)
    ]
    off, size = map(sum, zip(*squares, strict=True))
    return float(np.nan_to_num(np.sqrt(off / max(size, 1e-30)), nan=np.inf))


def _by_path(found: Any, wanted: Any) -> dict[str, float]:
    of_path = dict(jax.tree_util.tree_leaves_with_path(wanted))
    return {
        "gradient of " + "/".join(key.key for key in path): relative([np.asarray(x)], [np.asarray(of_path[path])])
        for path, x in jax.tree_util.tree_leaves_with_path(found)
    }


def _scale(x: np.ndarray) -> float:
    return max(float(np.abs(np.nan_to_num(x)).max()), 1e-6)


def _tokens(rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(2).integers(64, size=(rows, length)).astype(np.int32)
