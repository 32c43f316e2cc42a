"""How often the loops of a compiled program run."""

import dataclasses
import re

from spiral_jax.roofline.hlo import Computation, Instruction, Module, UnreadableProgram

SWAPPED = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE", "NE": "NE", "EQ": "EQ"}
# Operations whose result is the operand's number.
SAME = {"copy", "bitcast", "convert", "reshape", "broadcast", "copy-done", "copy-start", "opt-barrier"}


class UnknownTripCount(UnreadableProgram):
    """A loop whose condition or counter was not understood."""


@dataclasses.dataclass(frozen=True, eq=False)
class Scope:
    """A computation and the place it is called from, which says what its parameters are.

    Attributes:
      computation: that runs.
      parent: where its caller stands; None for the program's entry.
      call: the instruction that calls it.
    """

    computation: Computation
    parent: "Scope | None" = None
    call: Instruction | None = None


@dataclasses.dataclass(frozen=True)
class _Number:
    """An integer, or what a loop carries at `index` when an iteration begins, plus `offset`."""

    offset: int
    scope: Scope | None = None
    index: int = -1

    def is_carried(self, loop: Instruction) -> bool:
        return self.scope is not None and self.scope.call is loop


@dataclasses.dataclass(frozen=True)
class _Comparison:
    direction: str
    left: _Number
    right: _Number


def trip_count(module: Module, loop: Instruction, scope: Scope) -> int:
    """Iterations of a while loop, from the compiler's note or by reading counter, bound and step.

    Args:
      module: the program.
      loop: a `while` instruction.
      scope: where it stands.

    Raises:
      UnknownTripCount: naming the loop.
    """
    found = re.search(r'"known_trip_count":\s*\{\s*"n":\s*"(\d+)"', loop.attributes.get("backend_config", ""))
    if found:
        return int(found[1])
    (condition,), (body,) = loop.called["condition"], loop.called["body"]
    where = f"loop {loop.name} ({loop.source or 'no source'})"
    test_scope = Scope(module.computations[condition], scope, loop)
    test = _value(module, test_scope, test_scope.computation.root.name, ())
    if not isinstance(test, _Comparison):
        raise UnknownTripCount(f"{where}: its condition {condition} is not a comparison of numbers")
    body_scope = Scope(module.computations[body], scope, loop)
    direction, counter, bound = test.direction, test.left, test.right
    if not _changes(module, counter, loop, body_scope):
        direction, counter, bound = SWAPPED[direction], bound, counter
    if not counter.is_carried(loop):
        raise UnknownTripCount(f"{where}: its condition {condition} compares nothing that the loop changes")
    after = _value(module, body_scope, body_scope.computation.root.name, (counter.index,))
    first = _settled(module, _value(module, scope, loop.operands[0], (counter.index,)))
    last = _settled(module, bound)
    if not isinstance(after, _Number) or not after.is_carried(loop) or after.index != counter.index:
        raise UnknownTripCount(f"{where}: element {counter.index}, the counter, does not grow by a constant")
    if first is None or last is None:
        what = "initial value" if first is None else "bound"
        raise UnknownTripCount(f"{where}: the {what} of element {counter.index}, the counter, is not a constant")
    return _iterations(first + counter.offset, last, after.offset, direction, where)


def _iterations(first: int, last: int, step: int, direction: str, where: str) -> int:
    distance = last - first
    if direction in ("GT", "GE"):
        distance, step, direction = -distance, -step, SWAPPED[direction]
    if direction == "NE" and step and distance % step == 0 and distance // step >= 0:
        return distance // step
    if direction in ("LT", "LE") and step > 0:
        return max(0, -(-(distance + (direction == "LE")) // step))
    raise UnknownTripCount(f"{where}: from {first} by {step} while {direction} {last} has no known end")


def _changes(module: Module, number: _Number, loop: Instruction, body: Scope) -> bool:
    if not number.is_carried(loop):
        return False
    after = _value(module, body, body.computation.root.name, (number.index,))
    return after != dataclasses.replace(number, offset=0, scope=body)


def _settled(module: Module, value) -> int | None:
    """The integer, following what loops carry without changing it to where it comes from."""
    while isinstance(value, _Number):
        if value.scope is None:
            return value.offset
        loop, parent = value.scope.call, value.scope.parent
        body = Scope(module.computations[loop.called["body"][0]], parent, loop)
        if _changes(module, value, loop, body):
            return None
        before = _value(module, parent, loop.operands[0], (value.index,))
        value = _plus(before, value.offset) if isinstance(before, _Number) else None
    return None


def _plus(number: _Number, offset: int) -> _Number:
    return dataclasses.replace(number, offset=number.offset + offset)


def _value(module: Module, scope: Scope, name: str, path: tuple[int, ...]):
    """What an instruction (the element at `path` of its tuple) is: _Number, _Comparison, or None if not known."""
    instruction = scope.computation.by_name[name]
    opcode, operands = instruction.opcode, instruction.operands

    def operand(index, path=path):
        return _value(module, scope, operands[index], path)

    if opcode == "constant":
        found = re.fullmatch(r"\{?(-?\d+)\}?", operands[0].strip())
        return _Number(int(found[1])) if found else None
    if opcode == "parameter":
        return _parameter(module, scope, int(operands[0]), path)
    if opcode == "get-tuple-element":
        return operand(0, (int(instruction.attributes["index"]), *path))
    if opcode == "tuple":
        return operand(path[0], path[1:]) if path else None
    if opcode in SAME:
        # The result of `copy-start` is a tuple of destination, source and semaphore.
        return operand(0, path[1:] if opcode == "copy-start" else path) if len(operands) == 1 else None
    if opcode in ("fusion", "call"):
        (name,) = instruction.called.get("calls") or instruction.called["to_apply"]
        inner = Scope(module.computations[name], scope, instruction)
        return _value(module, inner, inner.computation.root.name, path)
    if opcode == "while" and path:
        body = Scope(module.computations[instruction.called["body"][0]], scope, instruction)
        carried = _Number(0, body, path[0])
        return None if path[1:] or _changes(module, carried, instruction, body) else operand(0)
    if opcode in ("add", "subtract", "multiply", "compare"):
        left, right = operand(0), operand(1)
        if not isinstance(left, _Number) or not isinstance(right, _Number):
            return None
        if opcode == "compare":
            return _Comparison(instruction.attributes["direction"], left, right)
        if opcode == "add" and left.scope is None:
            left, right = right, left
        if right.scope is not None or (opcode == "multiply" and left.scope is not None):
            return None
        if opcode == "multiply":
            return _Number(left.offset * right.offset)
        return _plus(left, right.offset if opcode == "add" else -right.offset)
    return None


def _parameter(module: Module, scope: Scope, number: int, path: tuple[int, ...]):
    if scope.call is None:
        return None
    if scope.call.opcode in ("fusion", "call"):
        return _value(module, scope.parent, scope.call.operands[number], path)
    if scope.call.opcode == "while" and len(path) == 1:
        return _Number(0, scope, path[0])
    return None
