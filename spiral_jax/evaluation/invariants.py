"""What holds for every model whatever its operators, tried on a small model with the same ones.

Each check compares two ways to the same numbers, in float32 with weights at unit scale, nothing at zero, and gives a
`Finding`. The models are small so that each compiles in seconds; operators, schedule and optimizer are the given ones.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from spiral_jax.decoding import cached
from spiral_jax.decoding.state import empty_state
from spiral_jax.model.config import ModelConfig
from spiral_jax.model.declarations import check_operators
from spiral_jax.model.spiralformer import SpiralFormer
from spiral_jax.parallel.mesh import MeshConfig, check_divisible, make_mesh
from spiral_jax.training.config import StepConfig, TrainConfig
from spiral_jax.training.loss import mean_window_nats
from spiral_jax.training.step import make_program

# Relative to the numbers' scale. Rounding leaves 1e-6; what these checks look for leaves 1e-3 and more.
TOLERANCE = 1e-4
# Of `sharded`.
MESH = MeshConfig(2, 2, 2)


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a check has found.

    Attributes:
      name: the name of the check.
      compared: what was compared, in a few words.
      difference: the largest difference, relative to the scale of the numbers; None if there was nothing to compare.
      where: where the largest difference is.
    """

    name: str
    compared: str
    difference: float | None
    where: str = ""

    @property
    def ok(self) -> bool:
        # Written so that NaN fails.
        return self.difference is None or self.difference < TOLERANCE


def check(config: StepConfig) -> Iterator[Finding]:
    """All checks, each run when its finding is asked for.

    Raises:
      SpiralError: operators that do not fit the small model, or a mesh.
    """
    model = small(config.model)
    check_operators(model)
    check_divisible(dataclasses.astuple(MESH), model, batch_size=8, accumulation=1)
    yield causality(model)
    yield lengths(model)
    yield rows(model)
    yield scanned(model)
    yield decoded(model)
    yield sharded(dataclasses.replace(config, model=model))


def small(model: ModelConfig) -> ModelConfig:
    """A small model with the operators, schedule and parts of a given one."""
    parts = {part: min(getattr(model, part), 1) for part in ("prelude_layers", "core_layers", "coda_layers")}
    sizes: dict[str, Any] = dict(vocab_size=64, d_model=64, num_heads=4, rotary_fraction=0.25)
    return dataclasses.replace(model, **sizes, **parts, dtype="float32", remat="keep_all", unroll=False)


def causality(model: ModelConfig) -> Finding:
    """Replaces the tokens from each position on: nothing before it may change, at several offsets."""
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
    """Cuts the input short: what comes before the cut may not change."""
    G, L = max(model.chunks, default=1), window(model)
    tried = sorted({1, 2, max(G - 1, 1), G, G + 1, 2 * G + 1} & set(range(L)))
    tokens_1xL = _tokens(1, L)
    logits_BxLxV = forward(model, tokens_1xL)
    found = {f"at length {n}": difference(forward(model, tokens_1xL[:, :n]), logits_BxLxV[:, :n]) for n in tried}
    return _largest("lengths", f"the first {', '.join(map(str, tried))} of {L} tokens", found)


def rows(model: ModelConfig) -> Finding:
    """Replaces the middle row of a batch: the first and the last may not change."""
    tokens_4xL = _tokens(4, window(model))
    one_3xLxV, other_3xLxV = (forward(model, tokens_4xL[rows]) for rows in ([0, 1, 3], [0, 2, 3]))
    found = {f"the {name} row": difference(one_3xLxV[i], other_3xLxV[i]) for name, i in (("first", 0), ("last", 2))}
    return _largest("rows", "rows of a batch beside another one", found)


def scanned(model: ModelConfig) -> Finding:
    """Logits and gradients: neighbouring iterations of one level as a scan, against written out and recomputed."""
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

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    grads, logits_BxLxV = logits_and_gradients(model)
    other = dataclasses.replace(model, unroll=True, remat="keep_inputs")
    plain_grads, plain_logits_BxLxV = logits_and_gradients(other)
    found = {"logits": difference(logits_BxLxV, plain_logits_BxLxV)} | _by_path(grads, plain_grads)
    return _largest("scanned", f"logits and gradients of levels {chunks}, scanned and written out", found)


def decoded(model: ModelConfig) -> Finding:
    """Logits: a prefill and then one token at a time with caches, against the pass over all positions."""
    G, L = max(model.chunks, default=1), window(model)
    starts_B = np.array(sorted({1, 2, max(G - 1, 1), G + 1}))
    tokens_BxL = _tokens(len(starts_B), L)
    full_BxLxV, params, longest = forward(model, tokens_BxL), random_params(model), int(starts_B.max())

    def run(params, tokens_BxL, starts_B):
        module, B = SpiralFormer(model), tokens_BxL.shape[0]
        empty = empty_state(model, B, L + 1)
        first_BxV, state = cached.prefill(module, params, tokens_BxL[:, :longest], starts_B, empty)

        def step(state, m):
            token_B = jnp.take_along_axis(tokens_BxL, (starts_B + m)[:, None], axis=1)[:, 0]
            logits_BxV, state = cached.step(module, params, token_B, state)
            return state, logits_BxV

        _, rest_MxBxV = jax.lax.scan(step, state, jnp.arange(L - longest))
        return jnp.concatenate([first_BxV[None], rest_MxBxV]).swapaxes(0, 1)

    run = jax.jit(run)
    found: dict[str, float] = {}
    # A row alone runs a program of its own.
    for rows in (slice(None), slice(1)):
        found_BxMxV = np.asarray(run(params, jnp.asarray(tokens_BxL[rows]), jnp.asarray(starts_B[rows])))
        for row, start, full in zip(found_BxMxV, starts_B[rows], full_BxLxV[rows], strict=True):
            for m, (logits_V, wanted_V) in enumerate(zip(row, full[start - 1 :], strict=False)):
                where = f"after {start} tokens read at once and {m} by one"
                found[where] = max(found.get(where, 0.0), difference(logits_V, wanted_V))
    return _largest("decoded", f"{L} tokens one at a time, after {', '.join(map(str, starts_B))} at once", found)


def sharded(config: StepConfig) -> Finding:
    """A train step on a mesh of eight devices and on one: loss, gradient norm, and what became of every parameter."""
    if jax.device_count() < MESH.data * MESH.fsdp * MESH.tensor:
        return Finding("sharded", f"nothing: jax has {jax.device_count()} devices here, and 8 are needed", None)
    optimizer = dataclasses.replace(config.optimizer, warmup_steps=0)
    train = TrainConfig(steps=100, batch_size=8, sequence_length=window(config.model), attention="xla")
    params, windows_BxW = random_params(config.model), _tokens(8, train.sequence_length + 1)

    def step(mesh: MeshConfig):
        program = make_program(
            StepConfig(config.model, train, optimizer, mesh),
            make_mesh(mesh, jax.devices()[: mesh.data * mesh.fsdp * mesh.tensor]),
        )
        state = program.init(jax.random.key(0))
        placed = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), params, program.abstract_state.params)
        compiled = program.lowered().compile()
        state, metrics = compiled(state.replace(params=placed), program.placed.put(windows_BxW))
        change = jax.tree.map(lambda x, before: np.asarray(x) - np.asarray(before), state.params, params)
        return {name: np.asarray(metrics[name]) for name in ("loss", "gradient_norm")}, change

    model = SpiralFormer(config.model)
    gradient = jax.grad(lambda params: mean_window_nats(model, params, jnp.asarray(windows_BxW), train.loss_block)[0])
    grads = jax.jit(gradient)(params)
    metrics, change = step(MESH)
    plain_metrics, plain_change = step(MeshConfig(1, 1, 1))
    found = {name: difference(value, plain_metrics[name]) for name, value in metrics.items()}
    # Where a gradient is zero but for rounding, its sign decides what an optimizer that divides by its size does.
    for (path, x), plain, grad in zip(
        jax.tree_util.tree_leaves_with_path(change), *map(jax.tree.leaves, (plain_change, grads)), strict=True
    ):
        is_known = np.abs(grad) > 1e-3 * np.abs(grad).max()
        found[f"parameter {_name(path)}"] = relative(x[is_known], plain[is_known])
    return _largest("sharded", "a train step on data 2 x fsdp 2 x tensor 2 and on one device", found)


def window(model: ModelConfig) -> int:
    """Tokens in which every level closes three chunks, and that no chunk size divides."""
    return 3 * max(model.chunks, default=1) + max((s - g + 1 for g, _, s in model.schedule), default=0) + 3


def offsets(model: ModelConfig) -> list[tuple[int, ...]]:
    """Choices of offsets to try: the model's own, zeros, and the largest."""
    own = tuple(level.offset for level in model.schedule)
    return list(dict.fromkeys([own, tuple(0 for _ in own), tuple(g - 1 for g in model.chunks)]))


def forward(model: ModelConfig, tokens_BxL: np.ndarray) -> np.ndarray:
    """Logits [B, L, V] with `random_params`."""
    return np.asarray(_programs(model, tuple(map(type, model.operators)))[0](random_params(model), tokens_BxL))


def random_params(model: ModelConfig) -> Any:
    """Parameters at unit scale, none of them at its initial zero or one: an error anywhere shows."""
    return _programs(model, tuple(map(type, model.operators)))[1]


@functools.lru_cache(maxsize=16)
def _programs(model: ModelConfig, classes: tuple[type, ...]) -> tuple[Callable, Any]:
    """The compiled forward pass and the parameters."""
    del classes  # of the operators: a name may be registered anew
    module, rng = SpiralFormer(model), np.random.default_rng(1)
    fresh = jax.jit(module.init)(jax.random.key(0), np.zeros((1, 1), np.int32))

    def draw(x):
        x, noise = np.asarray(x), rng.standard_normal(x.shape).astype(np.float32)
        if x.all() and not x.std():
            return x + 0.3 * noise  # scales of LayerNorms
        return np.where(x, 2 * x, (0.3 if x.ndim < 2 else 2 / x.shape[0] ** 0.5) * noise)

    apply = jax.jit(lambda params, tokens_BxL: module.apply({"params": params}, tokens_BxL))
    return apply, jax.tree.map(draw, nn.unbox(fresh["params"]))


def _largest(name: str, compared: str, found: Mapping[str, float]) -> Finding:
    """The finding of a check that compared several things: the largest difference, and where it is."""
    where = max(found, key=lambda where: found[where])
    return Finding(name, compared, found[where], where)


def difference(found: Any, wanted: Any) -> float:
    """The largest difference relative to the scale of `wanted`; infinite where something is NaN."""
    found, wanted = np.asarray(found), np.asarray(wanted)
    return float(np.nan_to_num(np.abs(found - wanted).max() / _scale(wanted), nan=np.inf))


def relative(found: Any, wanted: Any, floor: float = 0.0) -> float:
    """Norm of the difference over the norm of `wanted`, or over `floor` if that is larger."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    size = max(float(np.linalg.norm(wanted)), floor, 1e-30)
    return float(np.nan_to_num(np.linalg.norm(found - wanted) / size, nan=np.inf))


def _by_path(found: Any, wanted: Any) -> dict[str, float]:
    # A gradient that is small because large terms cancel is compared with the scale of those.
    floor = 1e-3 * float(optax.tree.norm(wanted))
    leaves = zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True)
    return {f"gradient of {_name(path)}": relative(x, y, floor) for (path, x), y in leaves}


def _name(path) -> str:
    return "/".join(key.key for key in path)


def _scale(x: np.ndarray) -> float:
    return max(float(np.abs(np.nan_to_num(x)).max()), 1e-6)


def _tokens(rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(2).integers(64, size=(rows, length)).astype(np.int32)
