"""Runs one section: python -m tpu.first_hour.section NAME SIZE WORKDIR RESULT. What `__main__` starts, one at a time.

Writes {"checks", "measured", "why"} to the file RESULT, again with every line that it says, so that what was found by
then survives a crash. If the section raises an error, `why` says which.
"""

import importlib
import json
import sys
from pathlib import Path

from absl import logging

from spiral_jax.data import atomic
from tpu.first_hour.agenda import SECTIONS
from tpu.first_hour.findings import Findings


def main(name: str, size: str, workdir: str, result: str) -> int:
    """The exit status: 0 if the section came to its end, whatever it found."""
    logging.set_verbosity(logging.ERROR)  # orbax logs every step of a save
    section = next(section for section in SECTIONS if section.name == name)

    def write(why: str) -> None:
        found = {"checks": findings.checks, "measured": findings.measured, "why": why}
        atomic.write_text(Path(result), json.dumps(found))

    def say(line: str) -> None:
        print(line, flush=True)
        write("")

    findings, why = Findings(say), ""
    try:
        importlib.import_module(f"tpu.first_hour.{section.module}").run(findings, size, workdir, section.argument)
    except Exception as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:1000]}"
        raise
    finally:
        write(why)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
