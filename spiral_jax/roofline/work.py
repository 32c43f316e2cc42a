"""What a compiled program does in one run on one device: matrix products, traffic with HBM, kernels, collectives."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from spiral_jax.roofline import fusions
from spiral_jax.roofline.groups import Groups, parse_groups
from spiral_jax.roofline.hlo import HBM, Array, Computation, Instruction, Module, UnreadableProgram, leaves
from spiral_jax.roofline.loops import Scope, trip_count
from spiral_jax.roofline.matmul import Matmul, matmul

FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"),
    *("opt-barrier", "add-dependency", "domain", "send-done", "recv-done"),
}  # fmt: skip
# Custom calls that only name memory.
FREE_TARGETS = {"AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "Sharding", "AsyncCollectiveDone"}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")


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
      groups: the devices that take part together, by their places in the program's mesh, or pairs of sender and
        receiver; `groups.cross` tells whether they lie in several slices.
      dtype: of the elements.
    """

    kind: str
    bytes: float
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
    return list(_walk(Scope(module.entry), 1, module.num_devices, _repetitions(module)))


def dense_flops(found: Iterable[Operation]) -> int:
    """Floating-point operations (two per multiply-add) of matrix products outside kernels."""
    return sum(2 * product.multiply_adds * operation.times for operation in found for product in operation.matmuls)


def hbm_bytes(found: Iterable[Operation]) -> float:
    """Bytes read and written in HBM."""
    return sum(operation.hbm_bytes * operation.times for operation in found)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind.

    Attributes:
      count: executions.
      bytes: their sum, as `Collective.bytes` has it.
    """

    count: int
    bytes: float


def collectives(found: Iterable[Operation]) -> dict[str, Traffic]:
    """Count and bytes of the collectives by kind."""
    totals: dict[str, Traffic] = {}
    for operation in found:
        if sent := operation.collective:
            before = totals.get(sent.kind, Traffic(0, 0.0))
            moved = sent.bytes * operation.times
            totals[sent.kind] = Traffic(before.count + operation.times, before.bytes + moved)
    return totals


def _walk(scope: Scope, times: int, num_devices: int, repeated: set[Instruction]) -> Iterator[Operation]:
    for instruction in scope.computation.instructions:
        opcode, runs = instruction.opcode, times
        called: list[Computation] = []
        if opcode == "while":
            called, runs = instruction.called("body"), times * trip_count(instruction, scope)
        elif opcode in ("call", "async-start", "call-start"):
            called = instruction.called("calls", "to_apply")
        elif opcode == "conditional":
            called = instruction.called("branch_computations", "true_computation", "false_computation")
        elif opcode == "custom-call" and _communicates(instruction):
            called = instruction.called("called_computations")
        elif not _is_free(instruction):
            yield _operation(instruction, times, num_devices, repeated)
        inside = [list(_walk(Scope(one, (instruction, scope)), runs, num_devices, repeated)) for one in called]
        # One of a conditional's branches; of the others there is but one.
        yield from max(inside, key=lambda found: (dense_flops(found), hbm_bytes(found)), default=())


def _unnamed(instruction: Instruction) -> str:
    """What a collective without a name is: one that puts shards into zeros and sums them gathers them.

    libtpu does so over a whole cube, and drops the names of those that it makes one of.
    """
    if _base(instruction) != "all-reduce":
        return ""
    sizes = {True: 0, False: 0}
    for operand in instruction.operands:
        sizes[_is_padded(operand)] += operand.size
    return "all_gather, as a sum" if sizes[True] > sizes[False] else ""


def _is_padded(value: Instruction) -> bool:
    """Whether a value is a shard in zeros of the whole's shape."""
    fusion: Instruction | None = None
    while value.opcode in (*fusions.VIEWS, "copy", "copy-start", "copy-done", "fusion"):
        fusion = value if value.opcode == "fusion" else fusion
        value = value.fused.results[0] if value.opcode == "fusion" else value.operands[0]
    if value.opcode != "dynamic-update-slice":
        return False
    whole = value.operands[0]
    if whole.opcode == "parameter" and fusion is not None:
        whole = fusion.operands[int(whole.literal)]
    return whole.opcode in ("broadcast", "constant")


def _communicates(instruction: Instruction) -> bool:
    """Whether a custom call hands a collective to the sparse cores, as tpu7x does with all of some size."""
    called = instruction.called("called_computations")
    return any(_base(inner) in COLLECTIVES for computation in called for inner in computation.instructions)


def _is_free(instruction: Instruction) -> bool:
    opcode = instruction.opcode
    if opcode == "custom-call":
        return instruction.target in FREE_TARGETS
    return opcode in FREE or opcode.endswith(("-done", "-update"))


def _operation(instruction: Instruction, times: int, num_devices: int, repeated: set[Instruction]) -> Operation:
    parts = named = [instruction]
    if instruction.opcode == "fusion":
        fused = instruction.fused
        parts, named = list(_inside(fused)), [instruction, fused.root, *fused.instructions]
    return Operation(
        name=instruction.name,
        source=next((x.source for x in named if x.source), "") or _unnamed(instruction),
        times=times,
        matmuls=tuple(matmul(part) for part in parts if part.opcode in ("dot", "convolution")),
        hbm_bytes=_traffic(instruction, repeated),
        kernel=_kernel(instruction),
        collective=_collective(instruction, parts, num_devices, repeated),
    )


def _inside(computation: Computation) -> Iterator[Instruction]:
    """Instructions of a fused computation and of the fusions in it."""
    for instruction in computation.instructions:
        if instruction.opcode == "fusion":
            yield from _inside(instruction.fused)
        else:
            yield instruction


def _base(instruction: Instruction) -> str:
    return instruction.opcode.removesuffix("-start")


def _chain(instruction: Instruction) -> tuple[str | None, str | None, str]:
    """What tells a collective's repetitions from other collectives.

    Not the channel alone: all collectives that shard_map wrote may share channel 1.
    """
    found = re.search(r'chain_id="?(\w+)', instruction.attributes.get("frontend_attributes", ""))
    return instruction.attributes.get("channel_id"), found[1] if found else None, instruction.opcode


def _repetitions(module: Module) -> set[Instruction]:
    """Collectives in fusions that another fusion stands for.

    The TPU compiler hides a collective behind other work by repeating it in the fusions that start it, keep it going
    and wait for it. Those that start one count; where none does, the fusions are collectives of their own.
    """
    starting: dict[tuple, list[Instruction]] = collections.defaultdict(list)
    others: dict[tuple, list[Instruction]] = collections.defaultdict(list)
    for computation in module.fused:
        starts = any(x.target == "AsyncCollectiveStart" for x in computation.instructions)
        for instruction in computation.instructions:
            if instruction.opcode in COLLECTIVES:
                (starting if starts else others)[_chain(instruction)].append(instruction)
    return {instruction for chain in starting for instruction in others[chain]}


def _collective(
    instruction: Instruction, parts: list[Instruction], num_devices: int, repeated: set[Instruction]
) -> Collective | None:
    if instruction.opcode == "send":
        # A transfer is counted where it is sent; its recv is the same bytes. Megascale sends by way of the host.
        if instruction.attributes.get("is_host_transfer") == "true" and "megascale" not in instruction.rest:
            return None
        arrays = instruction.operands[0].arrays
        return Collective("dcn", sum(array.bytes for array in arrays), (), arrays[0].dtype)
    part = next((part for part in parts if _base(part) in COLLECTIVES and part not in repeated), None)
    if part is None:
        return None
    kind = _base(part)
    arrays = _results(part) if kind == "all-gather" else [array for x in part.operands for array in x.arrays]
    if kind == "collective-permute":
        groups = parse_groups(part.attributes["source_target_pairs"], 0)
    else:
        groups = parse_groups(part.attributes.get("replica_groups", "{}"), num_devices)
    # Each device keeps only a slice, as in the fusions that the TPU compiler names all-reduce-scatter.
    if kind == "all-reduce" and {user.opcode for user in _users(part)} == {"dynamic-slice"}:
        kind = "reduce-scatter"
    return Collective(kind, sum(array.bytes for array in arrays), groups, arrays[0].dtype)


def _users(instruction: Instruction) -> Iterator[Instruction]:
    """What takes the instruction's elements, also by way of views of them."""
    for user in instruction.users:
        if user.opcode in fusions.VIEWS:
            yield from _users(user)
        else:
            yield user


def _results(instruction: Instruction) -> list[Array]:
    """The arrays that an operation makes; the tuples of a start also hold its operands and semaphores."""
    base = _base(instruction)
    if base == instruction.opcode or base == "all-reduce" or isinstance(instruction.shape, Array):
        return instruction.arrays
    return [array for _, array in leaves(instruction.shape[0 if base == "copy" else 1])]


def _traffic(instruction: Instruction, repeated: set[Instruction]) -> float:
    """Bytes of operands and results that lie in HBM."""
    opcode, operands, results = _base(instruction), instruction.operands, _results(instruction)
    made = sum(array.hbm_bytes for array in results)
    if opcode == "fusion":
        return _fusion_traffic(instruction, repeated)
    if opcode in ("slice", "dynamic-slice", "gather"):
        # As much as it returns, and a gather's indices.
        taken = results[0].bytes if operands[0].array.space == HBM else 0.0
        return made + taken + (operands[1].array.hbm_bytes if opcode == "gather" else 0.0)
    if opcode == "dynamic-update-slice":
        update = operands[1].array
        return update.hbm_bytes + (update.bytes if results[0].space == HBM else 0.0)
    if opcode == "recv":
        return results[0].hbm_bytes
    if opcode == "send":
        return sum(array.hbm_bytes for array in operands[0].arrays)
    return made + sum(array.hbm_bytes for operand in set(operands) for array in operand.arrays)


def _fusion_traffic(fusion: Instruction, repeated: set[Instruction]) -> float:
    fused = fusion.fused
    # Parameters that only repeat a collective which another fusion stands for: they count there.
    carried = {y for x in fused.instructions if x in repeated for y in x.operands if y.opcode == "parameter"}
    total = 0.0
    for operand, parameter, elements in zip(fusion.operands, fused.parameters, fusions.read(fused), strict=True):
        if parameter not in carried:
            total += sum(_part(array, elements) for array in operand.arrays)
    if fused.root.target == "AsyncCollectiveStart":
        # Its result repeats the operand; the collective's own result is what is written.
        return total + sum(a.hbm_bytes for x in fused.instructions if x.opcode in COLLECTIVES for a in x.arrays)
    for result, elements in zip(fused.results, fusions.written(fused), strict=True):
        if result.opcode not in COLLECTIVES or not carried:
            total += sum(_part(array, elements) for array in result.arrays)
    return total


def _part(array: Array, elements: float) -> float:
    """Bytes in HBM of so many elements of an array, or of all."""
    return min(elements, array.size) * array.hbm_bytes / max(1, array.size)


def _kernel(instruction: Instruction) -> Kernel | None:
    if instruction.target != "tpu_custom_call":
        return None
    kind = re.search(r"splash_m[hq]a_(fwd|dq|dkv)", f"{instruction.name} {instruction.source}")
    arrays = [operand.array for operand in instruction.operands]
    # The block tables of the mask come first, then queries.
    query = next((x for x in arrays if x.dtype in ("bf16", "f32") and len(x.dims) >= 3), None)
    if not kind or query is None:
        raise UnreadableProgram(f"kernel {instruction.name} ({instruction.source}) is not splash attention")
    *rows, length, width = query.dims
    return Kernel(kind[1], math.prod(rows), length, width, query.dtype)
