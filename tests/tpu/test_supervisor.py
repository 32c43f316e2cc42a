"""Two hosts on this machine, for real: supervisors, signals, logs, a bucket. Stories are those of shared/TPU.md."""

import http.server
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import loopback
import pytest
from cases import slow
from loopback import wait_for

# A job that counts from where it was, prints every number, and saves at SIGTERM, as a training does.
JOB = """
import os, pathlib, signal, sys, time
last, seconds = int(sys.argv[1]), float(sys.argv[2])
saved = pathlib.Path.home() / "saved"
n = int(saved.read_text()) if saved.exists() else 0
def save():
    saved.with_suffix(".new").write_text(str(n))
    saved.with_suffix(".new").rename(saved)
def stop(*_):
    save()
    print(f"saved at {n}")
    sys.exit(42)
signal.signal(signal.SIGTERM, stop)
while n < last:
    n += 1
    print("step", n)
    time.sleep(seconds)
    if n % 10 == 0:
        save()
"""


@pytest.fixture(autouse=True)
def write_job(tmp_path):
    (tmp_path / "job.py").write_text(JOB)


def steps(log: str) -> list[int]:
    return [int(n) for n in re.findall(r"^step (\d+)$", log, re.M)]


def test_a_job_that_finishes(slice_of, tmp_path):
    two = slice_of()
    two.start(1, [f"{tmp_path}/job.py", "40", "0.02"], env={"GREETING": "x"})
    for state in two.wait(1):
        assert (state["status"], state["signal"], state["line"], state["code"]) == (0, False, "", loopback.CODE)
        assert state["versions"]["jax"] == "0.10.2" and state["versions"]["python"] == "3.11.7"
    for host in (0, 1):
        assert steps(two.log(1, host)) == list(range(1, 41))
        assert len(two.bucket.list(f"attempts/0001/logs/host-{host}/")) > 1  # while it ran
    assert two.bucket.read("attempts/0001/first_exit.json")["status"] == 0


def test_story_07_a_dropped_ssh_does_not_end_the_job(slice_of, tmp_path):
    one = slice_of(1)
    one.write(1, [f"{tmp_path}/job.py", "60", "0.02"])
    ssh = subprocess.Popen(["/bin/sh", "-c", f"{one.command(1)}; /bin/sleep 60"], env=one.hosts[0].variables,
                           stdout=subprocess.PIPE, text=True, start_new_session=True)  # fmt: skip
    assert "--attempt=1 is process" in ssh.stdout.readline()
    for number in (signal.SIGHUP, signal.SIGKILL):
        os.killpg(ssh.pid, number)
    ssh.wait()
    one.wait(1)
    assert steps(one.log(1, 0)) == list(range(1, 61))


def test_story_14_sigterm_reaches_python(slice_of, tmp_path):
    """The power-off of a preempted VM: the supervisor is asked to end, the job saves, the next attempt goes on."""
    two = slice_of()
    two.start(1, [f"{tmp_path}/job.py", "1000", "0.02"])
    wait_for(lambda: "step 5" in two.log(1, 0) and "step 5" in two.log(1, 1))
    host = two.hosts[0]
    job = host.pid("job.py")
    commands = host.processes()
    # Nothing stands between the two, and neither is a shell.
    assert parent(job) == host.pid("tpu.host.supervisor") and len(commands) == 2, commands
    assert not [command for command in commands.values() if "sh " in command]
    os.kill(parent(job), signal.SIGTERM)
    (state,) = two.wait(1, hosts=[0])
    assert (state["status"], state["signal"]) == (42, False)
    assert two.state(1, 1)["state"] == "running"  # saved is no failure, so the other is left to end by itself
    saved = int(re.search(r"saved at (\d+)", two.log(1, 0))[1])
    two.start(2, [f"{tmp_path}/job.py", "1000", "0"])  # ends what still runs of the first attempt
    assert [state["status"] for state in two.wait(2)] == [0, 0]
    assert two.state(1, 1)["status"] == 42
    assert steps(two.log(1, 0)) == list(range(1, saved + 1)) and steps(two.log(2, 0)) == list(range(saved + 1, 1001))


def test_story_11_a_silent_death_shows_the_kernels_lines(slice_of, tmp_path):
    two = slice_of()
    two.start(1, [f"{tmp_path}/job.py", "1000", "0.02"])
    wait_for(lambda: "step 5" in two.log(1, 0) and "step 5" in two.log(1, 1))
    os.kill(two.hosts[0].pid("job.py"), signal.SIGKILL)
    killed, other = two.wait(1)
    assert (killed["status"], killed["signal"]) == (137, True) and killed["line"].startswith(
        "killed by SIGKILL, after: "
    )
    assert [line.split("] ")[1] for line in killed["kernel"]] == ["Out of memory: Killed process 123 (python)"]
    # Story 9: the first exit decides, and the other host gives its chips back.
    assert other["status"] == 42 and "[supervisor: host 0 ended with status 137: SIGTERM]" in two.log(1, 1)
    first = two.bucket.read("attempts/0001/first_exit.json")
    assert (first["host"], first["status"], first["kernel"]) == (0, 137, killed["kernel"])


def test_an_exception_is_no_silent_death(slice_of, tmp_path):
    one = slice_of(1)
    one.start(1, ["-c", "print('begun'); raise ValueError('a bad shape')"])
    (state,) = one.wait(1)
    assert (state["status"], state["signal"], state["line"]) == (1, False, "ValueError: a bad shape")
    assert state["kernel"] == []
    one.start(2, ["-c", "import sys; print('error: a line', file=sys.stderr); print('more'); sys.exit(2)"])
    (state,) = one.wait(2)
    assert (state["status"], state["line"]) == (2, "error: a line")


def test_a_lost_host(slice_of, tmp_path):
    """Supervisor and job are gone at once; what they had written and not sent is sent by the next attempt."""
    two = slice_of()
    two.start(1, [f"{tmp_path}/job.py", "200", "0.01"], seconds=0.6)
    wait_for(lambda: "step 11" in two.log(1, 0) and "step 11" in two.log(1, 1))
    two.hosts[1].kill()
    written = (two.hosts[1].folder / "saved").read_text()
    assert two.state(1, 1)["state"] == "running" and two.bucket.get("attempts/0001/first_exit.json") is None
    two.start(2, [f"{tmp_path}/job.py", "200", "0"])
    assert [state["status"] for state in two.wait(2)] == [0, 0]
    log = steps(two.log(1, 1))
    assert log == list(range(1, len(log) + 1)) and len(log) >= int(written)
    assert steps(two.log(2, 1)) == list(range(int(written) + 1, 201))
    assert steps(two.log(1, 0)) + steps(two.log(2, 0)) == list(range(1, 201))  # this one had saved when it was ended


def test_a_supervisor_that_is_killed_takes_the_job_with_it(slice_of, tmp_path):
    one = slice_of(1)
    one.start(1, [f"{tmp_path}/job.py", "100000", "0.02"])
    wait_for(lambda: "step 5" in one.log(1, 0))
    os.kill(one.hosts[0].pid("tpu.host.supervisor"), signal.SIGKILL)
    wait_for(lambda: not one.hosts[0].processes())
    assert (one.hosts[0].folder / "saved").exists()


def test_a_second_start_finds_the_first(slice_of, tmp_path):
    one = slice_of(1)
    host = one.hosts[0]
    one.start(1, [f"{tmp_path}/job.py", "1000", "0.02"])
    one.wait(1, "running")
    supervisor = host.pid("tpu.host.supervisor")
    for attempt in (1, 0):
        assert one.tell(host, attempt).returncode == 0
        line = f"error: --attempt is {attempt}; allowed: one after 1, which process {supervisor} runs\n"
        wait_for(lambda line=line: line in (host.folder / "spiral_jax/supervisor.log").read_text())
    wait_for(lambda: [pid for pid, command in host.processes().items() if "supervisor" in command] == [supervisor])
    one.start(2, [f"{tmp_path}/job.py", "1", "0"])
    one.wait(2)
    assert one.state(1, 0)["status"] == 42
    one.tell(host, 2)  # an attempt that has ended is not run again
    wait_for(lambda: "as this one has ended here" in (host.folder / "spiral_jax/supervisor.log").read_text())
    assert one.state(2, 0)["status"] == 0


STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
device = open(sys.argv[1], "w")
subprocess.Popen(["setsid", sys.executable, "-c", "import signal, time; signal.signal(15, 1); time.sleep(100)"],
                 pass_fds=[device.fileno()])
print("stuck", flush=True)
time.sleep(100)
"""


def test_story_08_the_chips_are_free_when_the_job_is_over(slice_of, tmp_path):
    """A job that does not listen, and has left a process in a session of its own that holds a chip."""
    one = slice_of(1)
    (tmp_path / "stubborn.py").write_text(STUBBORN)
    device = one.hosts[0].folder / "accel0"
    one.start(1, [f"{tmp_path}/stubborn.py", str(device)], stop_seconds=0.5)
    wait_for(lambda: "stuck" in one.log(1, 0))
    one.bucket.put("control/stop", b"")
    (state,) = one.wait(1)
    assert (state["status"], state["signal"], state["line"]) == (137, True, "asked to stop")
    assert "has not ended 0 seconds after SIGTERM: SIGKILL" in one.log(1, 0)
    wait_for(lambda: not one.hosts[0].processes())


def test_a_stop_that_is_asked_for(slice_of, tmp_path):
    two = slice_of()
    two.start(1, [f"{tmp_path}/job.py", "1000", "0.02"])
    two.wait(1, "running")
    two.bucket.put("control/stop", b"")
    assert [(state["status"], state["signal"]) for state in two.wait(1)] == [(42, False)] * 2
    assert all("saved at" in two.log(1, host) for host in (0, 1))


@pytest.fixture
def flaky(storage):
    """The address of the bucket through a proxy that, while its `down` is set, answers 503; and that event."""
    down = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def forward(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            request = urllib.request.Request(storage + self.path, body or None, dict(self.headers), method=self.command)
            try:
                answer = urllib.request.urlopen(request) if not down.is_set() else None
            except urllib.error.HTTPError as error:
                answer = error
            content = answer.read() if answer else b"busy"
            self.send_response(answer.status if answer else 503)
            for name, value in answer.headers.items() if answer else ():
                if name.lower().startswith("x-goog"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_DELETE = forward

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", down
    server.shutdown()
    server.server_close()


def test_a_bucket_that_fails_for_a_while(slice_of, tmp_path, flaky):
    """Nothing is lost: the job goes on, and even ends, while the bucket does not answer."""
    address, down = flaky
    one = slice_of(1, address)
    one.start(1, [f"{tmp_path}/job.py", "100", "0.01"])
    wait_for(lambda: "step 5" in one.log(1, 0))
    down.set()
    wait_for(lambda: not [c for c in one.hosts[0].processes().values() if "job.py" in c])
    assert one.state(1, 0)["state"] == "running" and "step 100\n" not in one.log(1, 0)
    down.clear()
    (state,) = one.wait(1)
    assert state["status"] == 0 and steps(one.log(1, 0)) == list(range(1, 101))


@pytest.mark.parametrize("what", [slow("version"), "code"])
def test_story_17_hosts_that_differ_do_not_train(what, slice_of, tmp_path):
    three = slice_of(3)
    if what == "version":
        (three.hosts[1].folder / "packages").write_text("jax 0.10.1\nlibtpu 0.0.42.1\n")
        named = r"host 1 has jax 0\.10\.1, others 0\.10\.2"
    else:
        three.write(1, [])
        three.tell(three.hosts[1], 1)
        three.wait(1, "testing", hosts=[1])
        three.hosts[1].kill()
        (changed,) = three.hosts[1].folder.glob("spiral_jax/code/*/spiral_jax/train.py")
        changed.write_text("# edited by hand")
        three.bucket.delete("attempts/0001/host-1.json")
        named = r"host 1 has code \w+, others \w+"
    three.start(2, ["-c", "print('trains')"])
    states = three.wait(2)
    first = three.bucket.read("attempts/0002/first_exit.json")
    assert first["status"] == 43 and re.fullmatch(f"smoke test: {named}", first["line"]), first
    # The others say the same, or that one of them was faster.
    assert {state["status"] for state in states} <= {43, 143}
    assert not any("trains" in three.log(2, host) for host in range(3))


def test_story_13_a_set_up_that_fails_is_tried_again_and_named(slice_of, tmp_path):
    two = slice_of()
    (two.hosts[1].folder / "no_network").touch()
    two.start(1, ["-c", "print('trains')"], grace=0.0)
    other, failed = two.wait(1)
    assert (
        failed["status"] == 43
        and failed["line"].startswith("set-up: error: ")
        and "failed seven times: uv" in failed["line"]
    )
    assert two.log(1, 1).count("no network") == 7
    assert (other["status"], other["line"]) == (143, "host 1 ended with status 43, before the job ran")
    # Mended, the second set-up does what is missing, and a third nothing.
    (two.hosts[1].folder / "no_network").unlink()
    for attempt, times in ((2, 8), (3, 8)):
        two.start(attempt, ["-c", "print('trains')"])
        assert [state["status"] for state in two.wait(attempt)] == [0, 0]
        assert (two.hosts[1].folder / "uv.log").read_text().count("pip install") == times


def parent(pid: int) -> int:
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[1])


WAITS = """
import sys
from tpu.host import supervisor
supervisor.PATIENCE = 3.0
with supervisor.only_one("gs://b/x", int(sys.argv[1])):
    print("holds", flush=True)
    sys.stdin.readline()
"""


def test_of_several_that_wait_for_one_to_end_one_follows(tmp_path):
    """The launcher tells a host again and again while its last supervisor saves: those end nobody but that one."""
    (tmp_path / "spiral_jax").mkdir()

    def start(attempt, before=""):
        command = [sys.executable, "-c", before + WAITS, str(attempt), "tpu.host.supervisor"]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=os.environ | {"HOME": str(tmp_path)}, stdin=pipe, stdout=pipe, text=True)

    slow = start(1, "import signal; signal.signal(15, signal.SIG_IGN)\n")
    assert slow.stdout.readline() == "holds\n"
    waiting = [start(2), start(2)]
    time.sleep(1.5)
    slow.stdin.close()  # it has saved
    slow.wait(20)
    wait_for(lambda: any(child.poll() is not None for child in waiting), 20)  # the other finds its own attempt there
    (left,) = [child for child in waiting if child.poll() is None]
    assert left.stdout.readline() == "holds\n"
    time.sleep(4)  # longer than the patience of whoever waited
    assert [child.poll() for child in waiting if child is not left] == [1] and left.poll() is None
    left.stdin.close()
    assert left.wait(20) == 0
