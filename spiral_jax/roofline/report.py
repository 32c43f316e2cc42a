"""The train step of a configuration compiled for a slice, and what the compiled program says of itself."""

import collections
import dataclasses
import re
import time
from collections.abc import Sequence
from typing import Any

import jax

from spiral_jax.hardware import GIB, Slice, parse_slice
from spiral_jax.parallel.mesh import make_mesh
from spiral_jax.progress import Report
from spiral_jax.roofline import hlo, memory, points, work
from spiral_jax.roofline.compiling import compile_described
from spiral_jax.roofline.groups import cross
from spiral_jax.roofline.predict import compact, constants_of, cost, places_of, read, total, written
from spiral_jax.roofline.slices import describe_devices
from spiral_jax.roofline.unwanted import unwanted
from spiral_jax.training import costs
from spiral_jax.training.config import StepConfig
from spiral_jax.training.step import Program, make_program

LARGEST = 12  # buffers of the peak that a report names


class DoesNotFit(Exception):
    """The program needs more memory than a device has; the message says how much.

    Attributes:
      needed: bytes of HBM; None where the compiler does not say, or another memory is too small.
    """

    def __init__(self, needed: float | None, usable: float, why: str = ""):
        of = f"of {usable / GIB:.2f} GiB"
        if needed is None:
            super().__init__(f"needs more than it has {of}: {why}")
        else:
            super().__init__(f"needs {needed / GIB:.2f} GiB {of}, {(needed - usable) / GIB:.2f} GiB too much")
        self.needed = needed


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A train step compiled for devices that need not be there.

    Attributes:
      program: what was compiled.
      memory: what the compiler says that it needs.
      text: of the compiled program.
      seconds: that compiling took.
    """

    program: Program
    memory: Any
    text: str
    seconds: float


def compile_step(config: StepConfig, chips: Slice, num_slices: int, say: Report) -> CompiledStep:
    """Compiles the step that `train` would run.

    Args:
      config: the run.
      chips: the slice.
      num_slices: how many of it; `mesh.data` lies across them.
      say: told when everything is checked and compiling begins.

    Raises:
      SpiralError: a mesh that does not fit the slice, the batch or the model; no libtpu.
      DoesNotFit: by the compiler's account.
    """
    config.check_mesh(chips.devices * num_slices)
    program = make_program(config, make_mesh(config.mesh, describe_devices(chips, num_slices)))
    usable = chips.generation.hbm_bytes
    say(f"compiling for {num_slices} x {chips}; this takes minutes")
    started = time.perf_counter()
    lowered = program.lowered()
    try:
        compiled, text = compile_described(lowered)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFit(_needed(str(error)), usable, " ".join(str(error).split())[:200]) from None
    needed: Any = compiled.memory_analysis()
    if needed.peak_memory_in_bytes > usable:
        raise DoesNotFit(needed.peak_memory_in_bytes, usable)
    return CompiledStep(program, needed, text, time.perf_counter() - started)


def report(config: StepConfig, chips: Slice, num_slices: int, step: CompiledStep) -> dict[str, Any]:
    """What a compiled step needs and does, as JSON values: memory, FLOPs, collectives, predicted time."""
    module = hlo.parse(step.text)
    operations = work.operations(module)
    devices = step.program.placed.mesh.devices.flatten()
    places = places_of(devices)
    counted = written(compact(cost(operation, chips, places) for operation in operations))
    model, train = config.model, config.train
    form, num_devices = costs.flops(config), len(devices)
    dense, state = work.dense_flops(operations) * num_devices, step.program.abstract_state
    layout = costs.layout(config, num_devices)
    traffic = work.collectives(operations)
    # What differs along `data` or `fsdp`; `tensor` is the mesh's last axis.
    rows = [place // step.program.placed.mesh.shape["tensor"] for place in range(num_devices)]
    found = {
        "slice": {
            "topology": str(chips),
            "accelerator_type": chips.accelerator_type,
            "chips": chips.chips,
            "slices": num_slices,
            "devices": num_devices,
        },
        "model": points.Model.of(model)._asdict(),
        "step": {
            "mesh": layout["mesh"],
            "batch_size": train.batch_size,
            "sequence_length": train.sequence_length,
            "accumulation": train.accumulation,
            "sequences_per_device": layout["sequences_per_device"],
            "remat": model.remat,
            "gather_core": train.gather_core,
        },
        "compile_seconds": round(step.seconds, 1),
        "memory": _memory(module, step, chips) | {"closed_form": costs.memory(config, num_devices, state)},
        "scores_and_logits_in_memory": unwanted(module, config, num_devices),
        "flops": {
            "dense_model": form.dense,
            "dense_executed": dense,
            "dense_executed_over_model": dense / form.dense,
            "dense_executed_closed_form": form.dense_executed,
            "attention_kernels": _kernels(operations),
            "attention_model": form.attention,
            "attention_model_causal": form.attention_causal,
        },
        "communication_per_device": {
            "collectives": {kind: dataclasses.asdict(one) for kind, one in sorted(traffic.items())},
            "gathered_bytes": _sent(operations, rows, "gathered"),
            "summed_bytes": _sent(operations, rows, "summed"),
            "closed_form": costs.communication(config, num_devices, state)._asdict(),
        },
        "bytes_between_slices": _sent(operations, [place.slice_index for place in places]),
    }
    return found | {"prediction": prediction(found, counted) | {"hbm_bytes_per_device": work.hbm_bytes(operations)}}


def prediction(found: dict[str, Any], counted: Sequence[str]) -> dict[str, Any]:
    """What a roofline says of a compiled step, by the constants of its generation.

    Args:
      found: the other parts of its report.
      counted: what its operations cost, as it is kept there (`predict.written`).
    """
    chips = parse_slice(found["slice"]["topology"])
    constants, flops, step = constants_of(chips), found["flops"], found["step"]
    guess, num_chips = total(read(counted), constants), chips.chips * found["slice"]["slices"]
    peak_flops = chips.peak_flops * found["slice"]["devices"]
    return {
        "is": "a prediction by a roofline; no step of this program has run on a TPU",
        "step_seconds": guess.step_seconds,
        "tokens_per_second_per_chip": step["batch_size"] * step["sequence_length"] / guess.step_seconds / num_chips,
        "mfu": (flops["dense_model"] + flops["attention_model_causal"]) / guess.step_seconds / peak_flops,
        "mfu_full_attention": (flops["dense_model"] + flops["attention_model"]) / guess.step_seconds / peak_flops,
        "bound": guess.bound,
        "seconds_by_limit": guess.limits,
        "seconds_alone": {{"compute": "matrix_products"}.get(what, what): s for what, s in guess.alone.items()},
        "constants": dataclasses.asdict(constants),
        "costs": list(counted),
    }


def _memory(module: hlo.Module, step: CompiledStep, chips: Slice) -> dict[str, Any]:
    """The peak by the compiler's account, and what holds it by ours."""
    analysis, simulated = step.memory, memory.peak(module)
    arguments = (step.program.abstract_state, step.program.abstract_batch)
    names = [_argument_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(arguments)]
    usable = chips.generation.hbm_bytes
    return {
        "peak_bytes": analysis.peak_memory_in_bytes,
        "usable_bytes": usable,
        "share": analysis.peak_memory_in_bytes / usable,
        "arguments_bytes": analysis.argument_size_in_bytes,
        "program_bytes": analysis.generated_code_size_in_bytes,
        "held_at_the_peak": memory.categories(simulated.buffers, names.__getitem__),
        "simulated_peak_bytes": simulated.bytes,
        "largest": [
            {
                "bytes": buffer.bytes,
                "array": str(hlo.Array(buffer.dtype, buffer.dims)),
                "of": buffer.source if buffer.argument is None else names[buffer.argument],
            }
            for buffer in simulated.buffers[:LARGEST]
        ],
    }


def _kernels(operations: list[work.Operation]) -> dict[str, int]:
    """Attention kernels that a device runs in a step, by kind."""
    found: dict[str, int] = collections.Counter()
    for operation in operations:
        if operation.kernel:
            found[operation.kernel.kind] += operation.times
    return dict(found)


def _argument_name(path) -> str:
    name = getattr(path[1], "name", "") if len(path) > 1 else "batch"
    return {"params": "parameters", "opt_state": "optimizer state"}.get(name, name)


def _sent(operations: list[work.Operation], part_of: list[int], purpose: str = "") -> float:
    """Bytes that a step sends from one part of the mesh to another; the network is between slices.

    Args:
      operations: of the step.
      part_of: the part that each place of the mesh is in.
      purpose: only what the function asked to be `gathered` or `summed`; the compiler may gather by summing shards and
        zeros.
    """
    sent = [(operation, operation.collective) for operation in operations if operation.collective]
    return sum(
        collective.bytes * operation.times
        for operation, collective in sent
        if (collective.kind == "dcn" or cross(collective.groups, part_of))
        and purpose in ("", _purpose(collective.kind, operation.source))
    )


def _purpose(kind: str, source: str) -> str:
    if kind == "all-gather" or "all_gather" in source:
        return "gathered"
    return "summed" if kind in ("all-reduce", "reduce-scatter") else kind


def _needed(message: str) -> float | None:
    """Bytes of HBM that a program would have needed, of the compiler's message; None where it does not say."""
    size = r"([\d.]+)([KMGT]?)"
    used = re.search(rf"Used {size} of \S+ hbm|\({size}\) exceeds available HBM", message)
    if not used:
        return None
    number, unit = filter(None, used.groups(""))
    return float(number) * 1024 ** " KMGT".index(unit)
