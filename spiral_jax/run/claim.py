"""Who may write a run's directory: one process, and on several the processes of one start."""

import contextlib
import uuid
from collections.abc import Iterator

from etils.epath import Path

from spiral_jax.data.bucket import is_bucket
from spiral_jax.parallel.leaving import End, end_at_once
from spiral_jax.parallel.processes import ALONE, Processes
from spiral_jax.run.bucket_hold import BucketHold
from spiral_jax.run.disk_hold import DiskHold
from spiral_jax.run.hold import Hold


@contextlib.contextmanager
def claim(workdir: Path, processes: Processes = ALONE, end: End = end_at_once) -> Iterator[Hold]:
    """Holds a run's directory, so that two starts do not write one run.

    Args:
      workdir: of the run.
      processes: of this start; process 0 takes the directory for all.
      end: as for `Hold`.

    Raises:
      SpiralError: another process holds it.
    """

    def take() -> str:
        held.take()
        return owner

    owner = uuid.uuid4().hex
    kind = BucketHold if is_bucket(workdir) else DiskHold
    held: Hold = kind(workdir, owner, end)
    theirs = processes.from_main("the claim", take)
    if theirs != owner:
        held = kind(workdir, theirs, end)
    held.keep()
    try:
        yield held
    finally:
        held.release()
