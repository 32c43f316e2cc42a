"""All hosts of a slice: set up, tested, started, stopped, and what they print.

A host is told by ssh and answers on the bucket: gcloud reports success although some hosts were not reached, and ends
with 255 although the command ran. So whoever has not answered is told again, alone, which also is what a new slice
needs, whose hosts get their ssh keys one after the other.
"""

import shlex
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from spiral_jax.errors import SpiralError
from tpu.bucket import Bucket
from tpu.code import Code
from tpu.gcloud import GcloudError
from tpu.host.machine import wait_until
from tpu.host.report import STOP, attempt_folder
from tpu.job import Job
from tpu.providers import Provider

SCRIPT = Path(__file__).parent / "host" / "setup.sh"
ON_HOST = "spiral_jax_setup.sh"
TEST = 0  # the attempt that sets up and tests, and runs no job
BEAT, GRACE, SAVE = 10.0, 60.0, 300.0  # seconds: between reports; for a host whose sibling failed; to save in
READY = 3600.0  # seconds for set-up and smoke test
END = 30.0  # seconds for what was asked before and has not ended
ANSWER, POLL = 30.0, 2.0  # seconds for hosts that were told to answer, and between looks

_FUSED = ("xla_tpu_enable_async_collective_fusion", "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
          "xla_tpu_enable_async_collective_fusion_multiple_steps")  # fmt: skip
_OVERLAP = "xla_tpu_overlap_compute_collective_tc"
# What libtpu accepts and public recipes set, by generation; none was measured with this framework.
_LIBTPU = {
    "v4": ("xla_enable_async_all_gather", "xla_enable_async_collective_permute"),
    "v5e": (*_FUSED, _OVERLAP),
    "v5p": (*_FUSED, "xla_tpu_scoped_vmem_limit_kib=65472"),
    "v6e": (*_FUSED, _OVERLAP, "xla_tpu_scoped_vmem_limit_kib=98304"),
    "tpu7x": (*_FUSED, "xla_tpu_scoped_vmem_limit_kib=65536"),
}


def libtpu_arguments(generation: str, num_slices: int = 1) -> str:
    """LIBTPU_INIT_ARGS: the flags of the TPU compiler; what `plan` compiles with has to be the same."""
    flags = ["xla_tpu_enable_latency_hiding_scheduler", *_LIBTPU[generation]]
    if num_slices > 1:
        flags.append("xla_tpu_enable_data_parallel_all_reduce_opt")
    return " ".join(f"--{flag}" if "=" in flag else f"--{flag}=true" for flag in flags)


def environment(job: Job) -> dict[str, str]:
    """Variables that the job runs with on every host, in addition to the host's own."""
    return {
        "JAX_COMPILATION_CACHE_DIR": f"{job.root}/cache",
        "LIBTPU_INIT_ARGS": libtpu_arguments(job.slice.generation.name, job.num_slices),
        # A connection that gives less than a KB/s for a minute is dead; without these tensorstore waits for ever.
        "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "60",
        "TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES": "1024",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # a probe of a minute, and a warning for every call
    }


def plan_of(job: Job, attempt: int, code: Code) -> dict:
    """attempts/000N/job.json: all that a supervisor has to know."""
    per_host = job.slice.devices // job.slice.hosts
    return {
        "argv": [] if attempt == TEST else ["-m", *job.arguments],
        "smoke": ["-m", "tpu.host.smoke", f"--hosts={job.hosts}", f"--devices={per_host}"],
        "env": environment(job),
        "code": code.name,
        "sha256": code.sha256,
        "hosts": job.hosts,
        "slices": job.num_slices,
        "seconds": BEAT,
        "grace": GRACE,
        "stop_seconds": SAVE,
    }


def bring_up(provider: Provider, bucket: Bucket, attempt: int, code: Code, seconds: float = 900.0) -> None:
    """Starts an attempt on all hosts: code, environment, smoke test, job. Returns when every host has answered once.

    What is under way already goes on; a supervisor of an earlier attempt is ended first. How it goes from there is in
    the states of the hosts (`states`): a set-up or smoke test that fails ends the attempt with status 43.

    Args:
      attempt: its number; TEST for set-up and smoke test alone.
      code: is uploaded, if it is not there yet.
      seconds: after which hosts that have not answered are given up.

    Raises:
      SpiralError: hosts that did not answer, by name.
    """
    job, folder = provider.job, attempt_folder(attempt)
    if provider.gcloud.dry_run:
        _tell(provider, plan_of(job, attempt, code), f"--attempt={attempt}")
        return
    if attempt == TEST:
        for file in bucket.list(f"{folder}/"):
            bucket.delete(file.name)
    plan = bucket.read(f"{folder}/job.json")
    if plan is None:
        plan, archive = plan_of(job, attempt, code), f"code/{code.name}.tar.gz"
        if not bucket.list(archive):
            bucket.put(archive, code.data)
        bucket.put(f"{folder}/job.json", plan)
    _until_answered(
        lambda host: _tell(provider, plan, f"--attempt={attempt}", host),
        lambda: set(range(job.hosts)) - set(states(bucket, attempt)),
        seconds,
    )


def wait_until_tested(job: Job, bucket: Bucket, attempt: int, say: Callable[[str], object]) -> None:
    """Waits until all hosts are set up and tested: until the job runs on them, or has run.

    Raises:
      SpiralError: an end before that, with its reason, or none of it in an hour.
    """
    deadline, said = time.monotonic() + READY, ""
    while True:
        found = states(bucket, attempt)
        counts = Counter(state["state"] for state in found.values())
        line = ", ".join(f"{count} of {job.hosts} hosts: {state}" for state, count in sorted(counts.items()))
        if line != said:
            say(said := line)
        first = bucket.read(f"{attempt_folder(attempt)}/first_exit.json")
        if first and first["status"] and first["phase"] != "running":
            raise SpiralError(f"attempt {attempt} ended on host {first['host']}: {first['line']}")
        if counts["running"] + counts["ended"] >= job.hosts:
            return
        if time.monotonic() > deadline:
            raise SpiralError(f"attempt {attempt} is not under way after {READY:.0f} s ({line})")
        time.sleep(POLL)


def stop(provider: Provider, bucket: Bucket, attempt: int, seconds: float = SAVE + 60) -> None:
    """Ends an attempt on all hosts: asks by the bucket, then by ssh those that have not ended in time.

    Raises:
      SpiralError: hosts on which it has not ended, by name.
    """
    if provider.gcloud.dry_run:
        _tell(provider, {"code": "CODE", "sha256": "SHA256"}, f"--end={END:g}")
        return
    ask_to_stop(bucket)  # before anything is read: an attempt may be coming up
    plan = bucket.read(f"{attempt_folder(attempt)}/job.json")
    if plan is None:
        return

    def left() -> set[int]:
        return {host for host, state in states(bucket, attempt).items() if state["state"] != "ended"}

    if wait_until(lambda: not left(), seconds, POLL):
        return
    told = set[int]()

    def end(host: int | None) -> str:
        line = _tell(provider, plan, f"--end={END:g}", host)
        if not line and host is not None:
            # A supervisor that was killed says nothing any more: that the command came to its end is the answer.
            told.add(host)
        return line

    _until_answered(end, lambda: left() - told, 600.0)


def ask_to_stop(bucket: Bucket) -> None:
    """Asks, by the bucket alone, hosts and launchers to end the job."""
    bucket.put(STOP, {"time": time.time()})


def states(bucket: Bucket, attempt: int) -> dict[int, dict]:
    """What the hosts that have answered say, by number: host-I.json."""
    prefix = f"{attempt_folder(attempt)}/host-"
    names = {int(file.name[len(prefix) : -len(".json")]): file.name for file in bucket.list(prefix)}
    if len(names) > 2:
        with ThreadPoolExecutor(16) as threads:
            read = list(threads.map(bucket.read, names.values()))
    else:
        read = [bucket.read(name) for name in names.values()]
    return {host: state for host, state in sorted(zip(names, read, strict=True)) if state}


def logs(
    bucket: Bucket,
    newest: Callable[[], int],
    hosts: Iterable[int],
    follow: bool = False,
    write: Callable[[str], object] = lambda text: print(text, end="", flush=True),
) -> None:
    """Prints what hosts have printed in the newest attempt, host by host.

    Args:
      bucket: of the job.
      newest: gives its number.
      hosts: whose.
      follow: and what comes, also in attempts after this one, until all of these hosts have ended.
      write: takes the text.
    """
    hosts, attempt = list(hosts), newest()
    last: dict[int, str] = {}
    shown = None
    while True:
        folder = attempt_folder(attempt)
        over = follow and {h for h, s in states(bucket, attempt).items() if s["state"] == "ended"} >= set(hosts)
        for host in hosts:
            for part in bucket.list(f"{folder}/logs/host-{host}/"):
                if part.name <= last.get(host, ""):
                    continue
                if len(hosts) > 1 and shown != host:
                    write(f"== host {host} ==\n")
                content = bucket.get(part.name)
                write(content[0].decode(errors="replace") if content else "")
                shown, last[host] = host, part.name
        if follow and (later := newest()) > attempt:
            attempt, last, shown = later, {}, None
            write(f"== attempt {attempt} ==\n")
        elif over or not follow:
            return
        time.sleep(POLL)


def _tell(provider: Provider, plan: dict, order: str, host: int | None = None) -> str:
    """Has all hosts, or one, become a supervisor with this argument; what went wrong, or nothing."""
    command = shlex.join(["bash", ON_HOST, "start", provider.job.root, plan["code"], plan["sha256"], order])
    try:
        provider.gcloud.run(*provider.scp(str(SCRIPT), ON_HOST, host))
        provider.gcloud.run(*provider.ssh(command, host))
    except GcloudError as error:
        return str(error)
    return ""


def _until_answered(tell: Callable[[int | None], str], left: Callable[[], set[int]], seconds: float) -> None:
    """Tells all hosts, then one by one those that are left, again and again."""
    deadline = time.monotonic() + seconds
    line = tell(None)
    while True:
        if wait_until(lambda: not left(), ANSWER / 3 if line else ANSWER, POLL) or not (missing := left()):
            return
        if time.monotonic() > deadline:
            names = ", ".join(map(str, sorted(missing)))
            raise SpiralError(f"host {names} did not answer in {seconds:.0f} s ({line or 'though ssh reached it'})")
        line = ""
        for host in sorted(missing):
            line = tell(host) or line
