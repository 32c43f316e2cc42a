"""The fastest way to lay a run out on a slice, by prediction: mesh, micro-batch, remat, when the core is gathered."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, get_args

from spiral_jax.errors import SpiralError
from spiral_jax.hardware import GIB, Slice
from spiral_jax.model.config import Remat
from spiral_jax.parallel.mesh import MeshConfig, abstract_mesh
from spiral_jax.progress import Report
from spiral_jax.roofline.hlo import UnreadableProgram
from spiral_jax.roofline.on_paper import estimate, peak_bytes, product_seconds
from spiral_jax.roofline.report import DoesNotFit, compile_step, report
from spiral_jax.training import costs
from spiral_jax.training.config import GatherCore, StepConfig
from spiral_jax.training.fsdp import holds_core
from spiral_jax.training.step import TrainState

# Relative difference of two layouts' seconds below which closed forms do not tell which is faster.
TIE = 0.01
# Of a device's memory, what by the closed forms a layout may need to be taken for one that fits.
SURE = 0.95


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search has seen.

    Attributes:
      best: the report of the fastest predicted layout; None where nothing fitted.
      config: its configuration.
      tried: one entry for each compiled layout, in order.
      left: layouts that might fit and were not compiled.
    """

    best: dict[str, Any] | None
    config: StepConfig | None
    tried: list[dict[str, Any]]
    left: int


def layouts(config: StepConfig, num_devices: int) -> Iterator[StepConfig]:
    """Every layout that divides: tensor 1 or 2, fsdp and accumulation in powers of two, all remats."""
    powers = [2**i for i in range(num_devices.bit_length())]
    for tensor, fsdp in itertools.product((1, 2), powers):
        if num_devices % (tensor * fsdp):
            continue
        mesh = MeshConfig(num_devices // (tensor * fsdp), fsdp, tensor)
        rows = config.train.batch_size // (mesh.data * fsdp)
        accumulations = [2**i for i in range(rows.bit_length())]
        for accumulation, remat, gather in itertools.product(accumulations, get_args(Remat), get_args(GatherCore)):
            layout = dataclasses.replace(
                config,
                mesh=mesh,
                model=dataclasses.replace(config.model, remat=remat),
                train=dataclasses.replace(config.train, accumulation=accumulation, gather_core=gather),
            )
            try:
                layout.check_mesh(num_devices)
            except SpiralError:
                continue
            if gather == "iteration" or holds_core(layout.model, layout.train, abstract_mesh(mesh, num_devices)):
                yield layout


def search(config: StepConfig, chips: Slice, num_slices: int, max_compilations: int, say: Report) -> Found:
    """Compiles the most promising layouts: those that should fit by the closed forms first, of them the fastest.

    Not compiled are layouts whose parameters and kept activations alone do not fit, those that keep as much or more of
    as many or more rows on the same mesh as one that did not fit, and those that could not be faster than the best so
    far if nothing but matrix products took time.

    Args:
      config: the run; its mesh, accumulation, remat and gathering are what is searched.
      chips: the slice.
      num_slices: how many of it.
      max_compilations: where to stop; each takes minutes.
      say: told what happens.

    Raises:
      SpiralError: no layout divides, or none can fit.
    """
    num_devices = chips.devices * num_slices
    every = [one for one in layouts(config, num_devices) if one.mesh.data % num_slices == 0]
    if not every:
        raise SpiralError(
            f"train.batch_size is {config.train.batch_size}; allowed: what a mesh in powers of two divides over "
            f"{num_devices} devices, with model.d_model {config.model.d_model}"
        )
    state_on = functools.cache(lambda mesh: costs.state_on(dataclasses.replace(config, mesh=mesh), num_devices))
    usable = chips.generation.hbm_bytes
    least = [_least_bytes(one, num_devices, state_on(one.mesh)) for one in every]
    if min(least) >= usable:
        raise SpiralError(
            f"--topology is {str(chips)!r}, where no layout can fit: the smallest needs at least "
            f"{min(least) / GIB:.2f} GiB of {usable / GIB:.2f} GiB a device; allowed: a larger slice"
        )
    waiting = [one for one, size in zip(every, least, strict=True) if size < usable]
    waiting = in_order(waiting, chips, num_slices, state_on)
    best: dict[str, Any] | None = None
    best_config: StepConfig | None = None
    tried: list[dict[str, Any]] = []
    while waiting and len(tried) < max_compilations:
        layout = waiting.pop(0)
        entry: dict[str, Any] = {"flags": flags_of(layout)}
        tried.append(entry)
        say(f"{len(tried)} of at most {max_compilations}: {entry['flags']}")
        try:
            found = report(layout, chips, num_slices, compile_step(layout, chips, num_slices, say))
        except (DoesNotFit, UnreadableProgram) as error:
            # One layout's failure is a result, and no reason to lose those of the others.
            entry |= {"failed": str(error)}
            say(f"  {error}")
            if isinstance(error, DoesNotFit):
                waiting = [other for other in waiting if not _needs_as_much(other, layout)]
            continue
        seconds = found["prediction"]["step_seconds"]
        entry |= {"peak_bytes": found["memory"]["peak_bytes"], "predicted_step_seconds": seconds}
        say(f"  predicted {seconds:.3f} s, {found['memory']['peak_bytes'] / GIB:.2f} GiB")
        if best is None or seconds < best["prediction"]["step_seconds"]:
            best, best_config = found, layout
        fastest = best["prediction"]["step_seconds"]
        waiting = [other for other in waiting if product_seconds(other, chips, num_devices) < fastest]
    return Found(best, best_config, tried, len(waiting))


def in_order(
    waiting: list[StepConfig], chips: Slice, num_slices: int, state_on: Callable[[MeshConfig], TrainState]
) -> list[StepConfig]:
    """Those that should fit first; of them the best of each `model.remat`, then the second best of each, and so on.

    Layouts that differ only in mesh or micro-batches are often nearer to each other than closed forms are right (TIE):
    of those, the one with the simplest mesh and the fewest micro-batches is taken to be the best.
    """

    def promise(one: StepConfig) -> tuple[bool, int, int, int, float]:
        state = state_on(one.mesh)
        seconds = estimate(one, chips, num_slices, state).step_seconds
        mesh, fits = one.mesh, should_fit(one, chips, num_slices, state)
        return not fits, round(math.log(seconds) / TIE), mesh.tensor + mesh.data, one.train.accumulation, seconds

    promises = sorted(((promise(one), i) for i, one in enumerate(waiting)))
    places: dict[str, int] = {}
    order = []
    for (does_not_fit, *rest), i in promises:
        place = places[waiting[i].model.remat] = places.get(waiting[i].model.remat, -1) + 1
        order.append((does_not_fit, place, rest, i))
    return [waiting[i] for *_, i in sorted(order)]


def should_fit(config: StepConfig, chips: Slice, num_slices: int, state: TrainState | None = None) -> bool:
    """Whether a layout fits by closed forms, with a little left for what they leave out."""
    return peak_bytes(config, chips.devices * num_slices, state) < SURE * chips.generation.hbm_bytes


def _needs_as_much(layout: StepConfig, other: StepConfig) -> bool:
    """Whether a layout surely needs no less memory than another: it keeps as much of as many rows, on the same mesh."""
    kept = get_args(Remat)
    same = layout.mesh == other.mesh and layout.train.gather_core == other.train.gather_core
    return (
        same
        and layout.train.accumulation <= other.train.accumulation
        and kept.index(layout.model.remat) <= kept.index(other.model.remat)
    )


def flags_of(config: StepConfig) -> str:
    """The command-line flags of a layout."""
    mesh, train = config.mesh, config.train
    return (
        f"--config.mesh.data={mesh.data} --config.mesh.fsdp={mesh.fsdp} --config.mesh.tensor={mesh.tensor} "
        f"--config.train.accumulation={train.accumulation} --config.model.remat={config.model.remat} "
        f"--config.train.gather_core={train.gather_core}"
    )


def nearest_that_fits(config: StepConfig, chips: Slice, num_slices: int, say: Report, tries: int = 4) -> str | None:
    """Flags with which a run fits: micro-batches of half the rows, or only inputs kept, in ever smaller ones; or None.

    Each try is a compilation.
    """
    num_devices = chips.devices * num_slices
    data, fsdp, _ = config.check_mesh(num_devices)
    rows = config.train.batch_size // (data * fsdp * config.train.accumulation)
    kept = config.model.remat
    changes = [(2, kept)] if rows % 2 == 0 else []
    changes += [(factor, "keep_inputs") for factor in (2**i for i in range(rows.bit_length())) if rows % factor == 0]
    changes = [change for change in dict.fromkeys(changes) if change != (1, kept)]
    while changes and tries:
        (factor, remat), *changes = changes
        other = dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, remat=remat),
            train=dataclasses.replace(config.train, accumulation=config.train.accumulation * factor),
        )
        if _least_bytes(other, num_devices) >= chips.generation.hbm_bytes:
            continue
        tries -= 1
        flags = f"--config.train.accumulation={other.train.accumulation} --config.model.remat={remat}"
        say(f"does not fit; trying {flags}")
        try:
            compile_step(other, chips, num_slices, say)
        except DoesNotFit as error:
            say(f"  {error}")
            if error.needed:
                # Most of what is needed goes with the rows: smaller steps than this would be minutes for nothing.
                least = 0.7 * factor * error.needed / chips.generation.hbm_bytes
                changes = [change for change in changes if change[0] >= least or change[1] != remat]
            continue
        return flags
    return None


def _least_bytes(config: StepConfig, num_devices: int, state: TrainState | None = None) -> int:
    """What a device holds at least: parameters, optimizer, gradients, activations kept; not what the compiler adds."""
    held = costs.memory(config, num_devices, state)
    return sum(held[name] for name in ("parameters", "optimizer", "gradients", "core", "activations_kept"))
