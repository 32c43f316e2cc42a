"""A start that is refused leaves a run's directory as it found it."""

import contextlib
from types import TracebackType

from etils.epath import Path

from spiral_jax.errors import SpiralError


class NothingLeft:
    """Removes what a start made in a directory that had no run, and the directory if it was made too, if it is refused.

    with NothingLeft(workdir) as started:
        ...            what is raised here as a SpiralError is a refusal
        started.keep() from here on there is a run

    A directory with a run keeps all that is in it.
    """

    def __init__(self, workdir: Path, active: bool = True):
        """Looks at what is there.

        Args:
          workdir: absolute; need not exist.
          active: whether this process is the one that removes.
        """
        self._workdir = workdir
        self._made = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
        self._before: set[str] = set()
        with contextlib.suppress(OSError):  # it cannot be read, and will be refused
            self._before = {path.name for path in workdir.iterdir()} if workdir.is_dir() else set()
        has_run = bool(self._before & {"config.json", "checkpoints", "metrics.jsonl"})
        self._active = active and not has_run

    def keep(self) -> None:
        """Leaves everything where it is, whatever comes."""
        self._active = False

    def __enter__(self) -> "NothingLeft":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._active or not isinstance(error, SpiralError) or not self._workdir.is_dir():
            return
        with contextlib.suppress(OSError):  # the refusal is worth more than what cannot be removed
            for path in self._workdir.iterdir():
                # A preparation that was stopped by the machine, not by its input, goes on with what it left.
                goes_on = path.name == "cache" and any(path.glob(".*.partial"))
                if path.name not in self._before and not goes_on:
                    path.rmtree() if path.is_dir() else path.unlink()
            for folder in self._made:
                folder.rmdir()
