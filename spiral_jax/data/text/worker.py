"""A process that tokenises units: `python -m spiral_jax.data.text.worker`, which `data.text.pool` starts and talks to.

A program of its own and not a `multiprocessing` process, because those import the main module again: a script without
`if __name__ == "__main__"` would start itself, and one read from standard input cannot be imported.

Standard input has messages: a line of JSON and, if it says so, the content of the unit. The first one is the job, the
others are units. Standard output has a line of JSON per unit. At the end of input the process ends at once, whatever
it is doing: its parent is gone, or wants nothing more.
"""

import dataclasses
import json
import os
import queue
import sys
import threading
import traceback
from pathlib import Path
from typing import BinaryIO

from spiral_jax.data.text.parts import InvalidInput, Recipe, encode_unit
from spiral_jax.data.text.spans import Span
from spiral_jax.data.text.units import Unit
from spiral_jax.data.tokenizers import load_tokenizer
from spiral_jax.errors import SpiralError


def send(stream: BinaryIO, message: dict, content: bytes | None = None) -> None:
    """Writes a message."""
    size = None if content is None else len(content)
    stream.write(json.dumps({"message": message, "content_bytes": size}).encode() + b"\n")
    if content is not None:
        stream.write(content)
    stream.flush()


def receive(stream: BinaryIO) -> tuple[dict, bytes | None] | None:
    """Reads a message, or None at the end."""
    line = stream.readline()
    if not line.endswith(b"\n"):
        return None
    header = json.loads(line)
    size = header["content_bytes"]
    content = None if size is None else stream.read(size)
    return None if content is not None and len(content) < size else (header["message"], content)


def unit_message(unit: Unit) -> dict:
    """A unit without its content, as plain values."""
    return {
        "name": unit.name,
        "spans": [dataclasses.asdict(span) for span in unit.spans],
        "input_bytes": unit.input_bytes,
        "whole_file": unit.whole_file,
    }


def main() -> None:
    inbox: queue.SimpleQueue = queue.SimpleQueue()
    # A stray print must not get between the messages.
    results = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def read() -> None:
        while (received := receive(sys.stdin.buffer)) is not None:
            inbox.put(received)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    job, _ = inbox.get()
    tokenizer = load_tokenizer(job["tokenizer"])
    recipe, parts = Recipe(**job["recipe"]), Path(job["parts"])
    while True:
        message, content = inbox.get()
        spans = tuple(Span(**span) for span in message.pop("spans"))
        unit = Unit(spans=spans, content=content, **message)
        result = {"name": unit.name}
        try:
            encode_unit(unit, tokenizer, recipe, parts)
        except InvalidInput as error:
            result["invalid"] = dataclasses.asdict(error.invalid)
        except SpiralError as error:
            result["error"] = str(error)
        except Exception:
            result["defect"] = traceback.format_exc()
        send(results, result)


if __name__ == "__main__":
    main()
