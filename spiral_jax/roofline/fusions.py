"""How much a fused computation reads of its parameters and writes of its results, and what it overwrites in place."""

import itertools

from spiral_jax.roofline.hlo import Array, Computation, Instruction

# Views of the same elements.
VIEWS = ("bitcast", "reshape", "get-tuple-element", "bitcast-convert")
# One element of each operand per element of the result.
ELEMENTWISE = {
    "abs", "add", "and", "atan2", "bitcast", "bitcast-convert", "cbrt", "ceil", "clamp", "compare",
    "complex", "convert", "copy", "cosine", "divide", "erf", "exponential", "exponential-minus-one", "floor",
    "imag", "is-finite", "log", "log-plus-one", "logistic", "map", "maximum", "minimum", "multiply", "negate",
    "not", "or", "popcnt", "power", "real", "reduce-precision", "remainder", "reshape", "reverse", "round-nearest-afz",
    "round-nearest-even", "rsqrt", "select", "shift-left", "shift-right-arithmetic", "shift-right-logical", "sign",
    "sine", "sqrt", "stochastic-convert", "subtract", "tan", "tanh", "transpose", "xor",
}  # fmt: skip
# Of an operand at most as many elements as of the result.
NO_MORE = {"slice", "dynamic-slice", "gather", "pad", "broadcast", "concatenate"} | ELEMENTWISE


def overwritten(computation: Computation) -> list[int | None]:
    """For every result, the parameter that a dynamic-update-slice (perhaps in an inner fusion) updates in place."""
    starts = [_updates(result)[-1] for result in computation.results]
    return [int(start.literal) if start.opcode == "parameter" else None for start in starts]


def written(computation: Computation) -> list[int]:
    """Elements written of every result: all, or those of a dynamic-update-slice's update; none of a parameter."""
    found = []
    for result in computation.results:
        *updates, start = _updates(result)
        total = result.size if start.opcode != "parameter" else 0
        for update in updates if start.opcode == "parameter" else ():
            if update.opcode == "fusion":
                total += written(update.fused)[0]
                break
            total += update.operands[1].size
        found.append(total)
    return found


def read(computation: Computation, wanted: list[float] | None = None) -> list[float]:
    """Elements read of every parameter.

    Goes backwards from the results: an elementwise operation needs of its operands what is needed of its result, a
    slice what it returns, products and reductions everything. Several users add up, to the whole array at most.

    Args:
      computation: a fused one.
      wanted: elements needed of every result; all if None.
    """
    need = dict.fromkeys(computation.instructions, 0.0)
    for index, result in enumerate(computation.results):
        *updates, start = _updates(result)
        # A parameter that is only passed on is not read.
        if updates or start.opcode != "parameter":
            size = float(result.size)
            need[result] = max(need[result], size if wanted is None else min(size, wanted[index]))
        if start.opcode == "parameter":
            # A need below zero: keeps what it does not update where it is.
            for update in itertools.takewhile(lambda x: x.opcode == "dynamic-update-slice", updates):
                need[update] = -1.0
    for instruction in reversed(computation.instructions):
        if need[instruction] and instruction.opcode not in ("parameter", "constant", "iota"):
            shares = _shares(instruction, need[instruction])
            for operand, share in zip(instruction.operands, shares, strict=True):
                if need[operand] >= 0:
                    need[operand] = min(need[operand] + share, float(operand.size))
    return [min(need[parameter], parameter.size) for parameter in computation.parameters]


def _seen_through(instruction: Instruction) -> Instruction:
    """The instruction whose elements a chain of bitcasts and the like shows."""
    while instruction.opcode in VIEWS and instruction.operands:
        instruction = instruction.operands[0]
    return instruction


def _updates(result: Instruction) -> list[Instruction]:
    """What updates a result in place, the last update first, and at the end what the first one updates."""
    found = [_seen_through(result)]
    while found[-1].opcode in ("dynamic-update-slice", "fusion"):
        places = overwritten(found[-1].fused) if found[-1].opcode == "fusion" else [0]
        if len(places) != 1 or places[0] is None:
            break
        found.append(_seen_through(found[-1].operands[places[0]]))
    return found


def _shares(instruction: Instruction, wanted: float) -> list[float]:
    """Elements of every operand that the instruction needs for as many of its result."""
    opcode, sizes = instruction.opcode, [float(operand.size) for operand in instruction.operands]
    if opcode == "dynamic-update-slice":
        changed = [0.0, sizes[1]] if wanted < 0 else [min(wanted, size) for size in sizes[:2]]
        return changed + sizes[2:]
    if opcode == "fusion":
        return read(instruction.fused, [wanted] if isinstance(instruction.shape, Array) else None)
    if opcode in NO_MORE:
        return [min(wanted, size) for size in sizes]
    # Products, reductions, the arrays of a tuple: everything.
    return sizes
