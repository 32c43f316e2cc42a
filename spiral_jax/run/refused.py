"""A start that is refused leaves a run's directory as it found it."""

import contextlib
from collections.abc import Iterator
from types import TracebackType

from etils.epath import Path

from spiral_jax.data.bucket import despite_trouble, is_bucket, is_folder, remove
from spiral_jax.errors import SpiralError, Unreachable
from spiral_jax.run.hold import Hold

_LOCK = ".lock"


class NothingLeft:
    """Removes what a start made in a directory that had no run, and the directory if it was made too, if it is refused.

    with NothingLeft(workdir) as started:
        make_workdir(workdir)
        with claim(workdir) as hold, started.claimed(hold):
            ...             what is raised up to here as a SpiralError is a refusal
            started.keep()  from here on there is a run

    A directory with a run keeps all that is in it, and so does one that another process has claimed.
    """

    def __init__(self, workdir: Path, is_main: bool = True):
        """Looks at what is there.

        Args:
          workdir: absolute; need not exist.
          is_main: whether this process is the one that removes files.
        """
        self._workdir = workdir
        # On a bucket there are no folders, but what is in them.
        above = () if is_bucket(workdir) else (workdir, *workdir.parents)
        self._made = [folder for folder in above if not folder.exists()]
        self._has_lock = (workdir / _LOCK).exists()
        self._is_main = is_main
        self._kept = False

    def keep(self) -> None:
        """Leaves everything where it is, whatever comes."""
        self._kept = True

    @contextlib.contextmanager
    def claimed(self, hold: Hold) -> Iterator[None]:
        """While nobody else writes in the directory: removes what was made in the block, if it ends by a refusal."""
        before = {path.name for path in self._workdir.iterdir()} if self._is_main else set()
        has_run = bool(before & {"config.json", "checkpoints", "metrics.jsonl"})
        try:
            yield
        except Unreachable:  # no refusal: what has been copied to a bucket is gone on with
            raise
        except SpiralError:
            if self._is_main and not has_run and not self._kept:
                with despite_trouble():  # the refusal is worth more than what cannot be removed
                    self._remove(before if self._has_lock else before - {_LOCK}, hold)
            raise

    def _remove(self, before: set[str], hold: Hold) -> None:
        # The lock last: as long as it is there, nobody else begins.
        for path in sorted(self._workdir.iterdir(), key=lambda path: path.name == _LOCK):
            # A preparation that was stopped by the machine, not by its input, goes on with what it left.
            goes_on = path.name == "cache" and any(path.glob(".*.partial"))
            if path.name in before or goes_on:
                continue
            if path.name == _LOCK:
                hold.remove()
            else:
                path.rmtree() if is_folder(path) else remove(path)

    def __enter__(self) -> "NothingLeft":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, SpiralError) and not isinstance(error, Unreachable) and not self._kept:
            # As epath says where one holds something: it stays.
            with despite_trouble(), contextlib.suppress(ValueError):
                for folder in self._made:
                    folder.rmdir()
