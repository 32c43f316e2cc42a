"""What fills the memory of a device when a compiled program needs most of it."""

import collections
import dataclasses
import functools
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from spiral_jax.roofline import fusions
from spiral_jax.roofline.hlo import HBM, Array, Computation, Instruction, Module, leaves

PARTS = ("prelude", "core", "coda", "embed", "head")
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
    found = _Simulation(module).run(module.entry.name, "entry")
    return Peak(found.bytes, tuple(sorted(found.buffers, key=lambda buffer: -buffer.bytes)))


def categories(
    buffers: Iterable[Buffer], argument_name: Callable[[int], str], parts: tuple[str, ...] = PARTS
) -> dict[str, float]:
    """Bytes by what a person calls it, the most first: arguments by the caller's names, others such as `core backward`.

    Args:
      buffers: of a `Peak`.
      argument_name: of an argument's index: parameters, optimizer state, batch.
      parts: names in the traced function's path that tell the parts of the model.
    """
    totals = collections.Counter()
    for buffer in buffers:
        named = category(buffer.source, parts) if buffer.argument is None else argument_name(buffer.argument)
        totals[named] += buffer.bytes
    return dict(totals.most_common())


def category(source: str, parts: tuple[str, ...] = PARTS) -> str:
    """`core backward`, `head forward`, `other` from the path of names in the traced function."""
    names = set(re.findall(r"\w+", source))
    part = next((part for part in parts if part in names), "other")
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

    def __init__(self, module: Module):
        self.module = module
        self.run = functools.cache(self._run)

    def _run(self, name: str, role: str) -> _Run:
        """Role: entry, loop (results return into the parameters), or call (into buffers of the caller)."""
        computation = self.module.computations[name]
        frame = _Frame(self.module, computation)
        returned = {buffer for places in frame.values[computation.root.name].values() for buffer in places}
        homes = _homes(self.module, computation, frame, role)
        begins, ends = _lifetimes(frame, computation, returned)
        owned = {b for b, parameter in enumerate(frame.parameter) if parameter is None}
        if role == "call":
            # The caller has counted what is returned.
            owned -= returned
        now = set(range(len(frame.buffers))) - owned if role != "entry" else set()
        borrowed = frozenset(now)
        now |= {b for b, parameter in enumerate(frame.parameter) if parameter is not None}
        if role == "entry":
            # Memory of the program's results is set aside from the start.
            now |= returned - homes.keys()
        best, best_alive, best_run = -1.0, set(), None
        for index, instruction in enumerate(computation.instructions):
            now |= {homes.get(buffer, buffer) for buffer in begins[index]}
            inner = self._inner(instruction)
            idle = _buffers_at(frame, instruction, inner.idle) if inner else set()
            alive = now - idle
            total = sum(frame.buffers[b].bytes for b in alive - borrowed)
            total -= sum(frame.buffers[b].bytes for b in borrowed - alive)
            total += inner.bytes + sum(frame.buffers[b].bytes for b in idle) if inner else 0.0
            if total > best:
                best, best_alive, best_run = total, alive, inner
            gone = {homes.get(buffer, buffer) for buffer in ends[index]}
            now -= gone if role == "loop" else gone & owned
        buffers = [frame.buffers[b] for b in best_alive - borrowed] + list(best_run.buffers if best_run else ())
        idle = frozenset(frame.parameter[b] for b in borrowed - best_alive if frame.parameter[b] is not None)
        return _Run(best, tuple(buffers), idle)

    def _inner(self, instruction: Instruction) -> _Run | None:
        """The largest of the computations that the instruction runs."""
        called = instruction.called
        if instruction.opcode == "while":
            return max((self.run(called[key][0], "loop") for key in ("body", "condition")), key=lambda run: run.bytes)
        if instruction.opcode in ("call", "conditional", "async-start", "call-start"):
            names = [name for key in called for name in called[key]]
            return max((self.run(name, "call") for name in names), key=lambda run: run.bytes, default=None)
        return None


class _Frame:
    """Which buffers the values of a computation lie in.

    Attributes:
      buffers: by number.
      parameter: by number: of which parameter (and place in its tuple) it is the memory, or None.
      values: by instruction.
    """

    def __init__(self, module: Module, computation: Computation):
        self.module, self.computation = module, computation
        self.buffers: list[Buffer] = []
        self.parameter: list[Path | None] = []
        self.values: dict[str, Value] = {}
        for instruction in computation.instructions:
            self.values[instruction.name] = self._value(instruction)

    def _new(self, array: Array, source: str, parameter: Path | None = None) -> frozenset[int]:
        if array.space != HBM or not array.stored_bytes:
            return frozenset()
        argument = parameter[0] if parameter and self.computation is self.module.entry else None
        self.buffers.append(Buffer(array.stored_bytes, array.dims, array.dtype, source, argument))
        self.parameter.append(parameter)
        return frozenset({len(self.buffers) - 1})

    def _value(self, instruction: Instruction) -> Value:
        opcode, source = instruction.opcode, instruction.source
        operands = [self.values[name] for name in instruction.operands if name in self.values]
        if opcode == "constant":
            return {path: frozenset() for path, _ in leaves(instruction.shape)}
        if opcode == "parameter":
            number = int(instruction.operands[0])
            return {path: self._new(array, source, (number, *path)) for path, array in leaves(instruction.shape)}
        if opcode == "tuple":
            return {(index, *path): x for index, value in enumerate(operands) for path, x in value.items()}
        if opcode == "get-tuple-element":
            index = int(instruction.attributes["index"])
            return {path[1:]: x for path, x in operands[0].items() if path[:1] == (index,)}
        if opcode in ("bitcast", "while", "opt-barrier", "add-dependency", "dynamic-update-slice"):
            return operands[0]
        if instruction.target == "ConcatBitcast":
            return {(): frozenset().union(*(x for value in operands for x in value.values()))}
        if opcode.endswith("-done"):
            return self._done(instruction, operands[0])
        same = self._aliases(instruction, operands)
        return {
            path: same[path] if path in same else self._new(array, source) for path, array in leaves(instruction.shape)
        }

    def _done(self, instruction: Instruction, started: Value) -> Value:
        """A finished operation's result: a part of the tuple that its start made, or all of it."""
        place = {"copy-done": (0,), "all-reduce-done": ()}.get(instruction.opcode, (1,))
        inner = {path[len(place) :]: x for path, x in started.items() if path[: len(place)] == place}
        return {path: inner.get(path, frozenset()) for path, _ in leaves(instruction.shape)}

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
            fused = self.module.computations[instruction.called["calls"][0]]
            several = fused.root.opcode == "tuple"
            for index, number in enumerate(fusions.overwritten(self.module, fused)):
                if number is not None and () in operands[number]:
                    same[(index,) if several else ()] = operands[number][()]
        for out, number, place in re.findall(
            r"\{([\d, ]*)\}: \((\d+), \{([\d, ]*)\}", instruction.attributes.get("output_to_operand_aliasing", "")
        ):
            place = tuple(int(x) for x in re.findall(r"\d+", place))
            same[tuple(int(x) for x in re.findall(r"\d+", out))] = operands[int(number)].get(place, frozenset())
        return same


def _homes(module: Module, computation: Computation, frame: _Frame, role: str) -> dict[int, int]:
    """Buffers that are a parameter's memory: what a loop returns goes to where its next iteration reads it."""
    by_parameter = {parameter: buffer for buffer, parameter in enumerate(frame.parameter) if parameter is not None}
    homes = {}
    for path, buffers in frame.values[computation.root.name].items():
        if role == "loop":
            home = by_parameter.get((0, *path))
        else:
            home = by_parameter.get((module.donated.get(path, -1),)) if role == "entry" else None
        if home is not None and len(buffers) == 1:
            (buffer,) = buffers
            if frame.parameter[buffer] is None:
                homes[buffer] = home
    return homes


def _lifetimes(frame: _Frame, computation: Computation, returned: set[int]) -> tuple[list[set[int]], list[set[int]]]:
    """Buffers that begin to live with each instruction, and that are not needed after it."""
    count = len(computation.instructions)
    begin, end = {}, {}
    for index, instruction in enumerate(computation.instructions):
        for buffers in frame.values[instruction.name].values():
            for buffer in buffers:
                begin.setdefault(buffer, index)
                end.setdefault(buffer, index)
        if instruction.opcode not in ("tuple", "get-tuple-element", "bitcast"):
            for name in instruction.operands:
                for buffers in frame.values.get(name, {}).values():
                    end.update(dict.fromkeys(buffers, index))
    begins, ends = [set() for _ in range(count)], [set() for _ in range(count)]
    for buffer, index in begin.items():
        begins[index].add(buffer)
        if buffer not in returned:
            ends[end[buffer]].add(buffer)
    return begins, ends


def _buffers_at(frame: _Frame, instruction: Instruction, idle: frozenset[Path]) -> set[int]:
    """The caller's buffers behind parameters (number, then place) of what it calls."""
    return {
        buffer
        for number, *path in idle
        for buffer in frame.values[instruction.operands[number]].get(tuple(path), frozenset())
    }
