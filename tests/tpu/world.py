"""What a babysitter touches, in virtual time: the cloud, a bucket, hosts that run jobs by a script, its own death."""

import json
from collections.abc import Iterable
from typing import Any, NamedTuple

from spiral_jax.errors import SpiralError
from spiral_jax.hardware import parse_slice
from tests.tpu.cloud import EVER, Cloud, Slice
from tpu.babysit import Babysitter
from tpu.bucket import Conflict, Unreachable
from tpu.gcloud import Gcloud, GcloudError
from tpu.job import Job
from tpu.providers import provider_of


class Killed(BaseException):
    """SIGKILL: nothing of the launcher runs any more."""


class Found(NamedTuple):
    name: str
    size: int
    generation: int


class MemoryBucket:
    """`tpu.bucket.Bucket` in memory. What hosts write is worked out when it is read."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.generation = self.puts = 0

    def _call(self, what: str) -> None:
        self.world.step(what)
        if self.world.is_within(self.world.bucket_down):
            self.world.cloud.now += 20
            raise Unreachable("--bucket is gs://b; allowed: one that answers within 20 seconds (503)")

    def get(self, name: str) -> tuple[bytes, int] | None:
        self._call(f"get {name}")
        return self._now().get(name)

    def read(self, name: str) -> dict[str, Any] | None:
        found = self.get(name)
        return found and json.loads(found[0])

    def put(self, name: str, content: bytes | dict[str, Any], if_generation_match: int | None = None) -> int:
        self._call(f"put {name}")
        self.puts += 1
        if self.world.is_within(self.world.script.get("writes_refused", ())):
            raise SpiralError("--bucket is gs://b; allowed: a bucket that may be written (403)")
        there = self.objects.get(name, (b"", 0))[1]
        if if_generation_match is not None and if_generation_match != there:
            raise Conflict(name)
        self.generation += 1
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.objects[name] = (data, self.generation)
        if self.puts in self.world.script.get("answers_lost", ()):
            self.world.cloud.now += 20
            raise Unreachable("--bucket is gs://b; allowed: one that answers within 20 seconds (timed out)")
        return self.generation

    def delete(self, name: str) -> None:
        self._call(f"delete {name}")
        self.objects.pop(name, None)

    def list(self, prefix: str = "") -> list[Found]:
        self._call(f"list {prefix}")
        return [
            Found(name, len(data), gen) for name, (data, gen) in sorted(self._now().items()) if name.startswith(prefix)
        ]

    def _now(self) -> dict[str, tuple[bytes, int]]:
        return self.objects | self.world.host_files()


class World:
    """A job, and all that happens to it.

    Args:
      script: of `Cloud`, and `jobs`: what becomes of one attempt after another (the last again and again), each
        {"runs": seconds, "status": exit status, None for a silent death, "lost": status with which it ends if its slice
        goes away (left out: it just goes silent), "mute": it never writes anything, "trouble": not started, "line",
        "kernel": of its end, "siblings": statuses of other hosts, five seconds later, "unanswered": it starts, but the
        launcher does not hear so}; `bucket_down` and `writes_refused`, pairs of seconds; `answers_lost`, writes to the
        bucket, by their numbers, that take effect and of which it does not tell.
      job: fields of `Job` that differ.
    """

    def __init__(self, script: dict[str, Any] | None = None, **job: Any) -> None:
        self.script = script or {}
        self.cloud = Cloud(self.script)
        self.bucket_down = self.script.get("bucket_down", ())
        self.bucket = MemoryBucket(self)
        self.gcloud = Gcloud("my-project", say=self.say, execute=self.execute, clock=lambda: self.cloud.now)
        self.job = Job(
            **{
                "name": "pile",
                "zone": "us-east5-a",
                "project": "my-project",
                "slice": parse_slice("v5p-16"),
                "bucket": "gs://my-bucket/runs",
                "config": "experiments/pile.py:1.4b,spiral_b",
                "max_chip_hours": 8 * 48,
            }
            | job
        )
        self.attempts: dict[int, tuple[float, Slice, dict[str, Any]]] = {}
        self.said: list[str] = []
        self._files: tuple[Any, dict[str, tuple[bytes, int]]] | None = None
        self.steps = 0
        self.kill_at: int | None = None  # the step at which the launcher dies
        self.dead = False
        self.interrupt_at: float = EVER
        self.finished_at = EVER  # when the bucket first told of a success

    @property
    def elapsed(self) -> float:
        return self.cloud.now - self.cloud.start

    def is_within(self, times: Iterable[tuple[float, float]]) -> bool:
        """Whether it is now one of these times, pairs of seconds."""
        return any(since <= self.elapsed < until for since, until in times)

    def remembered(self) -> dict[str, Any]:
        """The launcher's memory, as it is on the bucket; empty if there is none."""
        written = self.bucket.objects.get("launch.json")
        return json.loads(written[0]) if written else {}

    def step(self, what: str) -> None:
        """One thing that a launcher does to the world."""
        if self.dead:
            raise Killed
        self.steps += 1
        if self.kill_at is not None and self.steps >= self.kill_at:
            self.dead = True
            raise Killed(what)

    def execute(self, arguments: list[str], timeout: float) -> tuple[int, str, str]:
        self.step("before " + " ".join(arguments[:5]))
        if " create " in " ".join(arguments):
            there = [one.name for one in self.cloud.slices if one.at(max(self.cloud.now, one.created))]
            assert not there, f"a create was sent while there was {there}"
            assert self.cloud.now < self.finished_at, "a create was sent after success"
        answer = self.cloud.execute(arguments, timeout)
        self.step("after " + " ".join(arguments[:5]))
        return answer

    def sleep(self, seconds: float) -> None:
        self.step("sleep")
        before = self.elapsed
        self.cloud.now += max(seconds, 1)
        if before < self.interrupt_at <= self.elapsed:
            raise KeyboardInterrupt

    def say(self, line: str) -> None:
        if not self.dead:
            self.said.append(f"{self.elapsed:7.0f} {line}")

    def bring_up(self, attempt: int, seconds: float) -> None:
        """As `tpu.hosts` does: an ssh to all hosts, then the job runs by itself."""
        self.gcloud.run(*provider_of(self.job, self.gcloud).ssh("setup"))
        self.cloud.now += min(seconds, self.script.get("set_up", 180))
        self.step("set up")
        if seconds < self.script.get("set_up", 180):
            raise SpiralError(f"host 0 did not answer in {seconds:.0f} s")
        jobs = self.script.get("jobs") or [{"runs": 3600, "status": 0}]
        job = jobs[min(attempt - 1, len(jobs) - 1)]
        if "trouble" in job:
            raise GcloudError("unknown", job["trouble"])
        alive = [one for one in self.cloud.there() if one.usable(self.cloud.now)]
        if not alive:
            raise GcloudError("unknown", "gcloud compute tpus: ssh: connect to host 10.0.0.2 port 22: timed out")
        self.attempts[attempt] = (self.cloud.now, alive[0], job)
        self.step("started")
        if job.get("unanswered"):
            raise SpiralError("--bucket is gs://b; allowed: one that answers within 20 seconds (no route)")

    def host_files(self) -> dict[str, tuple[bytes, int]]:
        """What the hosts of all attempts have written by now."""
        now = self.cloud.now
        if self._files and self._files[0] == (now, len(self.attempts), len(self.bucket.objects)):
            return self._files[1]
        files: dict[str, tuple[bytes, int]] = {}
        for attempt, (since, one, job) in self.attempts.items():
            if job.get("mute"):
                continue
            end, status = since + job["runs"], job["status"]
            lost = next((t for t in self._changes(one) if t > since and not one.usable(t)), EVER)
            later = [begun for n, (begun, _, _) in self.attempts.items() if n > attempt]
            stop = self.bucket.objects.get("control/stop")
            stopped = max(float(stop[0] or b"0"), since) + 30 if stop else EVER
            for time, how in ((lost, job.get("lost", "silence")), (min(later, default=EVER), 143), (stopped, 42)):
                if time < end:
                    end, status = time, how
            for host in range(self.job.hosts):
                beat = min(now, end) // 10 * 10
                file: dict[str, Any] = {
                    "state": "running",
                    "beat": beat,
                    "status": None,
                    "first_exit": None,
                    "line": "",
                }
                if now >= end and status != "silence":
                    late = job.get("siblings", {}).get(str(host))  # how another host ends, later
                    own = status if late is None else late
                    kernel = job.get("kernel", []) if own is None else []
                    first = end + (5 if late is not None else 0)
                    file |= {"state": "ended", "status": own, "first_exit": first, "line": job.get("line", "last line")}
                    file["kernel"] = kernel
                    if own == 0:
                        self.finished_at = min(self.finished_at, now)
                files[f"attempts/{attempt:04d}/host-{host}.json"] = (json.dumps(file).encode(), 1)
        self._files = (now, len(self.attempts), len(self.bucket.objects)), files
        return files

    def _changes(self, one: Slice) -> list[float]:
        return sorted({one.created + event["at"] for event in one.timeline} | {one.deleted, one.gone})

    def babysitter(self, owner: str = "elsewhere:1:a") -> Babysitter:
        return Babysitter(
            provider_of(self.job, self.gcloud),
            self.bucket,  # type: ignore[arg-type]
            self.bring_up,
            say=self.say,
            clock=lambda: self.cloud.now,
            sleep=self.sleep,
            uniform=lambda low, high: (low + high) / 2,
            owner=owner,
        )

    def run(self, hours: float = 24 * 60) -> int:
        """A babysitter to its end. It must come in so many hours."""
        limit = self.elapsed + hours * 3600
        sleep, bound = self.sleep, self.babysitter(f"elsewhere:{self.steps}:a")

        def bounded(seconds: float) -> None:
            assert self.elapsed < limit, "it goes on for ever:\n" + "\n".join(self.said[-20:])
            sleep(seconds)

        bound.sleep = bounded
        return bound.run()

    def killed(self, at: int) -> bool:
        """A launcher that dies at its n-th step from now; whether it came so far."""
        self.kill_at = self.steps + at
        try:
            self.run()
            return False
        except Killed:
            return True
        finally:
            self.kill_at, self.dead = None, False

    def created(self) -> int:
        """How often a slice came into being."""
        return len(self.cloud.slices)

    def left(self) -> list[str]:
        """What is still there, deletions under way aside."""
        return [
            f"{one.name} {one.at(self.cloud.now)}"
            for one in self.cloud.slices
            if one.at(max(self.cloud.now, one.created))
        ]

    def heard(self, text: str) -> bool:
        return any(text in line for line in self.said)
