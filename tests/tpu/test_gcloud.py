"""Commands against the grammar of the CLI that is installed, its answers as this launcher reads them."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spiral_jax.hardware import GENERATIONS, Slice
from tests.tpu.cloud import ERRORS, P
from tpu.gcloud import Gcloud, GcloudError, execute, kind_of
from tpu.job import PRICINGS, Job
from tpu.providers import provider_of
from tpu.providers.base import delete_command

ROOT = Path(__file__).parents[2]


def refused(commands: list[list[str]], folder) -> list[str]:
    """What `gcloud meta lint-gcloud-commands` says against commands, all in one call."""
    if shutil.which("gcloud") is None:
        pytest.skip("gcloud is not installed")
    file = folder / "commands.json"
    file.write_text(json.dumps([{"command_string": shlex.join(command)} for command in commands]))
    lint = ["gcloud", "meta", "lint-gcloud-commands", f"--commands-file={file}"]
    done = subprocess.run(lint, capture_output=True, text=True)
    if done.returncode and "Invalid choice" in done.stderr:
        pytest.skip("this gcloud cannot check commands")
    answers = json.loads(done.stdout)
    assert len(answers) == len({shlex.join(command) for command in commands})
    return [f"{a['command_string']}: {a['error_message']}" for a in answers if not a["success"]]


INTERRUPTED = """
import sys
from tpu.gcloud import execute
execute([sys.executable, "-c", '''
import signal, sys, time
signal.signal(signal.SIGINT, lambda *_: open("interrupted", "w"))
print("up", file=open("up", "w"), flush=True)
time.sleep(60)
'''], 60)
"""


def test_ctrl_c_reaches_the_launcher_and_not_its_command(tmp_path):
    """A terminal sends SIGINT to the whole group of processes in front; the command is then ended, not left."""
    launcher = subprocess.Popen([sys.executable, "-c", INTERRUPTED], cwd=tmp_path, start_new_session=True,
                                stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip
    try:
        while not (tmp_path / "up").exists() or not (tmp_path / "up").stat().st_size:
            assert launcher.poll() is None
            time.sleep(0.05)
        os.killpg(launcher.pid, signal.SIGINT)
        assert launcher.wait(30) == -signal.SIGINT
    finally:
        if launcher.poll() is None:
            launcher.kill()
    assert not (tmp_path / "interrupted").exists()


def jobs():
    """A job of each way to rent each generation, and more of its flags on every other one."""
    for generation in GENERATIONS:
        for provider in ("qr", "vm") if generation.runtime else ():
            for pricing in PRICINGS:
                for many in (1, 2) if provider == "qr" else (1,):
                    if provider == "vm" and pricing == "flex_start":
                        continue
                    more = {
                        "project": "my-project",
                        "network": "mine",
                        "subnetwork": "projects/my-project/regions/r/subnetworks/mine",
                        "service_account": "trainer@my-project.iam.gserviceaccount.com",
                    }
                    for given in ({}, more | {"internal_ips": True}, more | {"tunnel_through_iap": True}):
                        yield Job(
                            name="pile",
                            zone=generation.zones[0],
                            slice=Slice(generation, generation.shapes[-1]),
                            bucket="gs://my-bucket",
                            provider=provider,
                            pricing=pricing,
                            num_slices=many,
                            **given,
                        )


def commands_of(job: Job) -> list[list[str]]:
    """Every command that the launcher sends, as it sends it."""
    sent: list[list[str]] = []

    def record(arguments, timeout):
        sent.append(list(arguments))
        return 0, '{"state": {"state": "ACTIVE"}}' if "queued-resources" in arguments else '{"state": "READY"}', ""

    gcloud = Gcloud(job.project, execute=record)
    provider = provider_of(job, gcloud)
    provider.create(86400.5)
    provider.observe()
    provider.delete()
    gcloud.run(*provider.ssh("bash setup.sh start gs://my-bucket/pile abc --attempt=1"))
    gcloud.run(*provider.ssh("true", host=3))
    gcloud.run(*provider.scp("tpu/host/setup.sh", "setup.sh"))
    for kind in ("queued-resources", "tpu-vm"):
        gcloud.json("compute", "tpus", kind, "list", f"--zone={job.zone}")
        gcloud.run(*delete_command(kind, "pile", job.zone))
    return sent


def test_commands_pass_the_grammar_of_gcloud_and_bad_flags_do_not(tmp_path):
    some = [job for job in jobs() if job.slice.generation.name == "v5p" and job.internal_ips]
    good = [command for job in (some[0], some[3], some[-1]) for command in commands_of(job)]
    create = good[0]
    wrong = ["--accelerator-typ=v5p-8", "--preemptible", "--node-count=many"]
    bad = [[*create[:-1], flag, create[-1]] for flag in wrong]
    found = refused([*good, *bad], tmp_path)
    assert len(found) == len(wrong) and all(any(flag in line for line in found) for flag in wrong), found


@pytest.mark.slow
def test_commands_of_all_generations_and_prices_pass_the_grammar_of_gcloud(tmp_path):
    commands = {shlex.join(command): command for job in jobs() for command in commands_of(job)}
    assert len(commands) >= 234
    assert refused(list(commands.values()), tmp_path) == []


@pytest.mark.parametrize(
    "error, kind",
    [
        ("network", "unknown"), ("auth", "unknown"), ("no_account", "denied"), ("denied", "denied"),
        ("no_project", "unknown"), ("invalid", "invalid"), ("quota", "quota"), ("http_quota", "quota"),
        ("capacity", "capacity"), ("internal", "unknown"), ("503", "unknown"),
    ],
)  # fmt: skip
def test_errors_of_gcloud_are_told_apart(error, kind):
    assert kind_of(ERRORS[error].format(verb="tpu-vm.create", p=P), "nodes/pile") == kind


@pytest.mark.parametrize(
    "text, kind",
    [
        (f"ERROR: (gcloud.x) NOT_FOUND: Resource '{P}/us-east5-a/nodes/pile' was not found. More.", "not_found"),
        ("ERROR: (gcloud.x) NOT_FOUND: Requested entity was not found.", "not_found"),
        (
            f'content <{{ "error": {{ "code": 404, "status": "NOT_FOUND", "message": "{P}/z/nodes/pile" }} }}>',
            "not_found",
        ),
        (f"ERROR: (gcloud.x) NOT_FOUND: Resource '{P}/us-east5-a/nodes/pile-2' was not found", "unknown"),
        (f"ERROR: (gcloud.x) NOT_FOUND: Resource '{P}/us-east5-a' was not found", "unknown"),
        ("ERROR: (gcloud.x) HTTPError 404: <!DOCTYPE html> That's an error.", "unknown"),
        (f"ERROR: (gcloud.x) ALREADY_EXISTS: Resource '{P}/us-east5-a/nodes/pile' already exists", "exists"),
    ],
)
def test_only_an_explicit_not_found_of_the_resource_itself_is_one(text, kind):
    assert kind_of(text, "nodes/pile") == kind


def test_a_command_that_hangs_is_ended_with_its_children(tmp_path):
    marker = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(1.5); pathlib.Path({str(marker)!r}).write_text('')"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    gcloud = Gcloud(execute=lambda arguments, timeout: execute([sys.executable, "-c", parent], timeout))
    with pytest.raises(GcloudError, match="no answer in 0 s") as caught:
        gcloud.run("compute", "tpus", timeout=0.5)
    assert caught.value.kind == "unknown"
    time.sleep(1.5)
    assert not marker.exists()


def test_no_time_is_given_after_the_deadline():
    gcloud = Gcloud(execute=lambda arguments, timeout: pytest.fail("it ran"), clock=lambda: 100.0)
    gcloud.deadline = 99.0
    with pytest.raises(GcloudError, match="no time is left"):
        gcloud.run("compute", "tpus", "tpu-vm", "list")


def test_output_that_is_no_json_is_no_answer():
    with pytest.raises(GcloudError, match="not JSON") as caught:
        Gcloud(execute=lambda arguments, timeout: (0, "state=ACTIVE", "")).json("compute", "tpus", "tpu-vm", "list")
    assert caught.value.kind == "unknown"
