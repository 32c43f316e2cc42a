"""Keeps a job on a slice until it has finished, or one of its caps ends everything. What to do, `decide.py` says."""

import contextlib
import dataclasses
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator

from spiral_jax.errors import SpiralError
from tpu import hosts
from tpu.bills import command_line, elsewhere, what_bills, where
from tpu.bucket import Bucket
from tpu.decide import (
    LOOK,
    Action,
    Decision,
    JobStatus,
    affordable,
    decide,
    not_created,
    not_deleted,
    not_ours,
    started,
)
from tpu.gcloud import GcloudError, shown
from tpu.host.report import STOP, attempt_folder
from tpu.job import Job
from tpu.memory import HELD, Memory, Store, Taken, held, this_launcher
from tpu.providers import Observation, Provider, State
from tpu.telling import tell

SET_UP = 900  # seconds for one, at most
_HOUR = 3600


def read_status(bucket: Bucket, job: Job, attempt: int) -> JobStatus:
    """What the hosts of an attempt have written. Of several ends the first decides."""
    try:
        stop = bucket.get(STOP) is not None
        if not attempt:
            return JobStatus(stop=stop)
        states = hosts.states(bucket, attempt)
        # Without it, what the hosts' own times say.
        first = bucket.read(f"{attempt_folder(attempt)}/first_exit.json")
    except SpiralError:  # credentials that ran out, too, may be renewed
        return JobStatus(known=False)
    beat = min(state["beat"] for state in states.values()) if len(states) == job.hosts else 0
    ends = [{**state, "host": host} for host, state in states.items() if state["state"] == "ended"]
    if not ends and first is None:
        counts = Counter(state["state"] for state in states.values())
        return JobStatus(stop=stop, beat=beat, line=", ".join(f"{n} {word}" for word, n in sorted(counts.items())))
    end = first or min(ends, key=lambda state: state["first_exit"] or state["beat"])
    how = "died silently" if end["status"] is None else f"exit status {end['status']}"
    return JobStatus(
        stop=stop,
        beat=beat,
        ended=True,
        all_ended=len(ends) == job.hosts,
        status=end["status"],
        line=f"host {end['host']}: {how}: {end['line']}",
        kernel=tuple(end["kernel"]),
    )


@dataclasses.dataclass
class Babysitter:
    """Looks, decides, remembers, acts, until there is nothing left to do.

    Attributes:
      provider: of the job's slice.
      bucket: of the job, at its root.
      bring_up: starts an attempt on all hosts, by its number, in so many seconds; a SpiralError or GcloudError says
        why not.
      say, clock, sleep, uniform: the world.
      owner: a name for this launcher that no other has.
    """

    provider: Provider
    bucket: Bucket
    bring_up: Callable[[int, float], None]
    say: Callable[[str], None] = tell
    clock: Callable[[], float] = time.time
    sleep: Callable[[float], None] = time.sleep
    uniform: Callable[[float, float], float] = random.uniform
    owner: str = dataclasses.field(default_factory=this_launcher)

    def __post_init__(self) -> None:
        self.job, self._gcloud = self.provider.job, self.provider.gcloud
        self.store = Store(self.bucket, self.owner, self.clock)
        self.memory, self._seen = Memory(), Observation(State.UNKNOWN, message="it was not asked")
        self._said, self._words = set[str](), ""
        self._blind = False  # a deletion that goes on without the bucket
        self._unusable = self._told = 0.0  # since when the slice is, and when that was said last

    def run(self) -> int:
        """Exit status: 0 finished, 42 unfinished, 1 failed, 2 what you can mend, 44 diverged, 130 interrupted.

        Raises:
          SpiralError: another launcher holds the job, or the slice is somewhere else.
        """
        try:
            self.memory = self._take()
        except BaseException as error:
            self.say_what_bills(look_again=True)
            if isinstance(error, KeyboardInterrupt):
                return 130
            raise
        return self._watch()

    def _watch(self) -> int:
        """The loop."""
        action = Action.WAIT
        try:
            while action is not Action.END:
                if self._blind:
                    self._recall()
                self._seen = self.provider.observe()
                decision = self._decide()
                self._act(decision)
                action = decision.action
        except Taken:  # the other one sees to what bills, if it still lives
            self.say_what_bills(look_again=True)
            raise
        except BaseException as error:
            self.say_what_bills(look_again=True)
            if isinstance(error, KeyboardInterrupt):
                self._release()
                return 130
            raise
        spent = f"{self.memory.chip_seconds / 3600:.1f} chip-hours, attempts: {self.memory.attempt}"
        self.say(f"the end: {self.memory.ending} ({spent})")
        self.say_what_bills()
        self._release()
        return self.memory.result

    def create(self) -> int:
        """Asks for the slice once, and leaves it to whoever watches next.

        Returns:
          0 if it is there or asked for, otherwise 2.
        """
        with self._holding():
            self._look()
            if self._seen.state is State.GONE:
                decision = self._decide()
                if decision.action is Action.CREATE:
                    self._act(decision)
                    if self.memory.ending:  # refused
                        self.say(self.memory.ending)
                        self.memory = dataclasses.replace(self.memory, phase="ended")
                self._seen = self.provider.observe()
            self.say_what_bills()
        coming = self._seen.state is State.GONE and self.memory.phase == "creating"
        return 0 if coming or self._seen.state in (State.WAITING, State.READY, State.TRANSIENT) else 2

    def start(self) -> int:
        """Starts an attempt once, unless one runs. Returns 0, or 1 if it could not be started."""
        with self._holding():
            self._look()
            if self._seen.state is not State.READY:
                raise SpiralError(f"{self.job.name} is {self._seen.words or 'not known'}; allowed: a READY slice")
            status, now = read_status(self.bucket, self.job, self.memory.attempt), self.clock()
            if (self.memory.started or self.memory.starting) and status.runs(now):
                self.say(f"attempt {self.memory.attempt} runs")
                return 0
            self.memory = dataclasses.replace(self.memory, phase="present", started=0, starting=False, resume_at=0)
            self._act(decide(self.job, self.memory, self._seen, JobStatus(), now))
            return 1 if self.memory.trouble or not self.memory.started else 0

    def delete(self) -> int:
        """Deletes the slice, whoever watches it, and waits until it is gone.

        Returns:
          0 if it is gone, 2 if not, 130 if interrupted.
        """
        self.job = dataclasses.replace(self.job, delete_at_success=True)
        for last in (False, False, False, True):
            try:
                memory = self.store.load()
            except SpiralError as error:
                self._forget(error)
                break
            memory = self.checked(memory)
            try:
                self.memory = self.store.save(self._to_delete(memory))
                break
            except Taken:  # its launcher has just written; after this it finds that it is held by another
                if last:
                    raise
            except SpiralError as error:
                self._forget(error)
                break
        return 130 if self._watch() == 130 else 0 if self._seen.state is State.GONE else 2

    def _forget(self, error: SpiralError) -> None:
        """Goes on with a deletion without the bucket, whatever is there."""
        self.say(f"what is remembered cannot be used: {error}")
        self.memory, self._blind = self._to_delete(Memory()), True

    def _recall(self) -> None:
        """After that, takes what is remembered as soon as it can be read."""
        deleted = self.memory.deleted
        with contextlib.suppress(SpiralError):
            memory = self._to_delete(self.store.load())
            if not elsewhere(self.job, memory):
                self.memory, self._blind = dataclasses.replace(memory, deleted=deleted, where=where(self.job)), False

    def _to_delete(self, memory: Memory) -> Memory:
        """A memory with which everything is deleted; what has finished stays so."""
        if memory.phase != "ended" or memory.result:
            memory = dataclasses.replace(memory, ending="deleted, as `delete` asked", result=2)
        return dataclasses.replace(memory, phase="deleting", deleted=0, kept=False)

    def _look(self) -> None:
        """Looks at the slice, which is the job's if it has labels or is remembered; SpiralError if it is not."""
        self._seen = self.provider.observe()
        if self._seen.ours is False or (self._seen.ours is None and self.memory.phase == "absent"):
            raise SpiralError(not_ours(self.job))

    def _decide(self) -> Decision:
        """What to do next, once the slice was looked at."""
        status = read_status(self.bucket, self.job, self.memory.attempt)
        decision = decide(self.job, self.memory, self._seen, status, self.clock())
        self._report(decision)
        return decision

    @contextlib.contextmanager
    def _holding(self) -> Iterator[None]:
        """No other launcher holds the job in the block; SpiralError if it has finished."""
        self.memory = self._take()
        try:
            if self.memory.phase == "ended":
                raise SpiralError(f"{self.job.name} has finished; allowed: another NAME, or an empty {self.job.root}")
            yield
        except BaseException:
            self.say_what_bills(look_again=True)
            raise
        finally:
            self._release()

    def _take(self) -> Memory:
        """The memory, once no other launcher holds it."""
        memory = self.store.load()
        if held(memory, self.clock()):
            seconds = memory.until - self.clock()
            self.say(f"{self.job.name} is held by {memory.owner}; if that is dead, this goes on in {seconds:.0f} s")
            before = memory
            while held(memory, self.clock()):
                self.sleep(LOOK)
                memory = self.store.load()
                if memory.until > before.until:
                    raise Taken(f"{self.job.name} is held by {memory.owner}; allowed: one launcher at a time")
        memory = self.checked(memory)
        if memory.phase == "ended" and memory.result:  # whoever starts it again wants it to go on
            memory = Memory(
                attempt=memory.attempt,
                mended=memory.attempt,
                where=memory.where,
                kept=memory.kept,
                chip_seconds=memory.chip_seconds,
                looked=memory.looked,
            )
        return self.store.save(memory)

    def checked(self, memory: Memory) -> Memory:
        """Raises SpiralError if its slice may be somewhere else."""
        self.memory, place = memory, where(self.job)
        if there := elsewhere(self.job, memory):
            name = self.job.name
            raise SpiralError(f"{name} is {place}; allowed, until it is deleted: {there}, where it has a slice")
        return dataclasses.replace(memory, where=place)

    def _act(self, decision: Decision) -> None:
        """Remembers, then acts; what cannot be remembered is not begun, only ended."""
        action = decision.action
        longest = {Action.CREATE: self.provider.create_seconds, Action.START: SET_UP}.get(action, 0)
        seconds = min(affordable(self.job, decision.memory), longest)
        try:
            self.memory = self.store.save(decision.memory, HELD + seconds)
        except SpiralError as error:
            if isinstance(error, Taken) and not self._blind:
                raise
            self.say(f"not remembered, so nothing new is begun: {error}")
            if action in (Action.END, Action.DELETE):
                self.memory = decision.memory
            action = action if action is Action.DELETE else Action.WAIT
        if action is Action.WAIT:
            # Who asks directly for chips asks at random moments, not all at once.
            self.sleep(decision.seconds * (self.uniform(1, 2) if self.memory.phase == "absent" else 1))
        elif action is Action.DELETE:
            self._delete()
        elif action is not Action.END:
            self._gcloud.deadline = self.clock() + seconds
            try:
                self._create() if action is Action.CREATE else self._start(seconds)
            finally:
                self._gcloud.deadline = float("inf")

    def _create(self) -> None:
        seconds = affordable(self.job, self.memory)
        self.say(f"creating: {shown(self._gcloud.command(*self.provider.create_command(seconds)))}")
        try:
            self.provider.create(seconds)
        except GcloudError as error:
            self.memory, lines = not_created(self.job, self.memory, error.kind, str(error), self.clock())
            for line in lines:
                self.say(line)
        else:
            self.memory = dataclasses.replace(self.memory, refused=0)

    def _start(self, seconds: float) -> None:
        trouble = ""
        try:
            self.bring_up(self.memory.attempt, seconds)
        except (SpiralError, GcloudError) as error:
            trouble = str(error)
            self.say(f"attempt {self.memory.attempt} could not be started: {trouble}")
        self.memory = started(self.memory, trouble, self.clock())

    def _delete(self) -> None:
        self.say(f"deleting: {shown(self._gcloud.command(*self.provider.delete_command()))}")
        try:
            self.provider.delete()
        except GcloudError as error:
            self.say(f"not deleted, tried again: {error}")
            self.memory = not_deleted(self.memory, self.clock())
        self.sleep(LOOK)

    def _report(self, decision: Decision) -> None:
        """What is new."""
        seen = self._seen
        if seen.words != self._words or seen.state is State.UNKNOWN:
            self._words = seen.words
            what = f"{seen.words or 'the slice'}: {seen.state.value}"
            spent = f" ({decision.memory.chip_seconds / 3600:.1f} chip-hours)"
            self.say(what + spent + (f": {seen.message}" if seen.message and seen.state is not State.GONE else ""))
        self._say_how_long_unusable()
        if decision.memory.ending and not self.memory.ending:
            self.say(f"ending: {decision.memory.ending}")
        new = [f"symptom: {symptom}" for symptom in seen.symptoms if symptom not in self._said]
        for line in (*new, *decision.lines):
            self.say(line)
        self._said.update(seen.symptoms)

    def _say_how_long_unusable(self) -> None:
        """Every hour: a pod may be weeks of queue, so only its owner can say that it has waited long enough."""
        now = self.clock()
        if self._seen.state not in (State.TRANSIENT, State.UNKNOWN):
            self._unusable = 0.0
        elif not self._unusable:
            self._unusable = self._told = now
        elif now - self._told >= _HOUR:
            self._told, hours = now, (now - self._unusable) / _HOUR
            self.say(f"for {hours:.0f} hours now, and it may bill; to give it up: {command_line(self.job, 'delete')}")

    def say_what_bills(self, look_again: bool = False) -> None:
        """Says it.

        Args:
          look_again: whether the cloud is asked before.
        """
        try:
            self._seen = self.provider.observe() if look_again else self._seen
        except BaseException:  # Ctrl-C, once more
            self._seen = dataclasses.replace(self._seen, state=State.UNKNOWN, billing=None)
        self.say(what_bills(self.job, self._seen, self.memory, self.clock()))

    def _release(self) -> None:
        with contextlib.suppress(SpiralError):  # then the next launcher waits for two minutes
            self.store.save(self.memory, seconds=0)
