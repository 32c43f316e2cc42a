"""What outlives the launcher: an object on the bucket, which one launcher at a time may write."""

import dataclasses
import json
import os
import socket
import time
from collections.abc import Callable

from spiral_jax.errors import SpiralError
from tpu.bucket import Bucket, Conflict

MEMORY = "launch.json"
HELD = 120  # seconds that a launcher is believed to live on


@dataclasses.dataclass(frozen=True)
class Memory:
    """What outlives the launcher, on the bucket.

    Attributes:
      owner: the launcher that holds it, `until` a Unix time, if it does not say so again before.
      where: zone, provider and accelerator of the slice.
      phase: absent, creating, present, deleting or ended.
      asked: when the last create was sent, and `deleted` the last deletion.
      attempt: the last one.
      starting: its hosts are being told, or the launcher died meanwhile.
      started: when its hosts had been told on this slice; 0 before.
      trouble: why they could not be told.
      failures: of the job and of requests, `faults` those with status 1 among them.
      preemptions: and other interruptions that are no failures.
      streak: of failures and preemptions in a row, with little training between.
      refused: creates in a row that a quota did not allow; `unheard`, of which nothing is known.
      resume_at: before which nothing is begun.
      chip_seconds: that have billed, as far as was seen.
      looked: when they were last counted.
      billing: whether chips billed then.
      beat: of the host that spoke last longest ago, by its clock; `beat_seen`, when that changed, by ours.
      ended_seen: when the end of the attempt was first seen.
      repaired: the slice was not usable for a while since the attempt began.
      kept: the end has left a slice.
      mended: attempts up to this one ended in a way that is mended since, as somebody started the job again.
      ending: why everything ends; empty while it does not.
      result: exit status of the launcher then.
    """

    owner: str = ""
    until: float = 0
    where: str = ""
    phase: str = "absent"
    asked: float = 0
    deleted: float = 0
    attempt: int = 0
    starting: bool = False
    started: float = 0
    trouble: str = ""
    failures: int = 0
    faults: int = 0
    preemptions: int = 0
    streak: int = 0
    refused: int = 0
    unheard: int = 0
    resume_at: float = 0
    chip_seconds: float = 0
    looked: float = 0
    billing: bool = False
    beat: float = 0
    beat_seen: float = 0
    ended_seen: float = 0
    repaired: bool = False
    kept: bool = False
    mended: int = 0
    ending: str = ""
    result: int = 0

    @property
    def may_have_slice(self) -> bool:
        """Whether there may be a slice, for all that is remembered."""
        return self.kept or self.phase not in ("absent", "ended")


class Taken(SpiralError):
    """Another launcher holds the job."""


@dataclasses.dataclass
class Store:
    """The memory, on the bucket. Of two launchers that write it one is told.

    Attributes:
      bucket: of the job, at its root.
      owner: this launcher; empty where nothing is written.
      clock: of Unix time.
      generation: of the object that was read or written last.
    """

    bucket: Bucket
    owner: str = ""
    clock: Callable[[], float] = time.time
    generation: int = 0

    def load(self) -> Memory:
        """What is remembered, by whomever.

        Raises:
          SpiralError: it cannot be read, or another version of the launcher wrote it.
        """
        found = self.bucket.get(MEMORY)
        try:
            memory = Memory(**json.loads(found[0])) if found else Memory()
        except (ValueError, TypeError) as error:
            raise SpiralError(
                f"{MEMORY} is of another version ({error}); allowed: the launcher that wrote it"
            ) from None
        self.generation = found[1] if found else 0
        return memory

    def save(self, memory: Memory, seconds: float = HELD) -> Memory:
        """Writes it, and says that this launcher lives on for a while: for no time, if the next one may go on at once.

        Raises:
          Taken: another launcher has written it since; nor is it written by this one later.
          Unreachable: the bucket cannot be reached.
        """
        owner = self.owner if seconds else ""
        memory = dataclasses.replace(memory, owner=owner, until=self.clock() + seconds if seconds else 0)
        for last in (False, True):
            try:
                self.generation = self.bucket.put(MEMORY, vars(memory), self.generation)
                break
            except Conflict:
                before = self.generation
                writer = self.load().owner
                # Once it may have been we, whom the answer did not reach.
                if last or not self.owner or writer != self.owner:
                    self.generation = before  # so that nothing of ours replaces theirs later, either
                    raise Taken(f"{MEMORY} was written by another launcher ({writer or 'unknown'})") from None
        return memory


def this_launcher() -> str:
    """A name for this process that no other has."""
    return f"{socket.gethostname()}:{os.getpid()}:{os.urandom(4).hex()}"


def held(memory: Memory, now: float) -> bool:
    """Whether a launcher that is not known to be dead holds the job."""
    host, _, rest = memory.owner.partition(":")
    if not host or memory.until < now:
        return False
    if host != socket.gethostname():
        return True
    try:
        os.kill(int(rest.partition(":")[0]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
