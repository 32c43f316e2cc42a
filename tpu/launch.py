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
from spiral_jax.hardware import GENERATIONS
from tpu import hosts, several
from tpu.babysit import Babysitter, read_memory, read_status, what_bills
from tpu.bucket import Bucket
from tpu.code import Code, pack
from tpu.decide import Memory
from tpu.gcloud import Execute, Gcloud, GcloudError, execute, shown
from tpu.host.report import STOP
from tpu.job import Job, Parser, define, job_of
from tpu.plan import ROOT, make_plan, skipped
from tpu.providers import Provider, gke, provider_of, resources

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
    """One call of a verb: the job, and the world.

    Attributes:
      job: the launch.
      values: flags that are none of the job's.
      execute, make_bucket, say, clock, sleep: the world.
    """

    job: Job
    values: argparse.Namespace
    execute: Execute = execute
    make_bucket: Callable[..., Bucket] = Bucket
    say: Callable[[str], None] = print
    clock: Callable[[], float] = time.time
    sleep: Callable[[float], None] = time.sleep

    def __post_init__(self) -> None:
        self.dry = self.values.dry_run
        self.gcloud = Gcloud(self.job.project, self.dry, self.say, self.execute, self.clock)
        if self.job.provider != "gke":
            self.provider = provider_of(self.job, self.gcloud)
        self.bucket = self.make_bucket(self.job.root, patience=20)

    def plan(self) -> int:
        if self.values.skip_plan:
            skipped(self.say)
        else:
            make_plan(self.job, lambda url: self.make_bucket(url).location(), self.say)
        return 0

    def create(self) -> int:
        self.plan()
        if self.dry:
            self.provider.create(float("inf"))
            return 0
        return self._babysitter().create()

    def babysit(self) -> int:
        require(self.job.max_chip_hours is not None, "--max_chip_hours", None, "a number, at which everything ends")
        if self.dry:
            self.create()
            self._bring_up(1)
            self.provider.delete()
            return 0
        memory, code = read_memory(self.bucket), pack(ROOT)
        if memory.phase == "absent" or (memory.phase == "ended" and memory.result):
            self.plan()
            with contextlib.suppress(SpiralError):  # asked for before this start
                self.bucket.delete(STOP)
        return self._babysitter(code).run()

    def setup(self) -> int:
        self._bring_up(hosts.TEST)
        if not self.dry:
            hosts.wait_until_tested(self.job, self.bucket, hosts.TEST, self.say)
        return 0

    def run(self) -> int:
        if self.dry:
            self._bring_up(1)
            return 0
        return self._babysitter().start()

    def stop(self) -> int:
        memory = Memory() if self.dry else read_memory(self.bucket)
        if memory.attempt or self.dry:
            hosts.stop(self.job, self.provider, self.gcloud, self.bucket, memory.attempt)
        else:
            self.say("no attempt was started")
        seen = self.provider.observe()
        if not self.dry:
            self.say(what_bills(self.job, seen, memory, self.clock()))
        return 0

    def delete(self) -> int:
        if self.dry:
            self.provider.delete()
            return 0
        return self._babysitter().delete()

    def logs(self) -> int:
        if not self.dry:
            which = range(self.job.hosts) if self.values.host is None else [self.values.host]
            hosts.logs(self.bucket, read_memory(self.bucket).attempt, which, self.values.follow)
        return 0

    def status(self) -> int:
        memory, now = Memory() if self.dry else read_memory(self.bucket), self.clock()
        seen = self.provider.observe()
        if self.dry:
            return 0
        status, states = read_status(self.bucket, self.job, memory.attempt)
        words = [state["state"] for state in states.values()]
        job, held = self.job, memory.owner if memory.until > now else "nobody"
        what = (
            status.line
            if status.ended
            else ", ".join(f"{words.count(w)} {w}" for w in sorted(set(words))) or "nothing yet"
        )
        spent = f"{memory.chip_seconds / 3600:,.1f}" + (f" of {job.max_chip_hours:,g}" if job.max_chip_hours else "")
        for name, text in {
            "slice": f"{seen.words or seen.state.value} ({job.num_slices} x {job.slice}, {job.zone}, {job.provider})",
            "launcher": f"{memory.phase}{': ' + memory.ending if memory.ending else ''}; held by {held}",
            "attempts": f"{memory.attempt}; {memory.failures} failures, {memory.preemptions} interruptions",
            "hosts": f"{what} (of {job.hosts})",
            "training": self._training(),
            "spent": f"{spent} chip-hours" + (f", {memory.chip_seconds / 3600 * job.price:,.2f}" if job.price else ""),
        }.items():
            self.say(f"{name:9} {text}")
        for line in (*status.kernel, *seen.symptoms):
            self.say(f"          {line}")
        self.say(what_bills(job, seen, memory, now))
        return 0

    def of_gke(self) -> int:
        """What verbs do for a cluster, which does the rest: `create` writes the manifest; commands are printed."""
        verb, job = self.values.verb, self.job
        require(verb in ("plan", "create"), "--provider", "gke", "qr or vm for this verb; `create` prints the commands")
        file = Path(f"{job.name}.jobset.yaml")
        text = gke.manifest(job, self.values.image) if verb == "create" else ""
        if not self.dry:
            self.plan()
        if text and not self.dry:
            file.write_text(text, encoding="utf-8")
            self.say(f"{file} is written")
        for command in gke.commands(job, str(file)):
            self.say(shown(command))
        return 0

    def _training(self) -> str:
        """The last row of metrics, in words."""
        parts = [part.name for part in self.bucket.list("run/metrics/")] or ["run/metrics.jsonl"]
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

    def _babysitter(self, code: Code | None = None) -> Babysitter:
        """`code`: what all attempts run; without it, what lies here when one is started."""

        def bring_up(provider: Provider, attempt: int, seconds: float) -> None:
            self._bring_up(attempt, code, seconds)

        return Babysitter(self.job, self.gcloud, self.bucket, bring_up, self.say, self.clock, self.sleep)

    def _bring_up(self, attempt: int, code: Code | None = None, seconds: float = 900) -> None:
        given = self.job, self.provider, self.gcloud, self.bucket, attempt, code or pack(ROOT)
        hosts.bring_up(*given, seconds=min(seconds, 900))


def reap(arguments: Sequence[str], world: dict) -> int:
    """Lists everything with our label, in all zones of the table; `--delete` deletes it."""
    parser = Parser(prog="python -m tpu.launch reap")
    parser.add_argument("name", nargs="?", help="of one job")
    parser.add_argument("--project", default="")
    parser.add_argument("--zone", action="append", help="default: all that are known")
    parser.add_argument("--delete", action="store_true")
    parser.add_argument("--dry_run", action="store_true")
    values = parser.parse_args(arguments)
    say = world.get("say", print)
    known = {k: v for k, v in world.items() if k in ("say", "execute", "clock")}
    gcloud = Gcloud(values.project, values.dry_run, **known)
    zones = values.zone or sorted({zone for generation in GENERATIONS for zone in generation.zones})
    found, failed = resources(gcloud, zones)
    found = [one for one in found if values.name in (None, one.job)]
    for one in found:
        bills = "BILLS" if one.bills else "does not bill now, keeps its name and quota"
        command = shown(gcloud.command(*one.delete_command))
        say(f"{one.job}: {one.kind} {one.name} in {one.zone}: {one.words}: {bills}; {command}")
        if values.delete:
            gcloud.run(*one.delete_command)
            say(f"{one.name}: is being deleted")
    for line in failed:
        say(f"not looked at: {line}")
    bill, looked = sum(one.bills for one in found), len(zones) - len(failed)
    say(f"{len(found)} found, {bill} of them bill, in {looked} of {len(zones)} zones")
    return 2 if failed else 0


def main(arguments: Sequence[str] | None = None, **world) -> int:
    """Exit status, as of every verb of the framework."""
    escape_unprintable()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _main(arguments, world)
    except (SpiralError, GcloudError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _main(arguments: list[str], world: dict) -> int:
    if arguments[:1] == ["reap"]:
        return reap(arguments[1:], world)
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
    return getattr(Launcher(job, values, **world), "of_gke" if job.provider == "gke" else values.verb)()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
