"""The commands on a page of documentation: what stands in its indented blocks."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

ROOT = Path(__file__).parents[1]


def commands(page: Path, program: str = "") -> list[list[str]]:
    """Argument lists, in order.

    Args:
      page: Markdown, whose code is indented by four; a line that ends in a backslash goes on.
      program: how those wanted begin, as in `python -m tpu.launch`.
    """
    code, joined = [], ""
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("    "):
            joined += line.strip()
            if joined.endswith("\\"):
                joined = joined[:-1]
                continue
            code.append(joined)
        joined = ""
    return [shlex.split(line, comments=True) for line in code if line.startswith(program)]


def lint(arguments: list[str]) -> str:
    """What gcloud's own grammar has against a command; nothing if it is right. Placeholders have to be values."""
    gcloud = shutil.which("gcloud")
    if gcloud is None:
        pytest.skip("gcloud is not installed")
    text = shlex.join(arguments)
    answer = subprocess.run(
        [gcloud, "meta", "lint-gcloud-commands", f"--command-string={text}"], capture_output=True, text=True
    )
    # It exits with 0 for bad commands, too.
    (found,) = json.loads(answer.stdout)
    return "" if found["success"] else f"{text}: {found.get('error_message', found)}"


def parse_verb(arguments: list[str]) -> flags.FlagValues:
    """The flags of `python -m spiral_jax.VERB ...`, parsed by the verb's own; an unknown one raises."""
    import importlib

    verb = importlib.import_module(arguments[2])
    values = flags.FlagValues()
    verb.define(values)
    before, sys.argv = sys.argv, arguments[2:]
    try:
        rest = values(arguments[2:])
    finally:
        sys.argv = before
    assert rest == [arguments[2]], rest
    return values
