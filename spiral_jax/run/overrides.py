"""`--config.FIELD=VALUE` as people type it: texts without quotes of Python's, and None."""

import ast
import dataclasses
import types
import typing
from collections.abc import Sequence
from typing import Any

from spiral_jax.run.config import RunConfig

_PREFIX = "--config."
# Fields of names, in which a comma separates; in paths it may be part of one.
_NAMES = ("evaluation.tasks",)


def as_typed(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Arguments of a command line for ml_collections, which takes the value of a tuple for an expression of Python.

    A field of texts then gets the text that was typed, or the texts of a tuple in Python's notation.

    Returns:
      The arguments, and the fields that are given as None, which are left out of them.
    """
    kept: list[str] = []
    empty: list[str] = []
    left = list(arguments)
    while left:
        argument = left.pop(0)
        name, equals, value = argument.partition("=")
        name = f"-{name}" if name.startswith("-config.") else name
        field = name.removeprefix(_PREFIX)
        hint = _hint(field) if name.startswith(_PREFIX) else None
        is_texts, may_be_none = hint == tuple[str, ...], isinstance(hint, types.UnionType)
        if (is_texts or may_be_none) and not equals and left:
            value, equals = left.pop(0), "="
        if may_be_none and value == "None":
            empty.append(field)
        elif is_texts and equals:
            kept.append(f"{name}={_texts(value, separated=field in _NAMES)}")
        elif (is_texts or may_be_none) and equals:
            kept.append(f"{name}={value}")
        else:
            kept.append(argument)
    return kept, empty


def _texts(value: str, separated: bool) -> str:
    """What was typed for a field of texts, as a tuple in Python's notation."""
    try:
        meant = ast.literal_eval(value)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        meant = None
    if isinstance(meant, tuple | list):
        return value
    text = meant if isinstance(meant, str) else value
    texts = [part.strip() for part in text.split(",")] if separated else [text]
    return repr(tuple(filter(None, texts)))


def _hint(field: str) -> Any:
    """The annotated type of a field; None if there is no such field."""
    hint: Any = RunConfig
    for name in field.split("."):
        if not dataclasses.is_dataclass(hint):
            return None
        hint = typing.get_type_hints(hint).get(name)
    return hint
