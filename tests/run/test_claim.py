"""Who may write a run's directory."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from etils.epath import Path
from pairs import ROOT

from spiral_jax.errors import SpiralError
from spiral_jax.run import disk_hold as module
from spiral_jax.run.claim import claim

HOLDER = """
import sys, time
from etils.epath import Path
from spiral_jax.run import disk_hold as module
from spiral_jax.run.claim import claim
module._SECONDS_OF_A_LOOK = 1.0
workdir = Path(sys.argv[1])
with claim(workdir) as held:
    print("held", flush=True)
    for number in range(3000):
        time.sleep(0.01)
        held.check()
        with (workdir / "rows").open("a") as file:
            file.write("row\\n")
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()


def owner_of(workdir) -> dict:
    return json.loads((workdir / ".lock").read_text())


def test_a_second_start_is_refused_at_once_and_leaves_nothing(holder, tmp_path):
    before = {path.name for path in tmp_path.iterdir()}
    begin = time.monotonic()
    with pytest.raises(SpiralError, match="another process is training there") as error, claim(Path(tmp_path)):
        pass
    assert time.monotonic() - begin < 3
    assert f"process {holder.pid} on {socket.gethostname()}" in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} - {"rows"} == before - {"rows"}
    assert owner_of(tmp_path)["pid"] == holder.pid and holder.poll() is None


def test_after_a_kill_the_next_start_has_it_at_once(holder, tmp_path):
    holder.kill()
    holder.wait()
    begin = time.monotonic()
    with claim(Path(tmp_path)) as held:
        assert time.monotonic() - begin < 0.5
        held.check()


def test_a_stopped_owner_is_replaced_and_when_it_goes_on_ends_and_writes_nothing(holder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SECONDS_OF_SILENCE", 2.5)
    time.sleep(0.5)
    holder.send_signal(signal.SIGSTOP)
    begin = time.monotonic()
    with claim(Path(tmp_path)) as held:
        assert time.monotonic() - begin >= 2.5
        held.look()  # still ours
    # After that start has finished, too.
    rows = (tmp_path / "rows").read_text()
    holder.send_signal(signal.SIGCONT)
    _, errors = holder.communicate(timeout=10)
    # But what it was at when it was stopped, if that was a write.
    assert (tmp_path / "rows").read_text() in (rows, rows + "row\n")
    assert holder.returncode == 43
    assert errors.startswith(f"error: the run in {tmp_path} was taken over by process ") and errors.count("\n") == 1


def test_an_owner_that_goes_on_in_time_keeps_it(holder, tmp_path):
    holder.send_signal(signal.SIGSTOP)
    threading.Timer(1, holder.send_signal, (signal.SIGCONT,)).start()
    with pytest.raises(SpiralError, match="another process is training there"), claim(Path(tmp_path)):
        pass
    assert holder.poll() is None


def test_an_owner_on_another_machine_is_waited_for(tmp_path, monkeypatch):
    """Its lock may not reach this one."""
    monkeypatch.setattr(module, "SECONDS_OF_SILENCE", 1.0)
    (tmp_path / ".lock").write_text(json.dumps({"owner": "x", "host": "elsewhere", "pid": 1, "beat": "000000000003"}))
    begin = time.monotonic()
    with claim(Path(tmp_path)) as held:
        assert time.monotonic() - begin >= 1
        held.look()


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"null"])
def test_a_file_that_says_nothing_stops_nobody(tmp_path, content):
    (tmp_path / ".lock").write_bytes(content)
    with claim(Path(tmp_path)) as held:
        held.look()
        assert owner_of(tmp_path)["host"] == socket.gethostname()
    assert owner_of(tmp_path)["beat"] == "____released"


def test_what_was_released_is_taken_at_once_from_any_machine(tmp_path):
    with claim(Path(tmp_path)):
        pass
    text = (tmp_path / ".lock").read_text()
    (tmp_path / ".lock").write_text(text.replace(socket.gethostname(), "elsewhere"))
    begin = time.monotonic()
    with claim(Path(tmp_path)):
        assert time.monotonic() - begin < 0.5


def test_the_directory_of_another_start_is_not_written(tmp_path, monkeypatch):
    """Asked before each write; a look at the file is not worth it right after another one."""
    ends = []
    held = module.DiskHold(Path(tmp_path), "ours", lambda *end: ends.append(end))
    held.take()
    (tmp_path / ".lock").write_text(json.dumps({"owner": "another", "host": "h", "pid": 7}))
    held.check()
    assert not ends
    monkeypatch.setattr(module, "_SECONDS_OF_A_LOOK", 0.0)
    held.check()
    ((status, line),) = ends
    assert status == 43 and "was taken over by process 7 on h" in line
