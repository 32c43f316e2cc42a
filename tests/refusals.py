"""A verb on bad input: whether it says so in one line, leaves every file as it was, and takes little memory."""

import contextlib
import hashlib
import io
import resource
import sys
from pathlib import Path

from verbs import call

# Above what the process has already: the same verb on a small good input takes some of this, too.
MOST_BYTES = 500e6


def refused(verb, arguments, words, root: Path) -> str:
    """Runs `python -m spiral_jax.VERB ARGUMENTS` in this process and returns its line.

    Args:
      verb: the module.
      arguments: of the command line.
      words: what the line has to contain, a text or several.
      root: the folder in which no file may be changed, made or removed.
    """
    sys.modules.pop("config_config", None)  # ml_collections would keep the functions of the file before
    before, floor = tree(root), reset_peak()
    with contextlib.redirect_stdout(io.StringIO()):
        status, errors = call(verb, *arguments, exact=True)
    peak = peak_bytes()
    assert status == 2, (status, errors)
    assert errors.startswith("error: ") and errors.count("\n") == 1 and errors.endswith("\n"), errors
    for word in (words,) if isinstance(words, str) else words:
        assert word in errors, errors
    assert tree(root) == before
    assert peak - floor < MOST_BYTES, f"{(peak - floor) / 1e6:.0f} MB"
    return errors


def tree(root: Path) -> dict[str, tuple]:
    """Every file and folder below a folder, with what would tell that it was changed."""
    found = {}
    for path in sorted(root.rglob("*")):
        status, content, written = path.lstat(), "", 0
        if path.is_file() and path.name != ".lock":  # which names its newest owner
            content, written = hashlib.sha256(path.read_bytes()).hexdigest(), status.st_mtime_ns
        found[str(path.relative_to(root))] = content, status.st_mode, written
    return found


def reset_peak() -> int:
    """The bytes of memory that are in use, from which on the peak is measured."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return peak_bytes()


def peak_bytes() -> int:
    """The most bytes of memory that this process had since `reset_peak`, or ever where the system cannot say."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
