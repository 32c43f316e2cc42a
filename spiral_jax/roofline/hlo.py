"""Which instructions a compiled program consists of, from its text (HLO).

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

# f8e4m3fn and its kin carry their width in their name, as all but these do.
_NAMED_BITS = {"pred": 8, "token": 0, "opaque": 0}
_BITS = re.compile(r"(?:s|u|c|f|bf)(\d+)(?:e\w+)?")
_SHAPE = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([^}]*)\})?")
_TILE = re.compile(r"T\(([\d,]*)\)")
_SPACE = re.compile(r"S\((\d+)\)")
_START = re.compile(r"[ \t]+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
# Attributes of kernels have line breaks in them: an instruction goes on until the next begins.
_NEXT = re.compile(rf"\n(?={_START.pattern})")
_COMPUTATION = re.compile(
    r"^(ENTRY )?%?([\w.\-]+) \([^\n]*\{[ \t]*\n(.*?)^\}(?:[ \t]*$|, execution_thread)", re.MULTILINE | re.DOTALL
)
_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"|[(){}\[\],]')
_COMMENT = re.compile(r"/\*.*?\*/")


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
        return self.size * self._bits / 8

    @property
    def hbm_bytes(self) -> float:
        """Bytes if it lies in HBM, else 0."""
        return self.bytes if self.space == HBM else 0.0

    @property
    def stored_bytes(self) -> float:
        """With the padding of the innermost dimensions to tiles."""
        stored = [self.dims[dim] for dim in self.order] if len(self.order) == len(self.dims) else list(self.dims[::-1])
        stored += [1] * (len(self.tile) - len(stored))
        for place, extent in enumerate(reversed(self.tile)):
            stored[place] = -(-stored[place] // extent) * extent
        return math.prod(stored) * self._bits / 8

    @property
    def _bits(self) -> int:
        if self.dtype in _NAMED_BITS:
            return _NAMED_BITS[self.dtype]
        found = _BITS.fullmatch(self.dtype)
        if not found:
            raise UnreadableProgram(f"arrays of {self.dtype} have an unknown width")
        return int(found[1])

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


# An array, or a tuple of shapes.
Shape = Array | tuple


def leaves(shape: Shape, path: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], Array]]:
    """The arrays of a shape, each with its place in the nested tuples."""
    if isinstance(shape, Array):
        yield path, shape
    else:
        for index, part in enumerate(shape):
            yield from leaves(part, (*path, index))


# Not by value, and no repr: a program is a graph.
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Instruction:
    """One line of a computation.

    Attributes:
      name: unique in the program, without `%`.
      shape: of the result.
      opcode: fusion, while, all-gather-start ...
      operands: instructions of the same computation.
      literal: of a constant its value, of a parameter its number, as written; else empty.
      rest: the attributes as they are written.
      computations: all of the program, by name.
      users: instructions of the same computation that have it as an operand.
    """

    name: str
    shape: Shape
    opcode: str
    operands: tuple["Instruction", ...]
    literal: str
    rest: str
    computations: dict[str, "Computation"]
    users: list["Instruction"] = dataclasses.field(default_factory=list)

    @functools.cached_property
    def arrays(self) -> list[Array]:
        return [array for _, array in leaves(self.shape)]

    @property
    def array(self) -> Array:
        """The result.

        Raises:
          UnreadableProgram: it is a tuple.
        """
        if isinstance(self.shape, Array):
            return self.shape
        raise UnreadableProgram(f"{self.opcode} {self.name} has a tuple where an array is expected")

    @property
    def size(self) -> int:
        """Elements of the result, of all arrays together."""
        return sum(array.size for array in self.arrays)

    @functools.cached_property
    def attributes(self) -> dict[str, str]:
        found: dict[str, str] = {}
        last = ""
        for part in split(self.rest):
            key, equals, value = part.partition("=")
            if last == "replica_groups" and key == "device_ids":
                # The device order of a mesh is written behind a comma of its own.
                found[last] += ", " + part
            elif equals:
                found[key], last = value, key
        return found

    def called(self, *keys: str) -> list["Computation"]:
        """The computations that those of the attributes name that are there: `calls`, `body` ..."""
        found = (self.attributes[key].strip("{}").split(",") for key in keys if key in self.attributes)
        return [self.computations[name.strip().lstrip("%")] for names in found for name in names]

    @property
    def fused(self) -> "Computation":
        """What a fusion computes."""
        return self.called("calls")[0]

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
        return integers(self.attributes.get(key, ""))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Computation:
    """Instructions in the order of the schedule (or, in fusions, of the data flow)."""

    name: str
    instructions: tuple[Instruction, ...]
    root: Instruction

    @property
    def results(self) -> tuple[Instruction, ...]:
        """The instructions whose values it returns, in the order of its result's arrays."""
        return self.root.operands if self.root.opcode == "tuple" else (self.root,)

    @functools.cached_property
    def parameters(self) -> list[Instruction]:
        return sorted((x for x in self.instructions if x.opcode == "parameter"), key=lambda x: int(x.literal))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
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

    @functools.cached_property
    def fused(self) -> set[Computation]:
        """What its fusions compute, whose values lie in no memory."""
        every = (x for computation in self.computations.values() for x in computation.instructions)
        return {x.fused for x in every if x.opcode == "fusion"}


def parse(text: str) -> Module:
    """Reads `compiled.as_text()`.

    Raises:
      UnreadableProgram: no entry computation, or an instruction of unknown form.
    """
    computations: dict[str, Computation] = {}
    entry = None
    for is_entry, name, body in _COMPUTATION.findall(text):
        computations[name] = _computation(name, body, computations)
        entry = computations[name] if is_entry else entry
    if entry is None:
        raise UnreadableProgram(f"no ENTRY computation in a text of {len(text)} characters")
    found = re.search(r"^HloModule.*", text, re.MULTILINE)
    header = found[0] if found else ""
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
        integers(found[2].replace("<=", "")),
        int(space[1]) if space else HBM,
        integers(order),
        integers(tile[1]) if tile else (),
    )


def integers(text: str) -> tuple[int, ...]:
    """All numbers in a text, none below zero."""
    return tuple(int(number) for number in re.findall(r"\d+", text))


def _computation(name: str, body: str, computations: dict[str, Computation]) -> Computation:
    instructions: dict[str, Instruction] = {}
    root = None
    begins = [0, *(found.end() for found in _NEXT.finditer(body)), len(body)]
    for line in (body[begin:end].rstrip() for begin, end in zip(begins, begins[1:], strict=False)):
        found = _START.match(line)
        if not found:
            raise UnreadableProgram(f"computation {name}: a line of unknown form: {line[:200]!r}")
        one = _instruction(found[2], line[found.end() :], instructions, computations)
        for operand in one.operands:
            operand.users.append(one)
        instructions[one.name] = one
        root = one if found[1] else root
    if root is None:
        raise UnreadableProgram(f"computation {name} has no ROOT")
    return Computation(name, tuple(instructions.values()), root)


def _instruction(
    name: str, text: str, before: dict[str, Instruction], computations: dict[str, Computation]
) -> Instruction:
    end = _closing(text, 0) if text.startswith("(") else text.find(" ")
    found = _OPCODE.match(text, end) if end > 0 else None
    if not found:
        raise UnreadableProgram(f"instruction {name} is of unknown form: {text[:200]!r}")
    close = _closing(text, found.end() - 1)
    literal, operands = text[found.end() : close - 1], []
    if found[1] not in ("constant", "parameter"):
        # Some printers put the operand's shape before its name.
        operands = [part.split()[-1].lstrip("%") for part in split(_COMMENT.sub("", literal))]
        literal = ""
    if unknown := [operand for operand in operands if operand not in before]:
        raise UnreadableProgram(f"instruction {name} has an operand {unknown[0]} that no line before it makes")
    shape, rest = parse_shape(_COMMENT.sub("", text[:end])), text[close:].lstrip(", ")
    return Instruction(name, shape, found[1], tuple(before[x] for x in operands), literal, rest, computations)


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
    return {integers(out): int(number) for out, number in re.findall(r"\{([\d, ]*)\}: \((\d+), \{\}", table)}
