"""Runs a verb in the test's own process, as a shell would see it."""

import contextlib
import io
import sys

from spiral_jax import command


def call(verb, *arguments: object) -> tuple[int, str]:
    """The exit status and stderr of `python -m spiral_jax.VERB ARGUMENTS`; `verb` is the module."""
    before, sys.argv = sys.argv, [verb.__name__, *map(str, arguments)]
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            command.run(verb.__name__.rpartition(".")[2], verb.__doc__, verb.define, verb.main)
    except SystemExit as stop:
        return stop.code or 0, errors.getvalue()
    finally:
        sys.argv = before
    return 0, errors.getvalue()
