"""The text of a compiled program (HLO), as computations of instructions.

Knows the grammar and nothing of what operations cost. `compiled.as_text()` of TPU and CPU programs both read; what is
not understood raises `UnreadableProgram` instead of being left out.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

HBM = 0

BITS = {
    **{"pred": 8, "token": 0, "opaque": 0, "bf16": 16},
    **{f"{kind}{bits}": bits for kind in "su" for bits in (1, 2, 4, 8, 16, 32, 64)},
    **{f"f{bits}": bits for bits in (16, 32, 64)},
    **{f"c{bits}": bits for bits in (64, 128)},
}
_SHAPE = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([^}]*)\})?")
_TILE = re.compile(r"T\(([\d,]*)\)")
_SPACE = re.compile(r"S\((\d+)\)")
_START = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"|[(){}\[\],]')
_COMMENT = re.compile(r"/\*.*?\*/")
CALLS = (
    *("calls", "to_apply", "body", "condition", "branch_computations", "true_computation", "false_computation"),
    "called_computations",
)


class UnreadableProgram(Exception):
    """A program says something that this reader does not understand; the message names the instruction."""


class Array(NamedTuple):
    """One array of an instruction's result.

    Attributes:
      dtype: as HLO spells it: bf16, f32, s32, pred.
      dims: extents.
      space: 0 is HBM, 1 is VMEM, others are scalar memory, semaphores or the host's.
      order: dimensions from the one that varies fastest; empty if the text has no layout.
      tile: extents of the innermost dimensions are stored rounded up to multiples of these.
    """

    dtype: str
    dims: tuple[int, ...]
    space: int = HBM
    order: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        return self.size * _bits(self.dtype) / 8

    @property
    def stored_bytes(self) -> float:
        """With the padding of the innermost dimensions to tiles."""
        stored = [self.dims[dim] for dim in self.order] if len(self.order) == len(self.dims) else list(self.dims[::-1])
        stored += [1] * (len(self.tile) - len(stored))
        for place, extent in enumerate(reversed(self.tile)):
            stored[place] = -(-stored[place] // extent) * extent
        return math.prod(stored) * _bits(self.dtype) / 8


# An array, or a tuple of shapes.
Shape = Array | tuple


def leaves(shape: Shape, path: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], Array]]:
    """The arrays of a shape, each with its place in the nested tuples."""
    if isinstance(shape, Array):
        yield path, shape
    else:
        for index, part in enumerate(shape):
            yield from leaves(part, (*path, index))


@dataclasses.dataclass(frozen=True, eq=False)
class Instruction:
    """One line of a computation.

    Attributes:
      name: unique in the program, without `%`.
      shape: of the result.
      opcode: fusion, while, all-gather-start ...
      operands: names of instructions of the same computation; of a constant or parameter, the text in the parentheses.
      rest: the attributes as they are written.
    """

    name: str
    shape: Shape
    opcode: str
    operands: tuple[str, ...]
    rest: str

    @property
    def arrays(self) -> list[Array]:
        return [array for _, array in leaves(self.shape)]

    @functools.cached_property
    def attributes(self) -> dict[str, str]:
        found, last = {}, None
        for part in split(self.rest):
            key, equals, value = part.partition("=")
            if last == "replica_groups" and key == "device_ids":
                # The device order of a mesh is written behind a comma of its own.
                found[last] += ", " + part
            elif equals:
                found[key], last = value, key
        return found

    @functools.cached_property
    def called(self) -> dict[str, tuple[str, ...]]:
        """Names of the computations that each attribute of CALLS names."""
        return {
            key: tuple(name.strip().lstrip("%") for name in self.attributes[key].strip("{}").split(","))
            for key in CALLS
            if key in self.attributes
        }

    @functools.cached_property
    def source(self) -> str:
        """`op_name` of the metadata: the path of names in the traced function."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes.get("metadata", ""))
        return found[1] if found else ""

    @property
    def target(self) -> str:
        """What a custom call calls."""
        return self.attributes.get("custom_call_target", "").strip('"')

    def numbers(self, key: str) -> tuple[int, ...]:
        """An attribute such as `dimensions={0,1}`, empty if it is absent."""
        return tuple(int(number) for number in re.findall(r"-?\d+", self.attributes.get(key, "")))


@dataclasses.dataclass(frozen=True, eq=False)
class Computation:
    """Instructions in the order of the schedule (or, in fusions, of the data flow)."""

    name: str
    instructions: tuple[Instruction, ...]
    root: Instruction

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {instruction.name: instruction for instruction in self.instructions}

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {int(x.operands[0]): x for x in self.instructions if x.opcode == "parameter"}

    def operand(self, instruction: Instruction, index: int) -> Instruction:
        return self.by_name[instruction.operands[index]]


@dataclasses.dataclass(frozen=True, eq=False)
class Module:
    """A program.

    Attributes:
      computations: by name.
      entry: the computation that runs.
      num_devices: partitions times replicas.
      donated: place in the output's nested tuples to the argument that is overwritten with it.
    """

    computations: dict[str, Computation]
    entry: Computation
    num_devices: int
    donated: dict[tuple[int, ...], int]


def parse(text: str) -> Module:
    """Reads `compiled.as_text()`.

    Raises:
      UnreadableProgram: no entry computation, or an instruction of unknown form.
    """
    computations, entry, header = {}, None, ""
    name, is_entry, lines = None, False, []
    for line in text.splitlines():
        if line.startswith("HloModule"):
            header = line
        elif name is None:
            if not line.startswith(("HloModule", " ")) and (found := _HEADER.match(line)):
                is_entry, name, lines = bool(found[1]), found[2], []
        elif line.rstrip() == "}" or line.startswith("}, execution_thread"):
            computations[name] = _computation(name, lines)
            entry, name = (computations[name] if is_entry else entry), None
        elif _START.match(line) or not lines:
            lines.append(line)
        else:
            # Attributes of kernels have line breaks in them.
            lines[-1] += "\n" + line
    if entry is None:
        raise UnreadableProgram(f"no ENTRY computation in a text of {len(text)} characters")
    counts = [re.search(rf"\b{key}=(\d+)", header) for key in ("num_partitions", "replica_count")]
    return Module(computations, entry, math.prod(int(found[1]) for found in counts if found), _donated(header))


def split(text: str) -> Iterator[str]:
    """Parts between the commas that are in no bracket and no quotes."""
    depth = begin = 0
    for found in _BRACKET.finditer(text):
        mark = found[0]
        if mark in "({[":
            depth += 1
        elif mark in ")}]":
            depth -= 1
        elif mark == "," and depth == 0:
            yield text[begin : found.start()].strip()
            begin = found.end()
    if text[begin:].strip():
        yield text[begin:].strip()


def parse_shape(text: str) -> Shape:
    """`bf16[8,128]{1,0:T(8,128)(2,1)S(1)}`, or a tuple of such in parentheses."""
    text = text.strip()
    if text.startswith("("):
        return tuple(parse_shape(part) for part in split(text[1:-1]))
    found = _SHAPE.fullmatch(text)
    if not found:
        raise UnreadableProgram(f"shape {text[:200]!r} is of unknown form")
    order, _, rest = (found[3] or "").partition(":")
    tile, space = _TILE.search(rest), _SPACE.search(rest)
    return Array(
        found[1],
        _ints(found[2].replace("<=", "")),
        int(space[1]) if space else HBM,
        _ints(order),
        _ints(tile[1]) if tile else (),
    )


def _computation(name: str, lines: list[str]) -> Computation:
    instructions, root = [], None
    for line in lines:
        found = _START.match(line)
        if not found:
            raise UnreadableProgram(f"computation {name}: a line of unknown form: {line[:200]!r}")
        instructions.append(_instruction(found[2], line[found.end() :]))
        root = instructions[-1] if found[1] else root
    if root is None:
        raise UnreadableProgram(f"computation {name} has no ROOT")
    return Computation(name, tuple(instructions), root)


def _instruction(name: str, text: str) -> Instruction:
    end = _closing(text, 0) if text.startswith("(") else text.find(" ")
    found = _OPCODE.match(text, end) if end > 0 else None
    if not found:
        raise UnreadableProgram(f"instruction {name} is of unknown form: {text[:200]!r}")
    close = _closing(text, found.end() - 1)
    inside = text[found.end() : close - 1]
    if found[1] in ("constant", "parameter"):
        operands = (inside,)
    else:
        # Some printers put the operand's shape before its name.
        operands = tuple(part.split()[-1].lstrip("%") for part in split(_COMMENT.sub("", inside)))
    shape = parse_shape(_COMMENT.sub("", text[:end]))
    return Instruction(name, shape, found[1], operands, text[close:].lstrip(", "))


def _closing(text: str, begin: int) -> int:
    """Behind the bracket that closes the one at `begin`."""
    depth = 0
    for found in _BRACKET.finditer(text, begin):
        depth += (found[0] in "({[") - (found[0] in ")}]")
        if depth == 0:
            return found.end()
    raise UnreadableProgram(f"unbalanced brackets: {text[begin : begin + 200]!r}")


def _donated(header: str) -> dict[tuple[int, ...], int]:
    begin = header.find("input_output_alias={")
    if begin < 0:
        return {}
    table = header[begin : _closing(header, header.index("{", begin))]
    return {_ints(out): int(number) for out, number in re.findall(r"\{([\d, ]*)\}: \((\d+), \{\}", table)}


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))


def _bits(dtype: str) -> int:
    # f8e4m3fn and its kin carry their width in their name.
    found = BITS.get(dtype) if dtype in BITS else re.match(r"f(\d)e", dtype)
    if found is None:
        raise UnreadableProgram(f"arrays of {dtype} have an unknown width")
    return found if isinstance(found, int) else int(found[1])
