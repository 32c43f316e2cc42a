"""What bills, where, and what to say of it."""

import shlex

from tpu.job import Job
from tpu.memory import Memory
from tpu.providers import Observation, State


def where(job: Job) -> str:
    """Of a job's slice, as in `my-project us-east5-a qr v5p:4x4x4 x 2`."""
    return " ".join(filter(None, [job.project, job.zone, job.provider, f"{job.slice} x {job.num_slices}"]))


def command_line(job: Job, verb: str) -> str:
    """How to do something else with the job."""
    flags = [f"--accelerator={job.slice.accelerator_type}", f"--zone={job.zone}", f"--bucket={job.bucket}"]
    flags += [f"--num_slices={job.num_slices}"] * (job.num_slices > 1) + [f"--provider={job.provider}"]
    flags += [f"--project={job.project}"] * bool(job.project)
    return f"python -m tpu.launch {shlex.join([verb, job.name, *flags])}"


def elsewhere(job: Job, memory: Memory) -> str:
    """Where the job has its slice, for all that is remembered, if that is somewhere else than asked for now."""
    return memory.where if memory.may_have_slice and memory.where not in ("", where(job)) else ""


def what_bills(job: Job, seen: Observation, memory: Memory, now: float) -> str:
    """One line: that nothing does, or what, and what deletes it."""
    if there := elsewhere(job, memory):
        back = "`delete` with the flags of that place gives it back"
        return f"{job.name} may bill in {there}, where it has a slice; {back}"
    if seen.ours is False:
        return f"nothing of {job.root} bills: {job.name} in {job.zone} is somebody else's"
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
    elif seen.billing is None:
        what = f"{chips} is {seen.words} and may bill until it is gone"
    else:
        what = f"{chips} is {seen.words}; it does not bill, but keeps its name and quota"
    return f"{what}; delete it with: {command_line(job, 'delete')}"
