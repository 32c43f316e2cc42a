"""python -m tpu.first_hour: what it does when sections fail, die, hang, or have no time; and the file it writes."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tpu.first_hour import __main__ as program
from tpu.first_hour.agenda import SECTIONS

ROOT = Path(__file__).parents[3]
SCHEMA = json.loads((ROOT / "tpu" / "first_hour" / "schema.json").read_text())

# In place of a section's process: what it does is in the environment, by the section's name.
FAKE = """
import json, os, signal, sys, time
name, size, workdir, result = sys.argv[1:]
behaviour = json.loads(os.environ["BEHAVIOUR"]).get(name, "pass")
found = {"checks": [{"what": "x", "found": 0.0, "allowed": 1.0, "ok": True}], "measured": {"size": size}, "why": ""}
if name == "device":
    found["measured"] |= {"platform": os.environ.get("PLATFORM", "cpu"), "device_kind": "a device", "generation": None}
print("working on", name, flush=True)
if behaviour == "busy":
    tries = result + ".tries"
    open(tries, "a").write("x")
    if len(open(tries).read()) < 3:
        sys.exit("RuntimeError: Unable to initialize backend 'tpu': the TPU is already in use by process 7")
if behaviour == "hang":
    time.sleep(600)
if behaviour == "die":
    os.kill(os.getpid(), signal.SIGSEGV)
if behaviour == "fail":
    found["checks"].append({"what": "y", "found": 2.0, "allowed": 1.0, "ok": False})
if behaviour == "raise":
    found["why"] = "RuntimeError: no room"
with open(result, "w") as file:
    json.dump(found, file)
if behaviour == "raise":
    print("Traceback ...", file=sys.stderr)
    sys.exit(1)
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """(flags, behaviours by section) to the exit status, the file, and what was printed."""
    fake = tmp_path / "fake.py"
    fake.write_text(FAKE)
    child = program._child
    monkeypatch.setattr(
        program, "_child", lambda command, *rest: child([sys.executable, str(fake), *command[3:]], *rest)
    )
    output = tmp_path / "hour.json"
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def go(*flags, **behaviour):
        names = {name.replace("-", "_").replace(".", "_"): name for name in (section.name for section in SECTIONS)}
        monkeypatch.setenv("BEHAVIOUR", json.dumps({names[key]: value for key, value in behaviour.items()}))
        status = program.main([f"--output={output}", *flags])
        found = json.loads(output.read_text()) if output.exists() else None
        if found is not None:
            check(found)
        return status, found, capfd.readouterr()

    yield go
    for number, handler in before.items():
        signal.signal(number, handler)


def check(found):
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(found, SCHEMA)


def statuses(found):
    return {name: section["status"] for name, section in found["sections"].items()}


def test_all_pass(run):
    status, found, printed = run()
    assert status == found["exit_status"] == 0 and found["size"] == "tiny"
    assert statuses(found) == {section.name: "passed" for section in SECTIONS}
    assert "left] attention: working on attention" in printed.out and "m" in printed.out.partition(" left")[0]


def test_on_a_tpu_the_sizes_are_full(run, monkeypatch):
    monkeypatch.setenv("PLATFORM", "tpu")
    _, found, _ = run("--minutes=60")
    assert found["size"] == "full" and found["sections"]["attention"]["measured"]["size"] == "full"
    assert run("--size=tiny")[1]["size"] == "tiny"


def test_a_chip_that_is_not_free_yet_is_tried_again(run, monkeypatch):
    monkeypatch.setattr(program, "SECONDS_TO_FREE", 0.1)
    status, found, printed = run("--sections=attention,decoding", attention="busy", device="pass")
    assert status == 0 and found["sections"]["attention"]["tries"] == 3
    assert found["sections"]["decoding"]["tries"] == 1 and "the chip is not free yet" in printed.out
    monkeypatch.setattr(program, "TRIES", 1)
    assert run("--sections=attention", attention="busy")[0] == 1


@pytest.mark.parametrize(
    "given, expected", [(None, "tpu,cpu"), ("tpu", "tpu,cpu"), ("tpu,cpu", "tpu,cpu"), ("cpu", "cpu")]
)
def test_the_cpu_can_be_compared_with(given, expected, monkeypatch, tmp_path):
    """Whatever the notebook has set."""
    monkeypatch.setattr(program, "_has_tpu", lambda: True)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    if given is not None:
        monkeypatch.setenv("JAX_PLATFORMS", given)
    command = [sys.executable, "-c", "import os; print(os.environ['JAX_PLATFORMS'])"]
    with program._child(command, subprocess.DEVNULL, tmp_path) as child:
        assert child.stdout.read() == f"{expected}\n"


def test_every_section_survives_the_others(run):
    status, found, printed = run(attention="raise", training="die", decoding="fail")
    assert status == 1
    expected = {section.name: "passed" for section in SECTIONS}
    assert statuses(found) == expected | {"attention": "broken", "training": "broken", "decoding": "failed"}
    assert found["sections"]["attention"]["why"] == "RuntimeError: no room"
    assert found["sections"]["attention"]["log"] == ["Traceback ..."]
    assert found["sections"]["training"]["why"] == "its process ended by SIGSEGV"
    assert "6 passed, 2 broken, 1 failed" in printed.out


def test_a_section_that_hangs_is_ended(run, monkeypatch):
    monkeypatch.setattr(program, "_limit", lambda *_: 1.5)
    began = time.monotonic()
    status, found, _ = run("--sections=attention,decoding", attention="hang")
    assert status == 1 and time.monotonic() - began < 10
    assert statuses(found) == {"device": "passed", "attention": "broken", "decoding": "passed"}
    assert "not done after" in found["sections"]["attention"]["why"]


def test_what_does_not_fit_is_skipped_and_said_so(run):
    status, found, printed = run("--size=full", "--minutes=2.3")
    assert status == 42
    assert statuses(found)["attention"] == statuses(found)["training"] == "skipped"
    # Shorter ones still fit.
    assert statuses(found)["point-160m-vanilla"] == statuses(found)["checkpoint"] == "passed"
    assert "150 s at least" in found["sections"]["attention"]["why"] and "attention: skipped" in printed.out
    assert run("--size=full", "--minutes=2.3", checkpoint="fail")[0] == 1


def test_without_a_device_nothing_else_runs(run):
    status, found, printed = run(device="raise")
    assert status == 2 and list(found["sections"]) == ["device"]
    (line,) = printed.err.splitlines()
    assert line.startswith("error: no device (RuntimeError: no room); allowed:")


@pytest.mark.parametrize(
    "flag",
    ["--minutes=0", "--minutes=nan", "--minutes=soon", "--size=huge", "--sections=attention,coffee", "--output=/",
     "--output=/nowhere/x.json", "--compare=/nowhere.json", "--no_such_flag", "--workdir=s3://x/y"],
)  # fmt: skip
def test_a_wrong_flag_is_one_line(flag, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        status = program.main([flag])
    except SystemExit as end:
        status = end.code
    (line,) = capfd.readouterr().err.splitlines()
    assert status == 2 and line.startswith("error: ") and not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_keeps_what_there_is_and_leaves_no_process(number, tmp_path):
    (tmp_path / "fake.py").write_text(FAKE)
    (tmp_path / "pids").mkdir()
    code = f"""
        import sys
        from tpu.first_hour import __main__ as program
        child, fake = program._child, [sys.executable, {str(tmp_path / "fake.py")!r}]
        program._child = lambda command, *rest: child([*fake, *command[3:]], *rest)
        sys.exit(program.main(["--output={tmp_path}/hour.json"]))
    """
    environment = dict(os.environ, BEHAVIOUR='{"training": "hang"}', PYTHONPATH=str(ROOT))
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], env=environment, cwd=tmp_path,
                               stdout=subprocess.PIPE, text=True)  # fmt: skip
    for line in process.stdout:
        if "working on training" in line:
            break
    process.send_signal(number)
    rest = process.stdout.read()
    assert process.wait(20) == 128 + number
    found = json.loads((tmp_path / "hour.json").read_text())
    check(found)
    assert statuses(found)["attention"] == "passed" and statuses(found)["decoding"] == "skipped"
    assert found["exit_status"] == 128 + number and "wrote" in rest
    assert not subprocess.run(["pgrep", "-f", str(tmp_path / "fake.py")], capture_output=True).stdout


@pytest.mark.slow
def test_a_whole_rehearsal(tmp_path):
    """For real, on one CPU device: all sections pass."""
    environment = dict(os.environ, JAX_PLATFORMS="cpu", XLA_FLAGS="", PYTHONPATH=str(ROOT))
    command = [sys.executable, "-m", "tpu.first_hour", f"--output={tmp_path}/hour.json", f"--workdir={tmp_path}"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "hour.json").read_text())
    check(found)
    assert statuses(found) == {section.name: "passed" for section in SECTIONS}
    compared = subprocess.run(
        [*command[:3], f"--compare={tmp_path}/hour.json"], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert compared.returncode == 1 and "no prediction for a rehearsal" in compared.stdout


def test_what_a_section_has_found_survives_its_crash(tmp_path):
    """For real: a process that dies in the middle."""
    code = f"""
        import os, sys, types
        from tpu.first_hour import section
        dying = types.ModuleType("tpu.first_hour.device")
        def run(findings, size, workdir, argument):
            findings.at_most("first", 1, 2)
            findings.say("going on")
            findings.at_most("second", 1, 2)
            os.abort()
        dying.run = run
        sys.modules["tpu.first_hour.device"] = dying
        section.main("device", "tiny", "", {str(tmp_path / "result.json")!r})
    """
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=environment, cwd=ROOT, capture_output=True)
    assert done.returncode == -signal.SIGABRT
    found = json.loads((tmp_path / "result.json").read_text())
    assert [check["what"] for check in found["checks"]] == ["first"] and found["why"] == ""
