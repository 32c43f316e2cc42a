"""Launches, watches and removes a training on TPU pods. Standard library only.

python -m tpu.launch plan NAME --accelerator=v5p-128 --zone=us-east5-a --bucket=gs://BUCKET --config=FILE.py:ARGUMENT
python -m tpu.launch babysit NAME ... --max_chip_hours=5000
"""

import argparse
import contextlib
import dataclasses
import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from spiral_jax.errors import SpiralError, escape_unprintable, require
from tpu import hosts, reap, several
from tpu.babysit import SET_UP, Babysitter, read_status
from tpu.bills import what_bills
from tpu.bucket import Bucket
from tpu.code import Code, pack
from tpu.gcloud import Execute, Gcloud, GcloudError, configured_project, execute, shown
from tpu.host.report import STOP
from tpu.job import Job, Parser, define, job_of, match
from tpu.memory import Memory, Store
from tpu.plan import ROOT, check_files, plan_unless_skipped
from tpu.providers import State, gke, provider_of
from tpu.telling import tell

VERBS = {
    "plan": "check everything, compile, say what it costs; creates nothing",
    "create": "plan, then ask for the slice",
    "setup": "code and packages onto all hosts, and a smoke test there",
    "run": "start the job on a slice that is there",
    "babysit": "plan, create, start, and again after preemptions, until it has finished",
    "status": "where the job and its slice are",
    "logs": "what the hosts print",
    "stop": "end the job, with a checkpoint; the slice stays",
    "delete": "give the slice back",
    "reap": "list everything of ours that bills or keeps a name, in all zones; NAME may be left out",
}


@dataclasses.dataclass
class Launcher:
    """One call of a verb, each of which is a method.

    Attributes:
      job: the launch.
      values: flags that are none of the job's.
      execute, make_bucket, say, clock, sleep: the world.
      code: what all attempts run; without it, what lies here when one is started.
    """

    job: Job
    values: argparse.Namespace
    execute: Execute = execute
    make_bucket: Callable[..., Bucket] = Bucket
    say: Callable[[str], None] = tell
    clock: Callable[[], float] = time.time
    sleep: Callable[[float], None] = time.sleep
    code: Code | None = None

    def __post_init__(self) -> None:
        self.bucket = self.make_bucket(self.job.root, patience=20)
        gcloud = Gcloud(self.job.project, self.values.dry_run, self.say, self.execute, self.clock)
        self.provider = provider_of(self.job, gcloud)  # of GKE, whose cluster does the rest, nothing is asked
        self.babysitter = Babysitter(self.provider, self.bucket, self._bring_up, self.say, self.clock, self.sleep)

    def settle(self) -> None:
        """Takes the project of gcloud's settings for the job's, whatever they become while it runs."""
        if not self.job.project:
            self.job = dataclasses.replace(self.job, project=configured_project(self.execute))
            self.__post_init__()

    def plan(self) -> int:
        def locate(url: str) -> str:
            return self.make_bucket(url).location()

        plan_unless_skipped(self.job, self.values.skip_plan, locate, self.say)
        return 0

    def create(self) -> int:
        self.plan()
        self.settle()
        self._go_on()
        return self._unwatched(self.babysitter.create())

    def babysit(self) -> int:
        memory = None
        try:
            memory = Store(self.bucket).load()
            self._check_files()
            if memory.phase == "absent" or (memory.phase == "ended" and memory.result):
                self.plan()
                self._go_on()
            self.settle()
        except BaseException:
            if memory is None or memory.may_have_slice:
                with contextlib.suppress(SpiralError):
                    self.settle()
                self.babysitter.memory = memory or Memory()
                self.babysitter.say_what_bills(look_again=True)
            raise
        return self.babysitter.run()

    def setup(self) -> int:
        attempt = Store(self.bucket).load().attempt
        runs = read_status(self.bucket, self.job, attempt).runs(self.clock())
        require(not runs, "NAME", f"{self.job.name}, whose attempt {attempt} runs", "a job that `stop` has ended")
        self._go_on()
        self._bring_up(hosts.TEST)
        hosts.wait_until_tested(self.job, self.bucket, hosts.TEST, self.say)
        return 0

    def run(self) -> int:
        self._check_files()
        self._go_on()
        return self._unwatched(self.babysitter.start())

    def stop(self) -> int:
        memory = self.babysitter.checked(Store(self.bucket).load())
        seen = self.provider.observe()
        try:
            if memory.attempt and seen.state is State.READY:
                hosts.stop(self.provider, self.bucket, memory.attempt)
            else:
                hosts.ask_to_stop(self.bucket)
                words = seen.words or seen.state.value
                self.say(f"asked for on the bucket; {self.job.name} is {words}, attempt {memory.attempt}")
        finally:
            self.say(what_bills(self.job, seen, memory, self.clock()))
        return 0

    def delete(self) -> int:
        return self.babysitter.delete()

    def logs(self) -> int:
        host = self.values.host
        which = range(self.job.hosts) if host is None else [host]
        hosts.logs(self.bucket, lambda: Store(self.bucket).load().attempt, which, self.values.follow)
        return 0

    def status(self) -> int:
        job, now, seen = self.job, self.clock(), self.provider.observe()
        try:
            memory = Store(self.bucket).load()
        except SpiralError:
            self.say(what_bills(job, seen, Memory(), now))
            raise
        status = read_status(self.bucket, job, memory.attempt)
        try:
            training = self._training()
        except SpiralError as error:
            training = f"not known ({error})"
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            training = f"not known (the newest metrics are something else: {type(error).__name__}: {error})"
        held, hours = memory.owner if memory.until > now else "nobody", memory.chip_seconds / 3600
        spent = f"{hours:,.1f}" + (f" of {job.max_chip_hours:,g}" if job.max_chip_hours else "")
        for name, text in {
            "slice": f"{seen.words or seen.state.value} ({job.num_slices} x {job.slice}, {job.zone}, {job.provider})",
            "launcher": f"{memory.phase}{': ' + memory.ending if memory.ending else ''}; held by {held}",
            "attempts": f"{memory.attempt}; {memory.failures} failures, {memory.preemptions} interruptions",
            "hosts": f"{status.line or 'nothing yet'} (of {job.hosts})",
            "training": training,
            "spent": f"{spent} chip-hours" + (f", {hours * job.price:,.2f}" if job.price else ""),
        }.items():
            self.say(f"{name:9} {text}")
        for line in (*status.kernel, *seen.symptoms):
            self.say(f"          {line}")
        self.say(what_bills(job, seen, memory, now))
        return 0

    def dry_run(self) -> int:
        """Prints the commands of the verb where all goes well; nothing is asked of a cloud, but what the plan asks."""
        verb, provider = self.values.verb, self.provider
        if verb in ("run", "babysit"):
            self._check_files()
        if verb in ("plan", "create", "babysit"):
            self.plan()
        if verb in ("create", "babysit"):
            provider.create(float("inf"))
        if verb in ("setup", "run", "babysit"):
            self._bring_up(hosts.TEST if verb == "setup" else 1)
        if verb == "stop":
            hosts.stop(provider, self.bucket, 0)
        if verb in ("stop", "status"):
            provider.observe()
        if verb in ("delete", "babysit"):
            provider.delete()
        return 0

    def of_gke(self) -> int:
        """What verbs do for a cluster, which does the rest: `create` writes the manifest; commands are printed."""
        verb, job, dry = self.values.verb, self.job, self.values.dry_run
        hours = job.max_chip_hours
        require(hours is None, "--max_chip_hours", hours, "none with --provider=gke, where nobody keeps it")
        require(verb in ("plan", "create"), "--provider", "gke", "qr or vm for this verb; `create` prints the commands")
        file = Path(f"{job.name}.jobset.yaml")
        text = gke.manifest(job, self.values.image) if verb == "create" else ""
        if not dry:
            self.plan()
        if text and not dry:
            file.write_text(text, encoding="utf-8")
            self.say(f"{file} is written")
        for command in gke.commands(job, str(file)):
            self.say(shown(command))
        restarts = f"up to --max_preemptions={job.max_preemptions} times, whatever has ended it"
        self.say(f"the cluster starts the job again {restarts}; its node pool bills until it is deleted")
        return 0

    def _check_files(self) -> None:
        """Also where a plan is skipped, or was made before: hosts that find no configuration cost their slice."""
        self.code = pack(ROOT)
        check_files(self.job, self.code)

    def _unwatched(self, status: int) -> int:
        if self.job.max_chip_hours is not None:
            self.say("nobody watches it now: --max_chip_hours holds under `babysit` only")
        return status

    def _go_on(self) -> None:
        """What `stop` asked for before this start is over."""
        with contextlib.suppress(SpiralError):
            self.bucket.delete(STOP)

    def _training(self) -> str:
        """The last row of metrics, in words."""
        parts = [part.name for part in self.bucket.list("run/metrics/") if part.name.endswith(".jsonl")]
        parts = parts or ["run/metrics.jsonl"]
        found, config = self.bucket.get(max(parts)), self.bucket.read("run/config.json")
        rows = [json.loads(line) for line in found[0].splitlines() if line.strip()] if found else []
        if not rows or not config:
            return "no step yet"
        row, steps = rows[-1], config["train"]["steps"]
        left = (steps - row["step"]) * row["step_time"] / 3600
        loss = next((f"loss {row['loss']:.4f}" for row in reversed(rows) if row.get("loss") is not None), "no loss yet")
        mfu = f", MFU {row['mfu']:.1%}" if "mfu" in row else ""
        speed = f"{row['tokens_per_second']:,.0f} tokens/s{mfu}"
        return f"step {row['step']:,} of {steps:,}, {loss}, {speed}, {left:,.1f} hours left"

    def _bring_up(self, attempt: int, seconds: float = SET_UP) -> None:
        hosts.bring_up(self.provider, self.bucket, attempt, self.code or pack(ROOT), seconds=seconds)


def main(arguments: Sequence[str] | None = None, **world) -> int:
    """Exit status, as of every verb of the framework."""
    escape_unprintable()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _main(arguments, world)
    except (SpiralError, GcloudError) as error:
        with contextlib.suppress(OSError):
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _main(arguments: list[str], world: dict) -> int:
    if arguments[:1] == ["reap"]:
        return reap.main(arguments[1:], **world)
    if arguments[:1] == ["babysit"] and any(argument.startswith("--jobs") for argument in arguments):
        return several.main(arguments[1:])
    lines = "\n".join(f"  {verb:8} {text}" for verb, text in VERBS.items())
    parser = Parser(
        prog="python -m tpu.launch", description=f"{__doc__}\nverbs:\n{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("verb", choices=VERBS, metavar="VERB")
    define(parser)
    parser.add_argument("--dry_run", action="store_true", help="print the commands and change nothing")
    parser.add_argument("--skip_plan", action="store_true", help="do not check anything before something is created")
    parser.add_argument("--image", default="", help="gke: a container image with this code")
    parser.add_argument("--host", type=int, help="logs: of this host only")
    parser.add_argument("--follow", action="store_true", help="logs: and what comes")
    values, rest = parser.parse_known_args(arguments)
    job = job_of(values, rest)
    most = job.hosts - 1
    require(values.host is None or 0 <= values.host <= most, "--host", values.host, f"0 to {most}")
    if values.image:
        match("--image", values.image)
    launcher = Launcher(job, values, **world)
    if job.provider == "gke":
        return launcher.of_gke()
    if values.verb in ("run", "babysit"):
        job.check_config()  # before anything is looked at
    if values.verb == "babysit" and job.max_chip_hours is None:
        raise SpiralError("--max_chip_hours is missing; allowed: a number, at which everything ends")
    if values.dry_run:
        return launcher.dry_run()
    if values.verb in ("setup", "run", "status", "stop", "delete"):  # the others check everything before
        launcher.settle()
    return getattr(launcher, values.verb)()


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, signal.default_int_handler)
    sys.exit(main())
