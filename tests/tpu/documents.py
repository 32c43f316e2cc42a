"""Documents that are checked against a schema."""

from collections.abc import Sequence
from typing import Any


def put_at(document: Any, path: Sequence[str | int], value: Any) -> None:
    """Puts a value into nested dicts and lists, where the path of keys leads."""
    *above, last = path
    for key in above:
        document = document[key]
    document[last] = value
