"""JSON files: the one way to read and to write them."""

import codecs
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

from etils import epath

from spiral_jax.data.atomic import write_text
from spiral_jax.data.bucket import refusals
from spiral_jax.data.plain_text import decoded
from spiral_jax.errors import SpiralError

# Parsed, JSON can take a hundred times its bytes. A configuration has some thousand, an index of tensors some million.
MAX_CONFIG_BYTES = 2**20
_MAX_BYTES = 2**24


def read_json(path: Path | epath.Path, allowed: str = "JSON", max_bytes: int = _MAX_BYTES) -> Any:
    """What a UTF-8 file of JSON holds.

    Args:
      path: the file.
      allowed: what it should hold, for errors.
      max_bytes: the most that are read.

    Raises:
      SpiralError: the file does not exist, cannot be read, is too large, or is not JSON; `Unreachable` if a bucket
        does not answer.
    """
    with refusals(path, lambda why: f"{path} cannot be read ({why}); allowed: {allowed}"):
        try:
            with path.open("rb") as file:
                content = file.read(max_bytes + 1)
        except FileNotFoundError:
            raise SpiralError(f"{path} does not exist; allowed: a file with {allowed}") from None
    if len(content) > max_bytes:
        raise SpiralError(f"{path} has more than {max_bytes} bytes; allowed: {allowed} of at most so many")
    try:
        return json.loads(decoded(content))
    except (ValueError, RecursionError) as error:
        raise SpiralError(f"{path} is not JSON ({error}); allowed: {allowed}") from None


def read_json_object(path: Path | epath.Path, max_bytes: int = _MAX_BYTES) -> dict[str, Any]:
    """The fields of the JSON object that a UTF-8 file holds; `max_bytes` as for `read_json`.

    Raises:
      SpiralError: as for `read_json`, or it is JSON but no object.
    """
    values = read_json(path, "a JSON object", max_bytes)
    if not isinstance(values, dict):
        found = "an array" if isinstance(values, list) else "a single value"
        raise SpiralError(f"{path} is {found}; allowed: a JSON object")
    return values


def finite(value: Any) -> Any:
    """The same with None for numbers that are not finite, as JSON has none for them.

    Args:
      value: JSON values, also within dictionaries, lists and tuples.
    """
    if isinstance(value, dict):
        return {name: finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def for_stdout(text: str) -> str:
    """JSON as it can be printed: escaped where standard output is not UTF-8, as it would be in an older locale."""
    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    if codecs.lookup(encoding).name == "utf-8":
        return text
    return re.sub(r"[^\x00-\x7f]", lambda found: json.dumps(found[0])[1:-1], text)


def write_json(path: Path | epath.Path, values: Any) -> None:
    """Writes a JSON file, indented, whole or not at all.

    Raises:
      SpiralError: it cannot be written.
    """
    write_text(path, json.dumps(values, indent=2) + "\n")
