"""Keeps a job on a slice until it has finished, or one of its caps ends everything. What to do, `decide.py` says."""

import contextlib
import dataclasses
import json
import os
import random
import shlex
import socket
import time
from collections.abc import Callable
from typing import Any

from spiral_jax.errors import SpiralError
from tpu import hosts
from tpu.bucket import Bucket, Conflict, Unreachable
from tpu.decide import (
    LOOK,
    SILENCE,
    Action,
    Decision,
    JobStatus,
    Memory,
    affordable,
    created,
    decide,
    job_status,
    started,
    undeleted,
)
from tpu.gcloud import Gcloud, GcloudError, shown
from tpu.host.report import STOP, attempt_folder
from tpu.job import Job
from tpu.providers import Observation, Provider, State, provider_of

MEMORY = "launch.json"
_HELD = 4 * LOOK  # seconds that a launcher is believed to live on
_LONGEST = 3600  # seconds for one set-up, or one create


class Taken(SpiralError):
    """Another launcher holds the job."""


class Store:
    """The memory, on the bucket. Of two launchers that write it one is told.

    Args:
      bucket: of the job, at its root.
      owner: this launcher.
    """

    def __init__(self, bucket: Bucket, owner: str, clock: Callable[[], float] = time.time) -> None:
        self._bucket, self._owner, self._clock, self._generation = bucket, owner, clock, 0

    def load(self) -> Memory:
        """What is remembered, by whomever."""
        found = self._bucket.get(MEMORY)
        self._generation = found[1] if found else 0
        return Memory(**json.loads(found[0])) if found else Memory()

    def save(self, memory: Memory, seconds: float = _HELD) -> Memory:
        """Writes it, and says that this launcher lives on for a while.

        Raises:
          Taken: another launcher has written it since.
          Unreachable: the bucket cannot be reached.
        """
        memory = dataclasses.replace(memory, owner=self._owner, until=self._clock() + seconds)
        try:
            self._generation = self._bucket.put(MEMORY, vars(memory), self._generation)
        except Conflict:
            raise Taken(f"{MEMORY} was written by another launcher ({self.load().owner or 'unknown'})") from None
        return memory

    def release(self, memory: Memory) -> None:
        """For the next launcher to go on at once."""
        self._bucket.put(MEMORY, vars(dataclasses.replace(memory, owner="", until=0)), self._generation)


def read_memory(bucket: Bucket) -> Memory:
    """What is remembered of a job, for those who change nothing."""
    found = bucket.read(MEMORY)
    return Memory(**found) if found else Memory()


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


def where(job: Job) -> str:
    """Of a job's slice, as in `us-east5-a qr v5p:4x4x4 x 2`."""
    return f"{job.zone} {job.provider} {job.slice} x {job.num_slices}"


def read_status(bucket: Bucket, job: Job, attempt: int) -> tuple[JobStatus, dict[int, dict[str, Any]]]:
    """What hosts wrote about an attempt, together and one by one."""
    try:
        stop = bucket.get(STOP) is not None
        if not attempt:
            return JobStatus(stop=stop), {}
        states = hosts.states(bucket, attempt)
        first = bucket.read(f"{attempt_folder(attempt)}/first_exit.json")
    except SpiralError:  # credentials that ran out, too, may be renewed
        return JobStatus(known=False), {}
    return job_status(states, job.hosts, stop, first), states


def command_line(job: Job, verb: str) -> str:
    """How to do something else with the job."""
    flags = [f"--accelerator={job.slice.accelerator_type}", f"--zone={job.zone}", f"--bucket={job.bucket}"]
    flags += [f"--num_slices={job.num_slices}"] * (job.num_slices > 1) + [f"--provider={job.provider}"]
    flags += [f"--project={job.project}"] * bool(job.project)
    return f"python -m tpu.launch {shlex.join([verb, job.name, *flags])}"


def what_bills(job: Job, seen: Observation, memory: Memory, now: float) -> str:
    """One line: that nothing does, or what, and what deletes it."""
    sent = memory.phase == "creating" and now - memory.asked < 600
    if seen.state is State.GONE and not sent:
        return "nothing bills: there is no slice"
    chips = f"{job.name} ({job.chips} chips of {job.slice.generation.name} in {job.zone})"
    if seen.state is State.GONE:
        what = f"{chips} may still come into being and bill: a create was just sent"
    elif seen.billing:
        what = f"{chips} is {seen.words} and BILLS"
    elif seen.state is State.UNKNOWN:
        what = f"{chips} may be there and bill: the cloud could not be asked ({seen.message})"
    elif seen.state is State.WAITING:
        what = f"{chips} is {seen.words}; it does not bill yet, and will when it gets chips"
    else:
        what = f"{chips} is {seen.words}; it does not bill, but keeps its name and quota"
    return f"{what}; delete it with: {command_line(job, 'delete')}"


class Babysitter:
    """Looks, decides, remembers, acts, until there is nothing left to do.

    Args:
      job: the launch.
      gcloud: the CLI.
      bucket: of the job, at its root.
      bring_up: starts an attempt on all hosts, by its number, in so many seconds; a SpiralError or GcloudError says
        why not.
      say, clock, sleep, uniform: the world.
    """

    def __init__(
        self,
        job: Job,
        gcloud: Gcloud,
        bucket: Bucket,
        bring_up: Callable[[Provider, int, float], None],
        say: Callable[[str], None] = print,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
        uniform: Callable[[float, float], float] = random.uniform,
        owner: str = "",
    ) -> None:
        self._job, self._gcloud, self._bucket, self._bring_up = job, gcloud, bucket, bring_up
        self._say, self._clock, self._sleep, self._uniform = say, clock, sleep, uniform
        self._provider = provider_of(job, gcloud)
        self._store = Store(bucket, owner or this_launcher(), clock)
        self._memory, self._seen = Memory(), Observation(State.UNKNOWN, message="it was not asked")
        self._said, self._words = set[str](), ""

    def run(self) -> int:
        """Exit status: 0 finished, 42 unfinished, 1 failed, 2 what you can mend, 44 diverged, 130 interrupted.

        Raises:
          SpiralError: another launcher holds the job, or the slice is somewhere else.
        """
        try:
            self._memory = self._take()
        except Unreachable:
            self._look_again()
            self._say_what_bills()
            raise
        return self._watch()

    def _watch(self) -> int:
        """The loop."""
        action = Action.WAIT
        try:
            while action is not Action.END:
                self._seen = self._provider.observe()
                status, _ = read_status(self._bucket, self._job, self._memory.attempt)
                decision = decide(self._job, self._memory, self._seen, status, self._clock())
                self._report(decision)
                self._act(decision)
                action = decision.action
        except Taken:
            raise  # the other one sees to what bills
        except BaseException as error:
            self._look_again()
            self._say_what_bills()
            if isinstance(error, KeyboardInterrupt):
                self._release()
                return 130
            raise
        spent = f"{self._memory.chip_seconds / 3600:.1f} chip-hours, attempts: {self._memory.attempt}"
        self._say(f"the end: {self._memory.ending} ({spent})")
        self._say_what_bills()
        self._release()
        return self._memory.result

    def create(self) -> int:
        """Asks for the slice once, and leaves it to whoever watches next.

        Returns:
          0 if it is there or asked for, otherwise 2.
        """
        self._memory = self._take()
        try:
            if self._memory.phase == "ended":
                raise SpiralError(f"{self._job.name} has finished; allowed: another NAME, or an empty {self._job.root}")
            self._seen = self._provider.observe()
            if self._seen.state is State.GONE:
                status, _ = read_status(self._bucket, self._job, self._memory.attempt)
                decision = decide(self._job, self._memory, self._seen, status, self._clock())
                self._report(decision)
                if decision.action is Action.CREATE:
                    self._act(decision)
                    if self._memory.ending:
                        self._say(self._memory.ending)
                self._seen = self._provider.observe()
            self._say_what_bills()
        finally:
            self._release()
        coming = self._seen.state is State.GONE and self._memory.phase == "creating"
        return 0 if coming or self._seen.state in (State.WAITING, State.READY, State.TRANSIENT) else 2

    def start(self) -> int:
        """Starts an attempt once, unless one runs. Returns 0, or 1 if it could not be started."""
        self._memory = self._take()
        try:
            self._seen = self._provider.observe()
            if self._seen.state is not State.READY:
                raise SpiralError(f"{self._job.name} is {self._seen.words or 'not known'}; allowed: a READY slice")
            status, _ = read_status(self._bucket, self._job, self._memory.attempt)
            now = self._clock()
            if self._memory.started and status.beat > now - SILENCE and not status.ended:
                self._say(f"attempt {self._memory.attempt} runs")
                return 0
            self._memory = dataclasses.replace(self._memory, phase="present", started=0, starting=False, resume_at=0)
            self._act(decide(self._job, self._memory, self._seen, JobStatus(), now))
            return 1 if self._memory.trouble or not self._memory.started else 0
        finally:
            self._release()

    def delete(self) -> int:
        """Deletes the slice, whoever watches it, and waits until it is gone.

        Returns:
          0 if it is gone, 2 if not, 130 if interrupted.
        """
        self._job = dataclasses.replace(self._job, delete_at_success=True)
        for last in (False, False, False, True):
            try:
                memory = self._checked(self._store.load())
                if memory.phase != "ended" or memory.result:  # what has finished stays so
                    memory = dataclasses.replace(memory, ending="deleted, as `delete` asked", result=2)
                self._memory = dataclasses.replace(memory, phase="deleting", since=0, kept=False)
                self._memory = self._store.save(self._memory)
                break
            except Taken:  # its launcher has just written; after this it finds that it is held by another
                if last:
                    raise
            except Unreachable as error:
                self._say(f"what is remembered cannot be read: {error}")
                self._memory = Memory(phase="deleting", ending="deleted, as `delete` asked", result=2)
                break
        return 130 if self._watch() == 130 else 0 if self._seen.state is State.GONE else 2

    def _take(self) -> Memory:
        """The memory, once no other launcher holds it."""
        memory = self._store.load()
        if held(memory, self._clock()):
            seconds = memory.until - self._clock()
            self._say(f"{self._job.name} is held by {memory.owner}; if that is dead, this goes on in {seconds:.0f} s")
            before = memory
            while held(memory, self._clock()):
                self._sleep(LOOK)
                memory = self._store.load()
                if memory.until > before.until:
                    raise Taken(f"{self._job.name} is held by {memory.owner}; allowed: one launcher at a time")
        memory = self._checked(memory)
        if memory.phase == "ended" and memory.result:  # whoever starts it again wants it to go on
            memory = Memory(attempt=memory.attempt, chip_seconds=memory.chip_seconds, where=memory.where)
        return self._store.save(memory)

    def _checked(self, memory: Memory) -> Memory:
        """Raises SpiralError if its slice may be somewhere else."""
        place = where(self._job)
        if (memory.phase not in ("absent", "ended") or memory.kept) and memory.where not in ("", place):
            name, there = self._job.name, memory.where
            raise SpiralError(f"{name} is {place}; allowed, until it is deleted: {there}, where it has a slice")
        return dataclasses.replace(memory, where=place)

    def _act(self, decision: Decision) -> None:
        """Remembers, then acts; what cannot be remembered is not begun, only ended."""
        action = decision.action
        long = action in (Action.CREATE, Action.START)
        seconds = min(affordable(self._job, decision.memory), _LONGEST) if long else 0
        try:
            self._memory = self._store.save(decision.memory, _HELD + seconds)
        except Taken:
            raise
        except SpiralError as error:
            self._say(f"not remembered, so nothing new is begun: {error}")
            if action is Action.END:
                self._memory = decision.memory
            action = action if action is Action.DELETE else Action.WAIT
        if action is Action.WAIT:
            # Who asks directly for chips asks at random moments, not all at once.
            self._sleep(decision.seconds * (self._uniform(1, 2) if self._memory.phase == "absent" else 1))
        elif action is Action.DELETE:
            self._delete()
        elif action is not Action.END:
            self._gcloud.deadline = self._clock() + seconds
            try:
                self._create() if action is Action.CREATE else self._start(seconds)
            finally:
                self._gcloud.deadline = float("inf")

    def _create(self) -> None:
        kind, line = "", ""
        seconds = affordable(self._job, self._memory)
        self._say(f"creating: {shown(self._gcloud.command(*self._provider.create_command(seconds)))}")
        try:
            self._provider.create(seconds)
        except GcloudError as error:
            kind, line = error.kind, str(error)
        self._memory, lines = created(self._job, self._memory, kind, line, self._clock())
        for line in lines:
            self._say(line)

    def _start(self, seconds: float) -> None:
        trouble = ""
        try:
            self._bring_up(self._provider, self._memory.attempt, seconds)
        except (SpiralError, GcloudError) as error:
            trouble = str(error)
            self._say(f"attempt {self._memory.attempt} could not be started: {trouble}")
        self._memory = started(self._memory, trouble, self._clock())

    def _delete(self) -> None:
        self._say(f"deleting: {shown(self._gcloud.command(*self._provider.delete_command()))}")
        try:
            self._provider.delete()
        except GcloudError as error:
            self._say(f"not deleted, tried again: {error}")
            self._memory = undeleted(self._memory, self._clock())
        self._sleep(LOOK)

    def _report(self, decision: Decision) -> None:
        """What is new."""
        seen = self._seen
        if seen.words != self._words or seen.state is State.UNKNOWN:
            self._words = seen.words
            what = f"{seen.words or 'the slice'}: {seen.state.value}"
            spent = f" ({decision.memory.chip_seconds / 3600:.1f} chip-hours)"
            self._say(what + spent + (f": {seen.message}" if seen.message and seen.state is not State.GONE else ""))
        if decision.memory.ending and not self._memory.ending:
            self._say(f"ending: {decision.memory.ending}")
        new = [f"symptom: {symptom}" for symptom in seen.symptoms if symptom not in self._said]
        for line in (*new, *decision.lines):
            self._say(line)
        self._said.update(seen.symptoms)

    def _say_what_bills(self) -> None:
        self._say(what_bills(self._job, self._seen, self._memory, self._clock()))

    def _look_again(self) -> None:
        try:
            self._seen = self._provider.observe()
        except BaseException:  # Ctrl-C, once more
            self._seen = dataclasses.replace(self._seen, state=State.UNKNOWN, billing=None)

    def _release(self) -> None:
        with contextlib.suppress(Conflict, SpiralError):  # then the next launcher waits for two minutes
            self._store.release(self._memory)
