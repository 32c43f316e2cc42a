"""How often the loops of a compiled program run."""

import dataclasses
import re
from typing import NamedTuple

from spiral_jax.roofline.hlo import Computation, Instruction, UnreadableProgram

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
      call: the instruction that calls it, and where that stands; None for the program's entry.
    """

    computation: Computation
    call: "tuple[Instruction, Scope] | None" = None


class _Carried(NamedTuple):
    """What a loop, which stands in `scope`, carries at `place` when an iteration begins."""

    loop: Instruction
    scope: Scope
    place: int

    def before(self) -> "_Value":
        """What it is when the loop begins."""
        return _value(self.scope, self.loop.operands[0], (self.place,))

    def after(self) -> "_Value":
        """What it is when an iteration ends."""
        (body,) = self.loop.called("body")
        return _value(Scope(body, (self.loop, self.scope)), body.root, (self.place,))

    def changes(self) -> bool:
        return self.after() != _Number(0, self)


class _Number(NamedTuple):
    """An integer, or what a loop carries plus an integer."""

    offset: int
    carried: _Carried | None = None

    def plus(self, offset: int) -> "_Number":
        return _Number(self.offset + offset, self.carried)


class _Comparison(NamedTuple):
    direction: str
    left: _Number
    right: _Number


# None is what is not known.
_Value = _Number | _Comparison | None


def trip_count(loop: Instruction, scope: Scope) -> int:
    """Iterations of a while loop, from the compiler's note or by reading counter, bound and step.

    Args:
      loop: a `while` instruction.
      scope: where it stands.

    Raises:
      UnknownTripCount: naming the loop.
    """
    found = re.search(r'"known_trip_count":\s*\{\s*"n":\s*"(\d+)"', loop.attributes.get("backend_config", ""))
    if found:
        return int(found[1])
    (condition,) = loop.called("condition")
    where = f"loop {loop.name} ({loop.source or 'no source'})"
    test = _value(Scope(condition, (loop, scope)), condition.root, ())
    if not isinstance(test, _Comparison):
        raise UnknownTripCount(f"{where}: its condition {condition.name} is not a comparison of numbers")
    direction, counter, bound = test
    if counter.carried is None or counter.carried.loop is not loop or not counter.carried.changes():
        direction, counter, bound = SWAPPED[direction], bound, counter
    if counter.carried is None or counter.carried.loop is not loop:
        raise UnknownTripCount(f"{where}: its condition {condition.name} compares nothing that the loop changes")
    where += f": element {counter.carried.place}, the counter,"
    after = counter.carried.after()
    if not isinstance(after, _Number) or after.carried != counter.carried:
        raise UnknownTripCount(f"{where} does not grow by a constant")
    first, last = _settled(counter.carried.before()), _settled(bound)
    if first is None or last is None:
        raise UnknownTripCount(f"{where} has no constant {'initial value' if first is None else 'bound'}")
    return _iterations(first + counter.offset, last, after.offset, direction, where)


def _iterations(first: int, last: int, step: int, direction: str, where: str) -> int:
    distance = last - first
    if direction in ("GT", "GE"):
        distance, step, direction = -distance, -step, SWAPPED[direction]
    if direction == "NE" and step and distance % step == 0 and distance // step >= 0:
        return distance // step
    if direction in ("LT", "LE") and step > 0:
        return max(0, -(-(distance + (direction == "LE")) // step))
    raise UnknownTripCount(f"{where} from {first} by {step} while {direction} {last}, has no known end")


def _settled(value: _Value) -> int | None:
    """The integer, following what loops carry without changing it to where it comes from."""
    while isinstance(value, _Number):
        if value.carried is None:
            return value.offset
        before = None if value.carried.changes() else value.carried.before()
        value = before.plus(value.offset) if isinstance(before, _Number) else None
    return None


def _value(scope: Scope, instruction: Instruction, path: tuple[int, ...]) -> _Value:
    """What an instruction is, or the element at `path` of its tuple."""
    opcode, operands = instruction.opcode, instruction.operands
    if opcode == "constant":
        found = re.fullmatch(r"\{?(-?\d+)\}?", instruction.literal.strip())
        return _Number(int(found[1])) if found else None
    if opcode == "parameter":
        return _parameter(scope, int(instruction.literal), path)
    if opcode == "get-tuple-element":
        return _value(scope, operands[0], (int(instruction.attributes["index"]), *path))
    if opcode == "tuple":
        return _value(scope, operands[path[0]], path[1:]) if path else None
    if opcode in SAME:
        # The result of `copy-start` is a tuple of destination, source and semaphore.
        inner = path[1:] if opcode == "copy-start" else path
        return _value(scope, operands[0], inner) if len(operands) == 1 else None
    if opcode in ("fusion", "call"):
        (computation,) = instruction.called("calls", "to_apply")
        return _value(Scope(computation, (instruction, scope)), computation.root, path)
    if opcode == "while" and len(path) == 1:
        carried = _Carried(instruction, scope, path[0])
        return None if carried.changes() else carried.before()
    if opcode in ("add", "subtract", "multiply", "compare"):
        left, right = (_value(scope, operand, path) for operand in operands)
        return _combined(instruction, left, right)
    return None


def _combined(instruction: Instruction, left: _Value, right: _Value) -> _Value:
    """What a comparison or arithmetic makes of two numbers."""
    opcode = instruction.opcode
    if not isinstance(left, _Number) or not isinstance(right, _Number):
        return None
    if opcode == "compare":
        return _Comparison(instruction.attributes["direction"], left, right)
    if opcode == "add" and left.carried is None:
        left, right = right, left
    if right.carried is not None or (opcode == "multiply" and left.carried is not None):
        return None
    if opcode == "multiply":
        return _Number(left.offset * right.offset)
    return left.plus(right.offset if opcode == "add" else -right.offset)


def _parameter(scope: Scope, number: int, path: tuple[int, ...]) -> _Value:
    if scope.call is None:
        return None
    caller, outside = scope.call
    if caller.opcode in ("fusion", "call"):
        return _value(outside, caller.operands[number], path)
    if caller.opcode == "while" and len(path) == 1:
        return _Number(0, _Carried(caller, outside, path[0]))
    return None
