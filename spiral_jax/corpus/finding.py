"""Which files a path, a folder or a pattern names, in an order that depends on names alone.

Links to folders are followed, wherever they are met, and a folder that is reached in several ways counts once: links
that lead in circles end.
"""

import glob
import os
from collections.abc import Iterator
from pathlib import Path

from spiral_jax.errors import SpiralError

_ALLOWED = "allowed: files, folders, glob patterns"


def find_files(given: str, field: str) -> list[tuple[Path, Path]]:
    """The files that a path names, in order of their names, each with the folder that its name is relative to.

    Hidden files, hidden folders and `__pycache__` are passed over in folders and patterns; a hidden file named outright
    is taken.

    Args:
      given: a file, a folder or a glob pattern.
      field: what to call it in errors.

    Raises:
      SpiralError: there is no such thing, it holds no file, or a folder cannot be read.
    """
    path = Path(os.path.abspath(os.path.expanduser(given)))
    root, what = path, "a folder without files"
    if path.is_dir():
        found = [file for folder, names in folders_below(path, field) for file in _regular(folder, names)]
    elif path.is_file():
        root, found = path.parent, [path]
    elif path.exists():
        raise SpiralError(f"{field} is {given!r}, neither a file nor a folder; {_ALLOWED}")
    elif glob.has_magic(given):
        root, what = path, "a pattern that matches no file"
        while glob.has_magic(str(root)):
            root = root.parent
        matches = dict.fromkeys(_matching(path, field))
        found = [match for match in matches if match.is_file() and "__pycache__" not in match.relative_to(root).parts]
    else:
        raise SpiralError(f"{field} is {given!r}, which does not exist; {_ALLOWED}")
    if not found:
        raise SpiralError(f"{field} is {given!r}, {what}; allowed: paths with at least one text file")
    return [(root, file) for file in sorted(found, key=lambda file: file.relative_to(root).as_posix())]


def folders_below(root: Path, field: str) -> Iterator[tuple[Path, list[str]]]:
    """A folder and all those below it, each once, with the names of what is in it but folders.

    Folders that are reached without links come first, so that a link to them does not change what they are called.

    Raises:
      SpiralError: a folder cannot be read.
    """

    def stop(error: OSError) -> None:  # os.walk would pass over the folder without a word
        raise SpiralError(f"{field}: {error.filename} cannot be read ({error.strerror})") from error

    seen: set[tuple[int, int]] = set()
    roots = [root]
    while roots:
        links: list[Path] = []
        for start in sorted(roots):
            for folder, subfolders, names in os.walk(start, onerror=stop):
                status = os.stat(folder)
                if (status.st_dev, status.st_ino) in seen:
                    subfolders.clear()
                    continue
                seen.add((status.st_dev, status.st_ino))
                subfolders[:] = [name for name in subfolders if not _is_passed_over(name)]
                links += [Path(folder, name) for name in subfolders if os.path.islink(os.path.join(folder, name))]
                yield Path(folder), names
        roots = links


def _matching(pattern: Path, field: str) -> Iterator[Path]:
    """As `glob.glob` with `recursive=True`, but that `**` goes through links as `folders_below` does."""
    parts = pattern.parts
    head = parts[: parts.index("**")] if "**" in parts else parts
    tail = parts[len(head) + 1 :]
    for match in map(Path, glob.glob(str(Path(*head)))):
        if len(head) == len(parts):
            yield match
        elif match.is_dir():
            for folder, names in folders_below(match, field):
                if tail:
                    yield from _matching(Path(glob.escape(str(folder)), *tail), field)
                else:
                    yield from _regular(folder, names)


def _regular(folder: Path, names: list[str]) -> list[Path]:
    """The files among what is in a folder: no hidden ones, no sockets, pipes or dangling links."""
    files = (Path(folder, name) for name in names if not _is_passed_over(name))
    return [file for file in files if file.is_file()]


def _is_passed_over(name: str) -> bool:
    return name.startswith(".") or name == "__pycache__"
