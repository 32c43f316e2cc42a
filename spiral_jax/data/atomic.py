"""Files that are there whole or not at all."""

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Writes a file beside `path` and renames it, so that a kill leaves the old content or the new, never a part."""
    scratch = path.with_name(f".{path.name}.partial")
    with scratch.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)
