"""What is in a traced program."""

import jax


def equations_in(jaxpr):
    """All of a program, and of all that it calls."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations_in(inner)


def shapes_in(jaxpr):
    """Shapes of all arrays that a program makes."""
    for equation in equations_in(jaxpr):
        yield from (variable.aval.shape for variable in equation.outvars)
