"""What to do next with a job and its slice: a pure function of what is remembered and what is seen.

    absent -> creating -> present -> deleting -> absent ... -> ended

`decide` is called again and again, by whatever launcher is alive. It says one thing to do, and what to remember
*before* that is done; so a launcher that was killed in between finds on the bucket what may have happened.
"""

import dataclasses
import enum
from dataclasses import replace

from tpu.job import Job
from tpu.memory import Memory
from tpu.providers import Observation, State

# Seconds:
LOOK = 30  # between two looks
LANDS = 120  # until a create that was sent shows in answers
SETTLES = 90  # in which the end of a job may turn out to have been the end of its slice
LEAVES = 300  # that a deletion takes, and after which it is sent again
SILENCE = 600  # without a sign of life of some host
LIVED = 900  # of training, after which trouble is a new one
WORTH = 600  # that a slice must be able to live to be worth creating

DECISIVE = {0: "finished", 2: "something that only you can mend", 44: "diverged"}


class Action(enum.Enum):
    CREATE = "create"
    DELETE = "delete"
    START = "start"  # set up, test and start the job on all hosts
    WAIT = "wait"
    END = "end"


@dataclasses.dataclass(frozen=True)
class JobStatus:
    """What the hosts of an attempt have written.

    Attributes:
      known: whether the bucket could be read.
      stop: whether `stop` was asked for.
      beat: the oldest of the hosts' last signs of life; 0 while some host has given none.
      ended: whether the job has ended on some host, and `all_ended` on all of them.
      status: with which it ended where that was first; None for a death without one.
      line: of that host, `host 3: ...`; before an end, how many hosts are in which state.
      kernel: the last lines of its kernel, after a silent death.
    """

    known: bool = True
    stop: bool = False
    beat: float = 0
    ended: bool = False
    all_ended: bool = False
    status: int | None = None
    line: str = ""
    kernel: tuple[str, ...] = ()

    def runs(self, now: float) -> bool:
        """Whether the attempt is known to run: all hosts have given a sign of life not long ago."""
        return self.beat > now - SILENCE and not self.ended


@dataclasses.dataclass(frozen=True)
class Decision:
    """What to remember, what to do then, for how long at most to wait, and what to tell the user."""

    memory: Memory
    action: Action
    seconds: float = LOOK
    lines: tuple[str, ...] = ()


def decide(job: Job, memory: Memory, seen: Observation, status: JobStatus, now: float) -> Decision:
    """The next step.

    Args:
      job: the launch.
      memory: what the last decision, or what came of it, left.
      seen: the slice.
      status: of the attempt `memory.attempt`.
      now: Unix time.
    """
    if memory.phase == "ended":
        return Decision(memory, Action.END)
    m = _counted(job, memory, seen, status, now)
    if seen.ours is None and memory.phase == "creating" and now - m.asked < LANDS:
        return _wait(m)  # it may be what was asked for, or somebody else's
    is_known = memory.phase == "present" or (memory.phase == "deleting" and bool(memory.deleted or memory.started))
    if not (seen.ours or (seen.ours is None and is_known)):
        return Decision(replace(m, phase="ended", kept=seen.ours is None, ending=not_ours(job), result=2), Action.END)
    if not m.ending:
        m = _ending(job, m, seen, status, now)
    if m.ending:
        if m.result == 0 and not job.delete_at_success:
            return Decision(replace(m, phase="ended", kept=True), Action.END)
        return _torn_down(m, seen, now)
    if seen.state is State.UNKNOWN or not status.known:
        return _wait(m)  # above all, nothing is created: the slice may be there, the job may have finished
    if m.phase == "deleting" and seen.state is not State.GONE:
        return _deleted(m, now) if now - m.deleted >= LEAVES else _wait(m)
    landing = seen.state is State.GONE and m.phase == "creating" and now - m.asked < LANDS
    if status.stop and not landing and (status.all_ended or not m.started):
        m = replace(m, phase="ended", kept=seen.state is not State.GONE)
        return Decision(replace(m, ending="stopped, as `stop` asked", result=42), Action.END)
    if seen.state in (State.GONE, State.LOST) and m.started and m.beat_seen == now and status.runs(now):
        return _wait(m)  # its hosts have just spoken: one answer may be wrong, and two are not
    if seen.state is State.GONE:
        return _absent(job, m, now)
    if m.phase == "creating":
        m = replace(m, resume_at=0)  # it was for another create, should this one not have come true
    m = replace(m, phase="present", kept=False, unheard=0)
    if seen.state is State.LOST:
        return _lost(job, m, seen, now)
    if seen.state is State.READY:
        return _ready(job, m, status, now)
    return _wait(replace(m, repaired=m.repaired or seen.state is State.TRANSIENT))


def not_ours(job: Job) -> str:
    """What to say where somebody else has a slice of that name."""
    return f"{job.name} is there and is not labelled as that of {job.root}; allowed: another NAME"


def not_created(job: Job, memory: Memory, kind: str, line: str, now: float) -> tuple[Memory, tuple[str, ...]]:
    """What came of a create that failed, as a GcloudError says it by its kind and in a line; and what to say of it."""
    if kind == "exists":
        return memory, ()
    if kind == "denied":
        return replace(memory, phase="ended", ending=line, result=2), ()
    if kind == "invalid":
        return replace(memory, ending=line, result=2), ()
    if kind == "capacity":
        return replace(memory, phase="absent", resume_at=now + LOOK), (line,)
    if kind == "quota":
        # What is still being given back counts against it for a while; what was never granted does so for ever.
        m = replace(memory, phase="absent", refused=memory.refused + 1, resume_at=now + _pause(memory.refused + 1))
        is_never = m.refused > max(job.max_failures, 1)
        return (replace(m, ending=line, result=2) if is_never else m), (line,)
    m = replace(memory, unheard=memory.unheard + 1, resume_at=now + _pause(memory.unheard + 1))
    return m, (f"not known whether the slice was created: {line}",)


def started(memory: Memory, trouble: str, now: float) -> Memory:
    """What came of a start: `trouble` is a line, empty if all hosts run."""
    return replace(
        memory, starting=False, started=now, trouble=trouble, beat_seen=now, ended_seen=now if trouble else 0
    )


def not_deleted(memory: Memory, now: float) -> Memory:
    """What came of a deletion that failed: it is soon sent again."""
    return replace(memory, deleted=now - LEAVES + LOOK)


def affordable(job: Job, memory: Memory) -> float:
    """Seconds that all chips may go on billing until the cap, a deletion's time set apart."""
    if job.max_chip_hours is None:
        return float("inf")
    return (job.max_chip_hours * 3600 - memory.chip_seconds) / job.chips - LEAVES


def _counted(job: Job, m: Memory, seen: Observation, status: JobStatus, now: float) -> Memory:
    """With the chip-seconds since the last look, and signs of life."""
    if seen.ours is not False and (m.billing or seen.billing):
        # Nobody may have looked for days while it stood in the queue.
        since = m.looked if m.billing else max(m.looked, seen.since or now - LOOK)
        m = replace(m, chip_seconds=m.chip_seconds + job.chips * max(now - since, 0))
    m = replace(m, looked=now, billing=m.billing if seen.billing is None else seen.billing)
    if status.beat != m.beat:
        m = replace(m, beat=status.beat, beat_seen=now)
    return replace(m, ended_seen=now) if status.ended and not m.ended_seen else m


def _ending(job: Job, m: Memory, seen: Observation, status: JobStatus, now: float) -> Memory:
    """With the reason why everything ends, if there is one that holds whatever the slice is."""
    all_in = status.all_ended or now - m.ended_seen >= SETTLES or seen.state is not State.READY
    is_mended = bool(status.status) and m.attempt <= m.mended
    if m.attempt and status.ended and status.status in DECISIVE and all_in and not is_mended:
        return replace(m, ending=f"{DECISIVE[status.status]} ({status.line})", result=status.status)
    if (m.billing or m.phase == "present") and affordable(job, m) <= LOOK:
        return _capped(job, m)
    return m


def _capped(job: Job, m: Memory) -> Memory:
    spent = f"{m.chip_seconds / 3600:.1f} chip-hours are spent"
    return replace(m, ending=f"{spent}; allowed: a larger --max_chip_hours than {job.max_chip_hours:g}", result=2)


def _torn_down(m: Memory, seen: Observation, now: float) -> Decision:
    """Towards the end: nothing may be left."""
    if seen.state is State.GONE:
        return _wait(m) if now - m.asked < LANDS else Decision(replace(m, phase="ended", kept=False), Action.END)
    return _deleted(m, now) if m.phase != "deleting" or now - m.deleted >= LEAVES else _wait(m)


def _absent(job: Job, m: Memory, now: float) -> Decision:
    """There is explicitly no slice."""
    lines: tuple[str, ...] = ()
    if now - m.asked < LANDS and m.phase == "creating":
        return _wait(m)
    if m.phase == "present":
        if job.provider == "qr":  # the service suspends, it does not delete
            return Decision(replace(m, phase="ended", ending="the slice was deleted by hand", result=2), Action.END)
        m, lines = _interruption(job, m, "the node is not there any more", now)
    m = replace(m, phase="absent", started=0, starting=False, kept=False)
    if m.ending:
        return Decision(replace(m, phase="ended"), Action.END, lines=lines)
    if now < m.resume_at:
        return _wait(m, m.resume_at - now, lines)
    if affordable(job, m) < LOOK + WORTH:
        return Decision(replace(_capped(job, m), phase="ended"), Action.END, lines=lines)
    return Decision(replace(m, phase="creating", asked=now, repaired=False), Action.CREATE, lines=lines)


def _lost(job: Job, m: Memory, seen: Observation, now: float) -> Decision:
    """The slice never comes back: delete what is left of it, then create."""
    why = ": ".join(filter(None, [seen.words, seen.message]))
    lines: tuple[str, ...] = ()
    if seen.by_user:
        m = replace(m, ending=f"the slice was taken away by hand: {why}", result=2)
    elif seen.capacity:
        m, lines = _interruption(job, m, f"preempted: {why}", now)
    else:
        m, lines = _failure(job, m, why, now)
    return _deleted(replace(m, started=0, starting=False), now, lines)


def _ready(job: Job, m: Memory, status: JobStatus, now: float) -> Decision:
    """The slice can be worked on."""
    if not m.started:
        if now < m.resume_at:
            return _wait(m, m.resume_at - now)
        if m.starting and status.runs(now):  # of a launcher that died while it told the hosts
            return _wait(started(m, "", now), lines=(f"attempt {m.attempt} runs already",))
        m = replace(m, attempt=m.attempt + 1, starting=True, trouble="", repaired=False)
        m = replace(m, beat=0, beat_seen=now, ended_seen=0)
        return Decision(m, Action.START, lines=(f"attempt {m.attempt}: set-up, smoke test, start",))
    if m.trouble and status.beat and not status.ended:
        m = replace(m, trouble="", ended_seen=0)  # all hosts have answered since
    if m.trouble or status.ended:
        if now - m.ended_seen < SETTLES:
            return _wait(m)  # whether the slice is on its way out
        if not m.trouble and status.status == 42:
            m, lines = _interruption(job, m, f"saved but unfinished ({status.line})", now)
        elif m.repaired:
            m, lines = _interruption(job, m, f"a node was repaired ({m.trouble or status.line})", now)
        else:
            line = m.trouble or status.line
            m, lines = _failure(job, m, line, now, fault=not m.trouble and status.status == 1)
            lines = (*lines, *(f"  kernel: {text}" for text in status.kernel))
    elif now - m.beat_seen >= SILENCE:
        line = f"no sign of life of some host for {SILENCE // 60} minutes"
        m, lines = (_interruption if m.repaired else _failure)(job, m, line, now)
    else:
        return _wait(m)
    if m.ending:
        return _deleted(m, now, lines)
    return _wait(replace(m, started=0), max(m.resume_at - now, 0), lines)


def _interruption(job: Job, m: Memory, why: str, now: float) -> tuple[Memory, tuple[str, ...]]:
    """Counted as a preemption."""
    m = _later(replace(m, preemptions=m.preemptions + 1), now)
    line = f"interruption {m.preemptions} (at most {job.max_preemptions} are taken): {why}"
    if m.preemptions > job.max_preemptions:
        m = replace(m, ending=f"{line}; allowed: a larger --max_preemptions", result=42)
    return m, (line,)


def _failure(
    job: Job, m: Memory, why: str, now: float, fault: bool = False, result: int = 1
) -> tuple[Memory, tuple[str, ...]]:
    """Counted as a failure; a `fault` (status 1) is tried once again only."""
    m = _later(replace(m, failures=m.failures + 1, faults=m.faults + fault), now)
    line = f"failure {m.failures} (at most {job.max_failures} are taken): {why}"
    if m.failures > job.max_failures or m.faults > 1:
        reason = "a fault of ours, twice" if m.faults > 1 else "allowed: a larger --max_failures"
        m = replace(m, ending=f"{line}; {reason}", result=result)
    return m, (line,)


def _later(m: Memory, now: float) -> Memory:
    """With a pause that doubles from 30 seconds to half an hour while nothing lasts."""
    lived = m.started and now - m.started >= LIVED
    streak = 1 if lived else m.streak + 1
    return replace(m, streak=streak, resume_at=now + _pause(streak))


def _pause(times: int) -> float:
    return min(30 * 2 ** min(times - 1, 6), 1800)


def _deleted(m: Memory, now: float, lines: tuple[str, ...] = ()) -> Decision:
    return Decision(replace(m, phase="deleting", deleted=now), Action.DELETE, lines=lines)


def _wait(m: Memory, seconds: float = LOOK, lines: tuple[str, ...] = ()) -> Decision:
    return Decision(m, Action.WAIT, min(seconds, LOOK), lines)
