"""What a compiled program does in one run on one device: matrix products, traffic with HBM, kernels, collectives."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from spiral_jax.roofline import fusions
from spiral_jax.roofline.groups import Groups, parse_groups
from spiral_jax.roofline.hlo import HBM, Array, Computation, Instruction, Module, Shape, UnreadableProgram, leaves
from spiral_jax.roofline.loops import Scope, trip_count
from spiral_jax.roofline.matmul import Matmul, matmul

FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"),
    *("opt-barrier", "add-dependency", "domain", "send-done", "recv-done"),
}  # fmt: skip
# Custom calls that only name memory.
FREE_TARGETS = {"AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "Sharding", "AsyncCollectiveDone"}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
START, DONE, UPDATE = "-start", "-done", "-update"
# Chains of collectives (`_chain`) to the fused computations that stand for them.
Starts = dict[tuple, frozenset[str]]


class Kernel(NamedTuple):
    """A Pallas kernel of splash attention.

    Attributes:
      kind: fwd, dq or dkv.
      rows: batch times heads on this device.
      length: of queries and keys.
      head_width: as the kernel computes it.
      dtype: of the queries.
    """

    kind: str
    rows: int
    length: int
    head_width: int
    dtype: str


class Collective(NamedTuple):
    """Communication between devices.

    Attributes:
      kind: all-gather, all-reduce, reduce-scatter, all-to-all, collective-permute, or dcn (between slices).
      bytes: of the whole (gathered, unreduced) array on one device.
      group_size: devices that take part together.
      groups: their places in the program's mesh; `groups.cross` tells whether they lie in several slices.
      dtype: of the elements.
    """

    kind: str
    bytes: float
    group_size: int
    groups: Groups
    dtype: str


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation of the device; a fusion is one.

    Attributes:
      name: of the instruction.
      source: `op_name`, the path of names in the traced function.
      times: executions per step on one device.
      matmuls: products in one execution.
      hbm_bytes: read and written in HBM by one execution, without the padding to tiles.
      kernel: the attention kernel that this is.
      collective: the communication that this is or (asynchronous, in a fusion) starts.
    """

    name: str
    source: str
    times: int
    matmuls: tuple[Matmul, ...] = ()
    hbm_bytes: float = 0.0
    kernel: Kernel | None = None
    collective: Collective | None = None


def operations(module: Module) -> list[Operation]:
    """Everything that a run of the program does, loops and calls unrolled into `times`.

    Of a conditional's branches the one with the most multiply-adds (then bytes) counts.

    Raises:
      UnreadableProgram: a loop without a readable count (`UnknownTripCount`), a kernel that is not splash attention.
    """
    return list(_walk(module, Scope(module.entry), 1, _starts(module)))


def dense_flops(found: Iterable[Operation]) -> int:
    """Floating-point operations (two per multiply-add) of matrix products outside kernels."""
    return sum(2 * product.multiply_adds * operation.times for operation in found for product in operation.matmuls)


def hbm_bytes(found: Iterable[Operation]) -> float:
    """Bytes read and written in HBM."""
    return sum(operation.hbm_bytes * operation.times for operation in found)


class Traffic(NamedTuple):
    """Collectives of one kind.

    Attributes:
      count: executions.
      bytes: their sum, as `Collective.bytes` has it.
    """

    count: int
    bytes: float


def collectives(found: Iterable[Operation]) -> dict[str, Traffic]:
    """Count and bytes of the collectives by kind."""
    totals = collections.defaultdict(lambda: Traffic(0, 0.0))
    for operation in found:
        if operation.collective:
            count, size = totals[operation.collective.kind]
            moved = operation.collective.bytes * operation.times
            totals[operation.collective.kind] = Traffic(count + operation.times, size + moved)
    return dict(totals)


def _walk(module: Module, scope: Scope, times: int, starts: Starts) -> Iterator[Operation]:
    computation = scope.computation
    for instruction in computation.instructions:
        opcode = instruction.opcode

        def inside(name, times=times, instruction=instruction):
            return _walk(module, Scope(module.computations[name], scope, instruction), times, starts)

        if opcode == "while":
            yield from inside(instruction.called["body"][0], times * trip_count(module, instruction, scope))
        elif opcode in ("call", "async-start", "call-start"):
            yield from inside(*(instruction.called.get("calls") or instruction.called["to_apply"]))
        elif opcode == "conditional":
            called = instruction.called
            names = called.get("branch_computations") or called["true_computation"] + called["false_computation"]
            branches = [list(inside(name)) for name in names]
            yield from max(branches, key=lambda found: (dense_flops(found), hbm_bytes(found)))
        elif opcode == "custom-call" and _communicates(module, instruction):
            yield from inside(*instruction.called["called_computations"])
        elif not _is_free(instruction):
            yield _operation(module, computation, instruction, times, starts)


def _communicates(module: Module, instruction: Instruction) -> bool:
    """Whether a custom call hands a collective to the sparse cores, as tpu7x does with all of some size."""
    names = instruction.called.get("called_computations", ())
    return any(_base(inner) in COLLECTIVES for name in names for inner in module.computations[name].instructions)


def _is_free(instruction: Instruction) -> bool:
    opcode = instruction.opcode
    if opcode == "custom-call":
        return instruction.target in FREE_TARGETS
    return opcode in FREE or opcode.endswith((DONE, UPDATE))


def _operation(
    module: Module, computation: Computation, instruction: Instruction, times: int, starts: Starts
) -> Operation:
    source = instruction.source
    if instruction.opcode == "fusion":
        fused = module.computations[instruction.called["calls"][0]]
        source = source or fused.root.source or next((x.source for x in fused.instructions if x.source), "")
        parts = list(_inside(module, fused))
    else:
        parts = [(computation, instruction)]
    return Operation(
        name=instruction.name,
        source=source,
        times=times,
        matmuls=tuple(matmul(where, part) for where, part in parts if part.opcode in ("dot", "convolution")),
        hbm_bytes=_traffic(module, computation, instruction, starts),
        kernel=_kernel(computation, instruction),
        collective=_collective(module, computation, instruction, parts, starts),
    )


def _inside(module: Module, computation: Computation) -> Iterator[tuple[Computation, Instruction]]:
    """Instructions of a fused computation and of the fusions in it, each with where it stands."""
    for instruction in computation.instructions:
        if instruction.opcode == "fusion":
            yield from _inside(module, module.computations[instruction.called["calls"][0]])
        else:
            yield computation, instruction


def _base(instruction: Instruction) -> str:
    return instruction.opcode.removesuffix(START)


def _chain(instruction: Instruction) -> tuple[str | None, str | None, str]:
    """What tells a collective's repetitions from other collectives.

    Not the channel alone: all collectives that shard_map wrote may share channel 1.
    """
    found = re.search(r'chain_id="?(\w+)', instruction.attributes.get("frontend_attributes", ""))
    return instruction.attributes.get("channel_id"), found and found[1], instruction.opcode


def _starts(module: Module) -> Starts:
    """The fused computations that stand for each chain's collective.

    The TPU compiler hides a collective behind other work by repeating it in the fusions that start it, keep it going
    and wait for it. Those that start one count; where none does, the fusions are collectives of their own.
    """
    fused = {x.called["calls"][0] for c in module.computations.values() for x in c.instructions if x.opcode == "fusion"}
    found: dict[tuple, list[str]] = collections.defaultdict(list)
    for name, computation in module.computations.items():
        if name in fused:
            for instruction in computation.instructions:
                if instruction.opcode in COLLECTIVES:
                    found[_chain(instruction)].append(name)

    def starts(name: str) -> bool:
        return any(x.target == "AsyncCollectiveStart" for x in module.computations[name].instructions)

    return {chain: frozenset(filter(starts, names)) or frozenset(names) for chain, names in found.items()}


def _counts(where: Computation, instruction: Instruction, starts: Starts) -> bool:
    """Whether a collective in a fused computation is not the repetition of another."""
    return where.name in starts.get(_chain(instruction), {where.name})


def _collective(
    module: Module,
    computation: Computation,
    instruction: Instruction,
    parts: list[tuple[Computation, Instruction]],
    starts: Starts,
) -> Collective | None:
    if instruction.opcode == "send":
        # A transfer is counted where it is sent; its recv is the same bytes. Megascale sends by way of the host.
        if instruction.attributes.get("is_host_transfer") == "true" and "megascale" not in instruction.rest:
            return None
        arrays = computation.operand(instruction, 0).arrays
        return Collective("dcn", sum(array.bytes for array in arrays), 2, (), arrays[0].dtype)
    for where, part in parts:
        if _base(part) in COLLECTIVES and (where is computation or _counts(where, part, starts)):
            return _described(module, where, part)
    return None


def _described(module: Module, computation: Computation, instruction: Instruction) -> Collective:
    kind = _base(instruction)
    operands = [a for name in instruction.operands for a in computation.by_name[name].arrays]
    arrays = [a for _, a in leaves(_result(instruction))] if kind == "all-gather" else operands
    if kind == "all-reduce" and _is_scattered(computation, instruction):
        kind = "reduce-scatter"
    if kind == "collective-permute":
        pairs = parse_groups(instruction.attributes["source_target_pairs"], 0)
        return Collective(kind, sum(a.bytes for a in arrays), 2, pairs, arrays[0].dtype)
    groups = parse_groups(instruction.attributes.get("replica_groups", "{}"), module.num_devices)
    return Collective(kind, sum(a.bytes for a in arrays), len(groups[0]), groups, arrays[0].dtype)


def _is_scattered(computation: Computation, reduced: Instruction) -> bool:
    """Whether each device keeps only a slice, as in the fusions that the TPU compiler names all-reduce-scatter."""
    names, uses = {reduced.name}, []
    for instruction in computation.instructions:
        if names & set(instruction.operands):
            if instruction.opcode in fusions.VIEWS:
                names.add(instruction.name)
            else:
                uses.append(instruction.opcode)
    return bool(uses) and set(uses) == {"dynamic-slice"}


def _result(instruction: Instruction) -> Shape:
    """The shape of what the operation makes; the tuples of a start also hold its operands and semaphores."""
    shape, base = instruction.shape, _base(instruction)
    if not instruction.opcode.endswith(START) or isinstance(shape, Array) or base == "all-reduce":
        return shape
    return shape[0] if base == "copy" else shape[1]


def _traffic(module: Module, computation: Computation, instruction: Instruction, starts: Starts) -> float:
    """Bytes of operands and results that lie in HBM."""
    opcode, operands = _base(instruction), [computation.by_name[name] for name in instruction.operands]
    outputs = [array for _, array in leaves(_result(instruction))]
    made = sum(_hbm(array) for array in outputs)
    if opcode == "fusion":
        return _fusion_traffic(module, instruction, operands, starts)
    if opcode in ("slice", "dynamic-slice"):
        return made + outputs[0].bytes * (operands[0].shape.space == HBM)
    if opcode == "gather":
        return made + outputs[0].bytes * (operands[0].shape.space == HBM) + _hbm(operands[1].shape)
    if opcode == "dynamic-update-slice":
        return _hbm(operands[1].shape) + operands[1].shape.bytes * (outputs[0].space == HBM)
    if opcode == "recv":
        return _hbm(outputs[0])
    if opcode == "send":
        return sum(_hbm(array) for array in operands[0].arrays)
    return made + sum(_hbm(array) for operand in set(operands) for array in operand.arrays)


def _hbm(array: Array) -> float:
    return array.bytes if array.space == HBM else 0.0


def _fusion_traffic(module: Module, fusion: Instruction, operands: list[Instruction], starts: Starts) -> float:
    fused = module.computations[fusion.called["calls"][0]]
    carried = _waiting(fused, starts)
    total = 0.0
    for place, (operand, elements) in enumerate(zip(operands, fusions.read(module, fused), strict=True)):
        if place not in carried:
            sizes = [array for array in operand.arrays if array.space == HBM]
            total += sum(min(elements, array.size) * array.bytes / max(1, array.size) for array in sizes)
    if fused.root.target == "AsyncCollectiveStart":
        # Its result repeats the operand; the collective's own result is what is written.
        return total + sum(_hbm(a) for x in fused.instructions if x.opcode in COLLECTIVES for a in x.arrays)
    for result, elements in zip(fusions.results(fused), fusions.written(module, fused), strict=True):
        if result.opcode not in COLLECTIVES or not carried:
            for array in result.arrays:
                total += min(elements, array.size) * _hbm(array) / max(1, array.size)
    return total


def _waiting(fused: Computation, starts: Starts) -> set[int]:
    """Parameters of a fusion that only repeat a collective which another fusion stands for: they count there."""
    repeated = [x for x in fused.instructions if x.opcode in COLLECTIVES and not _counts(fused, x, starts)]
    found = {fused.by_name[name].operands[0] for instruction in repeated for name in instruction.operands}
    return {int(number) for number in found if number.isdigit()}


def _kernel(computation: Computation, instruction: Instruction) -> Kernel | None:
    if instruction.target != "tpu_custom_call":
        return None
    kind = re.search(r"splash_m[hq]a_(fwd|dq|dkv)", f"{instruction.name} {instruction.source}")
    arrays = [computation.by_name[name].shape for name in instruction.operands]
    # The block tables of the mask come first, then queries.
    query = next((x for x in arrays if x.dtype in ("bf16", "f32") and len(x.dims) >= 3), None)
    if not kind or query is None:
        raise UnreadableProgram(f"kernel {instruction.name} ({instruction.source}) is not splash attention")
    *rows, length, width = query.dims
    return Kernel(kind[1], math.prod(rows), length, width, query.dtype)
