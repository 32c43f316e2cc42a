"""What fills the memory of a device when a compiled program needs most of it."""

import collections
import dataclasses
import functools
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from spiral_jax.roofline import fusions
from spiral_jax.roofline.hlo import HBM, Array, Computation, Instruction, Module, integers, leaves

# Names in the traced function's path that tell the parts of the model.
PARTS = ("prelude", "core", "coda", "embed", "head")
# Attributes that name computations which run in place of the instruction.
CALLS = ("calls", "to_apply", "branch_computations", "true_computation", "false_computation", "called_computations")
Path = tuple[int, ...]
# What an instruction's arrays lie in: places in their tuple to numbers of buffers.
Value = dict[Path, frozenset[int]]


class Buffer(NamedTuple):
    """An array in HBM.

    Attributes:
      bytes: with the padding to tiles.
      dims: extents.
      dtype: of the elements.
      source: `op_name` of the operation that makes it.
      argument: which of the program's arguments it is; None for what the program makes.
    """

    bytes: float
    dims: tuple[int, ...]
    dtype: str
    source: str
    argument: int | None = None


class Peak(NamedTuple):
    """The moment with the most in HBM.

    Attributes:
      bytes: all buffers together.
      buffers: what is there, the largest first.
    """

    bytes: float
    buffers: tuple[Buffer, ...]


def peak(module: Module) -> Peak:
    """Follows the schedule and notes what is alive.

    A reading of the text, not the compiler's own book-keeping: gaps between buffers and scratch memory are not seen.
    """
    found = _Simulation(module.donated).run(module.entry, "entry")
    return Peak(found.bytes, tuple(sorted(found.buffers, key=lambda buffer: -buffer.bytes)))


def categories(buffers: Iterable[Buffer], argument_name: Callable[[int], str]) -> dict[str, float]:
    """Bytes by what a person calls it, the most first.

    Args:
      buffers: of a `Peak`.
      argument_name: of an argument's index: parameters, optimizer state, batch. Others are called `core backward` ...
    """
    totals: dict[str, float] = collections.defaultdict(float)
    for buffer in buffers:
        named = category(buffer.source) if buffer.argument is None else argument_name(buffer.argument)
        totals[named] += buffer.bytes
    return dict(sorted(totals.items(), key=lambda item: -item[1]))


def category(source: str) -> str:
    """`core backward`, `head forward`, `other` from the path of names in the traced function."""
    names = set(re.findall(r"\w+", source))
    part = next((part for part in PARTS if part in names), "other")
    if "rematted_computation" in names:
        return f"{part} recomputed"
    if "transpose(" in source:
        return f"{part} backward"
    return f"{part} forward" if "jvp(" in source else part


@dataclasses.dataclass(frozen=True)
class _Run:
    """A computation's own peak, beside what its caller holds.

    Attributes:
      bytes: added to the caller's.
      buffers: that it made itself and that are alive then.
      idle: parameters (number, then place in its tuple) whose memory holds nothing then.
    """

    bytes: float
    buffers: tuple[Buffer, ...]
    idle: frozenset[Path]


class _Simulation:
    """Peaks of computations; a body that several loops share is looked at once."""

    def __init__(self, donated: dict[Path, int]):
        self.donated = donated
        self.run = functools.cache(self._run)

    def _run(self, computation: Computation, role: str) -> _Run:
        """Role: entry, loop (results return into the parameters), or call (into buffers of the caller)."""
        frame = _Frame(computation)
        bytes_of = [buffer.bytes for buffer in frame.buffers]
        returned = frame.buffers_of(computation.root)
        homes = self._homes(frame, role)
        begins, ends = frame.lifetimes()
        owned = {b for b, parameter in enumerate(frame.parameter) if parameter is None}
        if role == "call":
            # The caller has counted what is returned.
            owned -= returned
        now = set(range(len(frame.buffers))) - owned
        borrowed = frozenset(() if role == "entry" else now)
        if role == "entry":
            # Memory of the program's results is set aside from the start.
            now |= returned - homes.keys()
        best, best_alive, best_run = -1.0, now, None
        for index, instruction in enumerate(computation.instructions):
            now |= {homes.get(buffer, buffer) for buffer in begins[index]}
            inner = self._inner(instruction)
            idle = frame.buffers_at(instruction, inner.idle) if inner else set()
            alive = now - idle
            total = sum(bytes_of[b] for b in alive - borrowed) - sum(bytes_of[b] for b in borrowed - alive)
            total += inner.bytes + sum(bytes_of[b] for b in idle) if inner else 0.0
            if total > best:
                best, best_alive, best_run = total, alive, inner
            gone = {homes.get(buffer, buffer) for buffer in ends[index] - returned}
            now -= gone if role == "loop" else gone & owned
        buffers = [frame.buffers[b] for b in best_alive - borrowed] + list(best_run.buffers if best_run else ())
        places = (frame.parameter[b] for b in borrowed - best_alive)
        return _Run(best, tuple(buffers), frozenset(place for place in places if place is not None))

    def _inner(self, instruction: Instruction) -> _Run | None:
        """The largest of the computations that the instruction runs."""
        runs: list[_Run] = []
        if instruction.opcode == "while":
            runs = [self.run(inner, "loop") for inner in instruction.called("body", "condition")]
        elif instruction.opcode in ("call", "conditional", "async-start", "call-start"):
            runs = [self.run(inner, "call") for inner in instruction.called(*CALLS)]
        return max(runs, key=lambda run: run.bytes, default=None)

    def _homes(self, frame: "_Frame", role: str) -> dict[int, int]:
        """Buffers that are a parameter's memory: what a loop returns goes to where its next iteration reads it."""
        by_parameter = {place: buffer for buffer, place in enumerate(frame.parameter) if place is not None}
        homes = {}
        for path, buffers in frame.values[frame.computation.root].items():
            place = {"loop": (0, *path), "entry": (self.donated.get(path, -1),)}.get(role, ())
            home = by_parameter.get(place)
            if home is not None and len(buffers) == 1:
                (buffer,) = buffers
                if frame.parameter[buffer] is None:
                    homes[buffer] = home
        return homes


class _Frame:
    """Which buffers the values of a computation lie in.

    Attributes:
      computation: whose.
      buffers: by number.
      parameter: by number: of which parameter (and place in its tuple) it is the memory, or None.
      values: by instruction.
    """

    def __init__(self, computation: Computation):
        self.computation = computation
        self.buffers: list[Buffer] = []
        self.parameter: list[Path | None] = []
        self.values: dict[Instruction, Value] = {}
        for instruction in computation.instructions:
            self.values[instruction] = self._value(instruction)

    def buffers_of(self, instruction: Instruction) -> set[int]:
        return {buffer for buffers in self.values[instruction].values() for buffer in buffers}

    def buffers_at(self, instruction: Instruction, idle: frozenset[Path]) -> set[int]:
        """The buffers behind parameters (number, then place) of what an instruction calls."""
        values = [self.values[operand] for operand in instruction.operands]
        return {b for number, *path in idle for b in values[number].get(tuple(path), frozenset())}

    def lifetimes(self) -> tuple[dict[int, set[int]], dict[int, set[int]]]:
        """By place in the schedule: buffers that begin to live with an instruction, and those used last by it."""
        begin: dict[int, int] = {}
        end: dict[int, int] = {}
        for index, instruction in enumerate(self.computation.instructions):
            for buffer in self.buffers_of(instruction):
                begin.setdefault(buffer, index)
                end.setdefault(buffer, index)
            if instruction.opcode not in ("tuple", "get-tuple-element", "bitcast"):
                for operand in instruction.operands:
                    end.update(dict.fromkeys(self.buffers_of(operand), index))
        return _inverted(begin), _inverted(end)

    def _new(self, array: Array, source: str, parameter: Path | None = None) -> frozenset[int]:
        if array.space != HBM or not array.stored_bytes:
            return frozenset()
        argument = parameter[0] if parameter else None
        self.buffers.append(Buffer(array.stored_bytes, array.dims, array.dtype, source, argument))
        self.parameter.append(parameter)
        return frozenset({len(self.buffers) - 1})

    def _value(self, instruction: Instruction) -> Value:
        opcode, source = instruction.opcode, instruction.source
        operands = [self.values[operand] for operand in instruction.operands]
        if opcode == "constant":
            return {path: frozenset() for path, _ in leaves(instruction.shape)}
        if opcode == "parameter":
            number = int(instruction.literal)
            return {path: self._new(array, source, (number, *path)) for path, array in leaves(instruction.shape)}
        if opcode == "tuple":
            return {(index, *path): x for index, value in enumerate(operands) for path, x in value.items()}
        if opcode == "get-tuple-element":
            return _element(operands[0], (int(instruction.attributes["index"]),))
        if opcode in ("bitcast", "while", "opt-barrier", "add-dependency", "dynamic-update-slice"):
            return operands[0]
        if instruction.target == "ConcatBitcast":
            return {(): frozenset().union(*(x for value in operands for x in value.values()))}
        if opcode.endswith("-done"):
            # A part of the tuple that the start made, or all of it.
            made = _element(operands[0], {"copy-done": (0,), "all-reduce-done": ()}.get(opcode, (1,)))
            return {path: made.get(path, frozenset()) for path, _ in leaves(instruction.shape)}
        same = self._aliases(instruction, operands)
        return {
            path: same[path] if path in same else self._new(array, source) for path, array in leaves(instruction.shape)
        }

    def _aliases(self, instruction: Instruction, operands: list[Value]) -> Value:
        """Results that lie where an operand lies."""
        same: Value = {}
        if instruction.opcode == "copy-start":
            same[(1,)] = operands[0].get((), frozenset())
        elif instruction.opcode.endswith("-start") and instruction.opcode != "all-reduce-start":
            for index, value in enumerate(operands):
                for path, x in value.items():
                    same[(0, *path)] = same[(0, index, *path)] = x
        elif instruction.opcode == "fusion":
            several = instruction.fused.root.opcode == "tuple"
            for index, number in enumerate(fusions.overwritten(instruction.fused)):
                if number is not None and () in operands[number]:
                    same[(index,) if several else ()] = operands[number][()]
        aliasing = instruction.attributes.get("output_to_operand_aliasing", "")
        for out, number, place in re.findall(r"\{([\d, ]*)\}: \((\d+), \{([\d, ]*)\}", aliasing):
            same[integers(out)] = operands[int(number)].get(integers(place), frozenset())
        return same


def _element(value: Value, place: Path) -> Value:
    """What lies at a place of a tuple."""
    return {path[len(place) :]: x for path, x in value.items() if path[: len(place)] == place}


def _inverted(indices: dict[int, int]) -> dict[int, set[int]]:
    found: dict[int, set[int]] = collections.defaultdict(set)
    for buffer, index in indices.items():
        found[index].add(buffer)
    return found
