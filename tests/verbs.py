"""Runs a verb in the test's own process, as a shell would see it."""

import contextlib
import io
import sys

from absl import flags

from spiral_jax import command


def call(verb, *arguments: object, exact: bool = False) -> tuple[int, str]:
    """The exit status and stderr of `python -m spiral_jax.VERB ARGUMENTS`.

    Args:
      verb: the module.
      *arguments: of the command line. What is given again replaces what was given before, as tests vary what they have
        in common; a verb itself refuses that.
      exact: leaves the arguments as they are.
    """
    given = list(map(str, arguments))
    before, sys.argv = sys.argv, [verb.__name__, *(given if exact else _last_of_each(verb, given))]
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            command.run(verb.__name__.rpartition(".")[2], verb.__doc__, verb.define, verb.main)
    except SystemExit as stop:
        return stop.code or 0, errors.getvalue()
    finally:
        sys.argv = before
    return 0, errors.getvalue()


def _last_of_each(verb, arguments: list[str]) -> list[str]:
    values = flags.FlagValues()
    verb.define(values)
    several = {"import"} | {name for name in values if isinstance(values[name], flags.MultiFlag)}
    kept: dict[str, str] = {}
    for number, argument in enumerate(arguments):
        name = argument.partition("=")[0].removeprefix("--")
        kept[f"{number}" if name in several or "=" not in argument else name] = argument
    return list(kept.values())
