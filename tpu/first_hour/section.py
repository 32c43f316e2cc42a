"""Runs one section: python -m tpu.first_hour.section NAME SIZE WORKDIR RESULT. What `__main__` starts, one at a time.

Writes {"checks", "measured", "why"} to the file RESULT. If the section breaks down, `why` says how, in a line.
"""

import importlib
import json
import sys
from pathlib import Path

from absl import logging

from tpu.first_hour.agenda import SECTIONS
from tpu.first_hour.findings import Findings


def main(name: str, size: str, workdir: str, result: str) -> int:
    """The exit status: 0 if the section came to its end, whatever it found."""
    logging.set_verbosity(logging.ERROR)  # orbax logs every step of a save
    section = next(section for section in SECTIONS if section.name == name)
    findings, why = Findings(lambda line: print(line, flush=True)), ""
    try:
        importlib.import_module(f"tpu.first_hour.{section.module}").run(findings, size, workdir, section.argument)
    except Exception as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:1000]}"
        raise
    finally:
        found = {"checks": findings.checks, "measured": findings.measured, "why": why}
        Path(result).write_text(json.dumps(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
