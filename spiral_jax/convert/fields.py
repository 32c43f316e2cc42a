"""Reads the fields of a `config.json` with errors that name them."""

from collections.abc import Mapping
from typing import Any

from spiral_jax.errors import SpiralError

_KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "a text", list: "a list", dict: "an object"}


class Fields:
    """The fields of one JSON object; every mistake is a SpiralError "FILE: FIELD is ...; allowed: ..."."""

    def __init__(self, values: Mapping[str, Any], name: str):
        """`name` is what to call the object in errors: its file."""
        self._values, self._name = values, name

    def __contains__(self, field: str) -> bool:
        return self._values.get(field) is not None

    def read(self, field: str, kind: type, default: Any = None) -> Any:
        """The value of a field that must be there, unless there is a default, and of one type (int counts as float)."""
        if field not in self and default is not None:
            return default
        self.require(field in self, field, _KINDS[kind])
        value = self._values[field]
        is_kind = isinstance(value, int | float if kind is float else kind) and (
            kind is bool or not isinstance(value, bool)
        )
        self.require(is_kind, field, _KINDS[kind])
        return float(value) if kind is float else value

    def choose(self, field: str, allowed: tuple[str, ...]) -> str:
        """The value of a field that must be one of these texts."""
        self.require(self._values.get(field) in allowed, field, ", ".join(map(repr, allowed)))
        return self._values[field]

    def require(self, ok: bool, field: str, allowed: str) -> None:
        """Raises SpiralError about a field, unless `ok`."""
        if not ok:
            value = self._values.get(field)
            found = "missing" if value is None else repr(value)
            raise SpiralError(f"{self._name}: {field} is {found}; allowed: {allowed}")
