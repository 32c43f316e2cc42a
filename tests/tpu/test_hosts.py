"""tpu/hosts.py with real supervisors behind an ssh that fails as the real one does."""

import hashlib
import os
import re
import signal
import subprocess
import sys

import loopback
import pytest
from loopback import wait_for

from spiral_jax.errors import SpiralError
from spiral_jax.hardware import GENERATIONS, parse_slice
from tpu import hosts
from tpu.bucket import Bucket
from tpu.code import Code
from tpu.gcloud import Gcloud
from tpu.host.report import STOP
from tpu.job import Job
from tpu.providers import provider_of

SLOW = "import signal, time; signal.signal(15, lambda *_: exit(42)); print('begun'); time.sleep(60)"

DEAF = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
chip = open(os.environ["HOME"] + "/accel0", "w")
print("begun")
time.sleep(60)
"""


@pytest.fixture
def launch(slice_of, bucket_url, monkeypatch):
    """A job of two hosts, an ssh to them, and (function of hosts.py, arguments) that calls it."""
    two = slice_of()
    job = Job(name="job", zone="us-east5-a", slice=parse_slice("v5p-16"), bucket=bucket_url, config="x.py")
    assert job.hosts == 2
    ssh, data = loopback.Ssh(two), loopback.tarball()
    gcloud = Gcloud(execute=ssh)
    code = Code("0123-4567", data, hashlib.sha256(data).hexdigest(), ())
    monkeypatch.setattr(hosts, "ANSWER", 3.0)
    monkeypatch.setattr(hosts, "POLL", 0.1)
    original = hosts.plan_of

    def quick_plan(*arguments):
        """As it is, but for a program in place of the training and the smoke test."""
        plan = original(*arguments)
        assert plan["argv"] in ([], ["-m", "spiral_jax.train", "--config=x.py", f"--workdir={bucket_url}/job/run"])
        return plan | {"argv": plan["argv"] and ["-c", launch.program], "smoke": ["-c", "print('smoke')"],
                       "seconds": 0.2, "grace": 0.5, "stop_seconds": 3.0}  # fmt: skip

    class Launch:
        program = SLOW

        def up(self, attempt, **more):
            hosts.bring_up(provider_of(job, gcloud), two.bucket, attempt, code, **more)

        def tested(self, attempt):
            said = []
            hosts.wait_until_tested(job, two.bucket, attempt, said.append)
            return said

        def stop(self, attempt, **more):
            hosts.stop(provider_of(job, gcloud), two.bucket, attempt, **more)

    launch = Launch()
    launch.slice, launch.ssh, launch.job, launch.gcloud = two, ssh, job, gcloud
    monkeypatch.setattr(hosts, "plan_of", quick_plan)
    return launch


def test_set_up_run_and_stop(launch):
    launch.up(hosts.TEST)
    assert launch.tested(hosts.TEST)[-1] == "2 of 2 hosts: ended"
    launch.up(1)
    launch.up(1)  # the launcher was started again: nothing happens twice
    launch.tested(1)
    for host in launch.slice.hosts:
        wait_for(lambda host=host: sum("supervisor" in command for command in host.processes().values()) == 1)
    plan = launch.slice.bucket.read("attempts/0001/job.json")
    assert plan["env"]["JAX_COMPILATION_CACHE_DIR"] == f"{launch.job.bucket}/job/cache" and plan["hosts"] == 2
    launch.stop(1)
    assert [state["status"] for state in hosts.states(launch.slice.bucket, 1).values()] == [42, 42]
    # Set-up can be tried again, once what asked the first attempt to stop is over, as verbs that start say.
    launch.slice.bucket.delete(STOP)
    launch.up(hosts.TEST)
    assert launch.tested(hosts.TEST)[-1] == "2 of 2 hosts: ended"


def test_story_06_keys_are_not_on_all_hosts_yet(launch):
    """`--worker=all` leaves one out without a word, and the next ssh to it fails twice."""
    launch.ssh.skipped, launch.ssh.broken = {1}, {1: 2}
    launch.up(1)
    told = [re.search(r"--worker=(\w+)", " ".join(command))[1] for command in launch.ssh.commands]
    assert told[:2] == ["all", "all"] and set(told[2:]) == {"1"} and len(told) == 6
    launch.tested(1)


@pytest.mark.slow
def test_story_06_ssh_ends_with_255_at_random(launch):
    launch.ssh.broken = {0: 1}
    launch.up(1)
    launch.tested(1)


def test_a_host_that_cannot_be_reached_is_named(launch):
    launch.ssh.broken = {1: 10**9}
    with pytest.raises(SpiralError, match=r"^host 1 did not answer in 2 s \(gcloud .*255"):
        launch.up(1, seconds=2.0)


def test_story_13_what_fails_before_the_job_is_told_in_a_line(launch):
    (launch.slice.hosts[1].folder / "packages").write_text("jax 0.10.1\nlibtpu 0.0.42.1\n")
    launch.up(1)
    with pytest.raises(SpiralError, match=r"attempt 1 ended on host \d: smoke test: host 1 has jax 0.10.1, others"):
        launch.tested(1)


@pytest.mark.slow
def test_story_08_stop_ends_what_does_not_answer(launch, monkeypatch):
    """A supervisor that hangs, and one that was killed while its job goes on holding a chip."""
    hangs, gone = launch.slice.hosts
    launch.program = DEAF
    monkeypatch.setattr(hosts, "END", 1.0)
    launch.up(1)
    wait_for(lambda: "begun" in launch.slice.log(1, 0) and "begun" in launch.slice.log(1, 1))
    os.kill(hangs.pid("tpu.host.supervisor"), signal.SIGSTOP)
    os.kill(gone.pid("tpu.host.supervisor"), signal.SIGKILL)
    assert gone.processes()
    launch.stop(1, seconds=0.5)
    wait_for(lambda: not hangs.processes() and not gone.processes())


def test_story_16_code_goes_by_its_hash(launch):
    """What an attempt began with is what it goes on with, whatever lies on the launcher's disk or the bucket now."""
    launch.up(hosts.TEST)
    launch.tested(hosts.TEST)
    for host in launch.slice.hosts:
        (code,) = (host.folder / "spiral_jax/code").iterdir()
        assert code.name == "0123-4567"
    # An archive that is not the one that was meant is not unpacked.
    launch.slice.bucket.put("code/0123-4567.tar.gz", b"something else")
    for host in launch.slice.hosts:
        host.ssh("rm -r spiral_jax/code")
    with pytest.raises(SpiralError, match="host 0, 1 did not answer"):
        launch.up(1, seconds=0.5)
    assert not list(launch.slice.hosts[0].folder.glob("spiral_jax/code/*/tpu"))


def test_dry_run_prints_commands_and_nothing_else(launch, capsys):
    launch.gcloud.dry_run = True
    launch.up(1)
    scp, ssh = capsys.readouterr().out.splitlines()
    assert "queued-resources scp" in scp and "spiral_jax_setup.sh" in scp and "--worker=all" in scp
    assert "bash spiral_jax_setup.sh start" in ssh and "--attempt=1" in ssh
    launch.stop(1)
    assert "CODE SHA256 --end=30" in capsys.readouterr().out
    assert not launch.slice.bucket.list("attempts/") and not launch.ssh.commands


def test_logs(launch):
    launch.program = "import time\nfor n in range(3): print('line', n); time.sleep(0.3)"
    launch.up(1)
    shown = []
    hosts.logs(launch.slice.bucket, lambda: 1, [1], follow=True, write=shown.append)
    assert "".join(shown) == "smoke\nline 0\nline 1\nline 2\n" and len(shown) > 1
    launch.slice.wait(1)
    shown.clear()
    hosts.logs(launch.slice.bucket, lambda: 1, [0, 1], write=shown.append)
    one = "smoke\nline 0\nline 1\nline 2\n"
    assert "".join(shown) == f"== host 0 ==\n{one}== host 1 ==\n{one}"


def test_logs_are_followed_into_the_next_attempt(bucket_url, monkeypatch):
    """A slice is taken away while somebody looks; the lines of both attempts come, each once."""
    bucket, shown, now = Bucket(f"{bucket_url}/logs"), [], [1]
    monkeypatch.setattr(hosts, "POLL", 0.05)

    def say(attempt, place, text):
        bucket.put(f"{hosts.attempt_folder(attempt)}/logs/host-0/{place:012d}.txt", text.encode())

    def write(text):
        shown.append(text)
        if text == "step 1\n":
            say(2, 0, "step 1 again\n")
            now[0] = 2
        elif "again" in text:
            say(2, 13, "step 2\n")
            ended = {"attempt": 2, "host": 0, "state": "ended", "status": 0}
            monkeypatch.setattr(hosts, "states", lambda bucket, attempt: {0: ended} if attempt == 2 else {})

    say(1, 0, "step 1\n")
    hosts.logs(bucket, lambda: now[0], [0], follow=True, write=write)
    assert shown == ["step 1\n", "== attempt 2 ==\n", "step 1 again\n", "step 2\n"]


@pytest.mark.parametrize("generation", [g.name for g in GENERATIONS])
def test_flags_of_the_compiler(generation):
    flags = hosts.libtpu_arguments(generation).split(" ")
    assert all(re.fullmatch(r"--xla_\w+=\w+", flag) for flag in flags) and len(set(flags)) == len(flags)
    assert "data_parallel" in hosts.libtpu_arguments(generation, num_slices=2)


SMALL = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
COMPILE = """
import sys, jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from spiral_jax.hardware import parse_slice
from spiral_jax.roofline.slices import describe_devices
mesh = Mesh(np.array(describe_devices(parse_slice(sys.argv[1]))), ("all",))
x = jax.ShapeDtypeStruct((256, 256), "float32", sharding=NamedSharding(mesh, PartitionSpec("all")))
jax.jit(lambda x: x @ x).lower(x).compile()
"""


@pytest.mark.slow
@pytest.mark.parametrize("generation", sorted(SMALL))
def test_the_compiler_accepts_its_flags(generation, libtpu):
    """libtpu ends the process at a flag that it does not know."""

    def compiled(flags):
        variables = os.environ | {"LIBTPU_INIT_ARGS": flags, "PYTHONPATH": str(loopback.ROOT), "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-c", COMPILE, SMALL[generation]]
        return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)

    done = compiled(hosts.libtpu_arguments(generation, num_slices=2))
    assert done.returncode == 0, done.stderr[-2000:]
    assert compiled("--xla_tpu_no_such_flag=true").returncode
