"""What a fused computation reads of its parameters, writes of its results, and overwrites in place."""

from spiral_jax.roofline.hlo import Array, Computation, Instruction, Module

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


def results(computation: Computation) -> list[Instruction]:
    """The instructions whose values a computation returns, in the order of its result's arrays."""
    root = computation.root
    if root.opcode != "tuple":
        return [root]
    return [computation.by_name[name] for name in root.operands]


def seen_through(computation: Computation, instruction: Instruction) -> Instruction:
    """The instruction whose elements a chain of bitcasts and the like shows."""
    while instruction.opcode in VIEWS and instruction.operands:
        instruction = computation.operand(instruction, 0)
    return instruction


def overwritten(module: Module, computation: Computation) -> list[int | None]:
    """For every result, the parameter that a dynamic-update-slice (perhaps in an inner fusion) updates in place."""
    found = []
    for result in results(computation):
        source = seen_through(computation, result)
        while source.opcode in ("dynamic-update-slice", "fusion"):
            place = 0
            if source.opcode == "fusion":
                place = _inner(module, source, overwritten)
                if place is None:
                    break
            source = seen_through(computation, computation.operand(source, place))
        found.append(int(source.operands[0]) if source.opcode == "parameter" else None)
    return found


def written(module: Module, computation: Computation) -> list[int]:
    """Elements written of every result: all, or those of a dynamic-update-slice's update; none of a parameter."""
    found = []
    for result, parameter in zip(results(computation), overwritten(module, computation), strict=True):
        source = seen_through(computation, result)
        if source.opcode == "parameter":
            found.append(0)
        elif parameter is None:
            found.append(sum(array.size for array in result.arrays))
        elif source.opcode == "fusion":
            found.append(_inner(module, source, written))
        else:
            found.append(_updated(module, computation, source))
    return found


def _updated(module: Module, computation: Computation, source: Instruction) -> int:
    """Elements that a chain of dynamic-update-slices writes."""
    total = 0
    while source.opcode == "dynamic-update-slice":
        total += sum(array.size for array in computation.operand(source, 1).arrays)
        source = seen_through(computation, computation.operand(source, 0))
    return total + (_inner(module, source, written) if source.opcode == "fusion" else 0)


def _inner(module: Module, fusion: Instruction, question):
    """The answer for an inner fusion with one result; None for several."""
    answers = question(module, module.computations[fusion.called["calls"][0]])
    return answers[0] if len(answers) == 1 else None


def read(module: Module, computation: Computation, wanted: list[float] | None = None) -> list[float]:
    """Elements read of every parameter.

    Goes backwards from the results: an elementwise operation needs of its operands what is needed of its result, a
    slice what it returns, products and reductions everything. Several users add up, to the whole array at most.

    Args:
      module: the program.
      computation: a fused one.
      wanted: elements needed of every result; all if None.
    """
    need = dict.fromkeys(computation.by_name, 0.0)
    in_place = overwritten(module, computation)
    for index, (result, parameter) in enumerate(zip(results(computation), in_place, strict=True)):
        size = float(sum(array.size for array in result.arrays))
        # A parameter that is only passed on is not read.
        if seen_through(computation, result).opcode != "parameter":
            need[result.name] = max(need[result.name], size if wanted is None else min(size, wanted[index]))
        if parameter is not None:
            _mark_buffers(computation, result, need)
    for instruction in reversed(computation.instructions):
        _spread(module, computation, instruction, need)
    return [
        min(need[parameter.name], sum(array.size for array in parameter.arrays))
        for _, parameter in sorted(computation.parameters.items())
    ]


def _mark_buffers(computation: Computation, result: Instruction, need: dict[str, float]) -> None:
    """Notes, as a need below zero, the dynamic-update-slices that keep what they do not update where it is."""
    source = seen_through(computation, result)
    while source.opcode == "dynamic-update-slice":
        need[source.name] = -1.0
        source = seen_through(computation, computation.operand(source, 0))


def _spread(module: Module, computation: Computation, instruction: Instruction, need: dict[str, float]) -> None:
    """Adds to the operands' needs what the instruction needs of them."""
    opcode, wanted = instruction.opcode, need[instruction.name]
    if wanted == 0 or opcode in ("parameter", "constant", "iota"):
        return
    operands = [computation.by_name[name] for name in instruction.operands]
    sizes = [sum(array.size for array in operand.arrays) for operand in operands]
    if opcode == "dynamic-update-slice":
        shares = [0.0 if wanted < 0 else min(wanted, sizes[0]), sizes[1] if wanted < 0 else min(wanted, sizes[1])]
        shares += sizes[2:]
    elif opcode == "fusion":
        inner = module.computations[instruction.called["calls"][0]]
        if isinstance(instruction.shape, Array) and len(results(inner)) == 1:
            shares = read(module, inner, [abs(wanted) if wanted > 0 else sizes[0]])
        else:
            shares = read(module, inner)
    elif opcode in ELEMENTWISE or opcode in ("slice", "dynamic-slice", "gather", "pad", "broadcast", "concatenate"):
        shares = [min(wanted, size) for size in sizes]
    elif opcode in ("tuple", "get-tuple-element"):
        # Results were given their needs one by one; a value of several arrays counts whole.
        shares = [0.0] * len(sizes) if instruction is computation.root else sizes
    else:
        shares = sizes
    for operand, share in zip(operands, shares, strict=True):
        if need[operand.name] >= 0:
            need[operand.name] = min(need[operand.name] + share, float(sum(a.size for a in operand.arrays)))
