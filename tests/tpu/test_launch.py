"""The verbs as they are typed, against the cloud in virtual time, and once against the program on PATH."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.tpu.cloud import DIRECT, QUEUED, Cloud
from tests.tpu.test_stories import queued
from tests.tpu.world import World
from tpu import hosts, launch
from tpu.memory import Store

JOB = ["pile", "--accelerator=v5p-16", "--zone=us-east5-a", "--bucket=gs://my-bucket/runs", "--project=my-project"]
CONFIG = ["--config=experiments/pile.py:1.4b,spiral_b", "--skip_plan"]


def typed(world: World, verb: str, *flags: str, job: Sequence[str] = JOB) -> int:
    """A verb in a world."""
    return launch.main(
        [verb, *job, *flags],
        execute=world.execute,
        make_bucket=lambda url, patience=0: world.bucket,
        say=world.say,
        clock=lambda: world.cloud.now,
        sleep=world.sleep,
    )


def test_create_then_run_then_status_then_delete(world, capsys):
    assert typed(world, "create", *CONFIG) == 0
    assert world.heard("PLAN SKIPPED") and "it does not bill yet" in world.said[-1]
    assert typed(world, "create", *CONFIG) == 0  # again
    assert world.created() == 1
    assert typed(world, "run", *CONFIG) == 2
    assert "pile is ACCEPTED; allowed: a READY slice" in capsys.readouterr().err
    world.cloud.now += 3600
    assert typed(world, "run", *CONFIG) == 0
    world.cloud.now += 30
    assert typed(world, "run", *CONFIG) == 0 and world.heard("attempt 1 runs")
    assert len(world.attempts) == 1

    rows = [{"step": 1200, "loss": 2.5, "step_time": 0.5, "tokens_per_second": 1_000_000, "mfu": 0.412}, {"step": 1210}]
    rows[1] |= rows[0] | {"step": 1210, "loss": None}
    world.bucket.objects["run/metrics/000000001.jsonl"] = (b'{"step": 1}\n', 1)
    world.bucket.objects["run/metrics/000001200.jsonl"] = ("\n".join(map(json.dumps, rows)).encode(), 1)
    world.bucket.objects["run/config.json"] = (json.dumps({"train": {"steps": 10000}}).encode(), 1)
    world.said.clear()
    assert typed(world, "status", "--price=2", "--max_chip_hours=100") == 0
    text = "\n".join(world.said)
    assert "ACTIVE, pile READY" in text and "2 running (of 2)" in text
    assert "step 1,210 of 10,000, loss 2.5000, 1,000,000 tokens/s, MFU 41.2%, 1.2 hours left" in text
    assert " of 100 chip-hours" in text and "BILLS; delete it with" in text

    assert typed(world, "delete") == 0
    assert world.left() == [] and "nothing bills" in world.said[-1]
    assert typed(world, "delete") == 0  # again
    assert typed(world, "status") == 0 and world.heard("deleted, as `delete` asked")


def test_status_of_what_never_was(world):
    assert typed(world, "status") == 0
    assert world.heard("no step yet") and "nothing bills" in world.said[-1]


@pytest.mark.parametrize(
    "error, says", [("quota", "has been exceeded"), ("denied", "PERMISSION_DENIED"), ("capacity", "no more")]
)
def test_a_create_that_fails_says_why_and_that_nothing_bills(world, error, says):
    world.cloud.script["fail"] = [{"when": " create ", "error": error}]
    assert typed(world, "create", "--config=experiments/pile.py:1.4b", "--skip_plan") == 2
    assert world.heard(says) and "nothing bills" in world.said[-1]


@pytest.mark.parametrize("error", ["network", "auth"])
def test_create_asks_before_it_creates(world, error, capsys):
    world.cloud.script["fail"] = [{"when": " describe ", "error": error}]
    assert typed(world, "create", "--config=experiments/pile.py:1.4b", "--skip_plan") == 2
    assert world.created() == 0 and not any(" create " in line for _, line in world.cloud.log)


def test_delete_ends_a_babysitter_that_lives(world):
    """It finds out at its next look, and touches nothing."""
    sleep, deleted = world.sleep, []

    def also_delete(seconds):
        sleep(seconds)
        if world.elapsed > 1000 and not deleted:
            deleted.append(typed(world, "delete"))

    first = world.babysitter("first:1:a")
    first.sleep = also_delete
    with pytest.raises(launch.SpiralError, match=r"launch.json was written by another launcher"):
        first.run()
    assert deleted == [0] and world.left() == [] and world.created() == 1


def test_delete_works_without_a_bucket(world):
    world.killed(at=100)
    world.bucket_down = [(0, 10**9)]
    assert len(world.left()) == 1
    assert typed(world, "delete") == 0 and world.left() == []


def test_babysit_wants_a_cap_and_does_what_it_says(world, capsys):
    flags = ["--config=experiments/pile.py:1.4b", "--skip_plan"]
    assert typed(world, "babysit", *flags) == 2
    assert "--max_chip_hours is missing; allowed: a number" in capsys.readouterr().err
    world.bucket.objects["control/stop"] = (b"0", 1)  # of an earlier life
    assert typed(world, "babysit", *flags, "--max_chip_hours=200") == 0
    assert world.heard("the end: finished") and world.left() == []


def test_gke_writes_a_manifest_and_prints_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    world = World()
    flags = ["--provider=gke", "--config=experiments/pile.py:1.4b", "--skip_plan", "--image=docker.io/me/spiral"]
    assert typed(world, "create", *flags) == 0
    assert "kind: JobSet" in (tmp_path / "pile.jobset.yaml").read_text()
    assert world.bucket.objects == {} and world.cloud.log == []
    assert world.heard("kubectl apply --server-side --filename=pile.jobset.yaml")
    assert typed(world, "babysit", *flags) == 2
    assert "--provider is 'gke'; allowed: qr or vm for this verb" in capsys.readouterr().err


def test_dry_runs_print_commands_and_change_nothing(monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123")
    code = launch.pack(launch.ROOT)  # once
    monkeypatch.setattr(launch, "pack", lambda root: code)

    class NoBucket:
        def __getattr__(self, name):
            pytest.fail(f"the bucket was asked to {name}")

    def no_command(arguments, timeout):
        pytest.fail(f"{arguments} ran")

    flags = ["--config=experiments/pile.py:1.4b", "--config.logging.wandb=0123456789abcdef0123", "--max_chip_hours=9"]
    for verb in ("create", "setup", "run", "babysit", "status", "logs", "stop", "delete"):
        arguments = [verb, *JOB, *flags, "--dry_run", "--skip_plan"]
        assert launch.main(arguments, execute=no_command, make_bucket=lambda url, patience=0: NoBucket()) == 0
    assert launch.main(["reap", "--dry_run"], execute=no_command) == 0
    out = capsys.readouterr().out
    assert "0123456789abcdef" not in out
    lines = [line for line in out.splitlines() if line.startswith("gcloud ")]
    assert any("queued-resources create pile --zone=us-east5-a --accelerator-type=v5p-16" in line for line in lines)
    assert any("queued-resources delete pile --zone=us-east5-a --force" in line for line in lines)
    assert any("queued-resources list --zone=europe-west4-b" in line for line in lines)


@pytest.mark.parametrize("verb", ["create", "setup", "run", "babysit"])
def test_what_was_stopped_before_is_over(world, verb, monkeypatch):
    if verb in ("setup", "run"):
        assert typed(world, "create", *CONFIG) == 0
        world.cloud.now += 3600
    monkeypatch.setattr(hosts, "wait_until_tested", lambda *given: None)
    world.bucket.objects["control/stop"] = (b"0", 1)
    assert typed(world, verb, *CONFIG, *["--max_chip_hours=100"] * (verb == "babysit")) == 0
    assert "control/stop" not in world.bucket.objects


def test_set_up_leaves_a_job_that_runs_alone(world, capsys):
    assert typed(world, "create", *CONFIG) == 0
    world.cloud.now += 3600
    assert typed(world, "run", *CONFIG) == 0
    world.cloud.now += 30
    assert typed(world, "setup", *CONFIG) == 2
    assert "pile, whose attempt 1 runs'; allowed: a job that `stop` has ended" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--config=nope.py", "--import=nope.py"])
def test_a_slice_is_neither_made_nor_lost_for_a_file_that_is_not_there(world, flag, capsys):
    """Also where nothing is planned: because that was skipped, or as a launcher before has made the slice."""
    flags = [*CONFIG, flag, "--skip_plan"] if "import" in flag else ["--skip_plan", flag]
    assert typed(world, "babysit", *flags, "--max_chip_hours=100") == 2 and world.left() == []
    assert f"{flag.replace('=', ' is ').replace('nope.py', repr('nope.py'))}; allowed: " in capsys.readouterr().err
    assert typed(world, "create", *CONFIG) == 0
    world.cloud.now += 3600
    for verb, *cap in (["run"], ["babysit", "--max_chip_hours=100"]):
        assert typed(world, verb, *flags, *cap) == 2 and len(world.left()) == 1
    memory = Store(world.bucket).load()
    assert (memory.attempt, memory.failures) == (0, 0)


@pytest.mark.parametrize(
    "content", [b'{"step": 1', b"[1]", b'{"step": 1, "loss": 1.0}', b'{"step": 1, "step_time": null}', b"\xff"]
)
def test_the_status_of_metrics_that_are_none(world, content):
    """What bills is said all the same."""
    assert typed(world, "create", *CONFIG) == 0
    world.bucket.objects["run/metrics/00000001.jsonl"] = (content, 1)
    world.bucket.objects["run/metrics/readme.txt"] = (b"x", 1)
    world.bucket.objects["run/config.json"] = (b'{"train": {"steps": 9}}', 1)
    assert typed(world, "status") == 0
    assert world.heard("training  not known (the newest metrics are something else: ")


@pytest.mark.parametrize("host", ["-1", "2"])
def test_logs_of_a_host_that_is_not_there(world, host, capsys):
    assert typed(world, "logs", f"--host={host}") == 2
    assert f"--host is {host}; allowed: 0 to 1" in capsys.readouterr().err


def test_reap_lists_what_is_ours_in_all_zones_and_deletes_only_if_told(capsys):
    cloud = Cloud({"timelines": [QUEUED, DIRECT, queued((600, {"state": "SUSPENDED"})), QUEUED]})
    make = ["gcloud", "compute", "tpus"]
    ours = ["--labels=spiral-jax={}", "--accelerator-type=v5p-8", "--runtime-version=x"]

    def create(kind: str, name: str, zone: str, *flags: str) -> None:
        label = [] if name == "theirs" else [ours[0].format(name)]
        cloud.execute([*make, kind, "create", name, f"--zone={zone}", *label, *ours[1:], *flags])

    create("queued-resources", "pile", "us-east5-a", "--node-id=pile")
    create("tpu-vm", "leaked", "europe-west4-b")
    create("queued-resources", "old", "us-central1-a", "--node-id=old")
    create("queued-resources", "theirs", "us-east5-a", "--node-id=theirs")
    cloud.now += 1000
    world = {"execute": cloud.execute}
    cloud.script["fail"] = [{"when": "list --zone=us-south1-a", "error": "denied"}]
    assert launch.main(["reap", "--project=my-project"], **world) == 2  # one zone could not be looked at
    out = capsys.readouterr().out
    assert "pile: queued-resources pile in us-east5-a: ACTIVE v5p-8: BILLS" in out
    assert "leaked: tpu-vm leaked in europe-west4-b: READY v5p-8: BILLS" in out
    assert "old: queued-resources old in us-central1-a: SUSPENDED v5p-8: does not bill now, keeps its name" in out
    assert "theirs" not in out and "not looked at: us-south1-a" in out and "3 found, 2 of them bill" in out
    assert not any(" delete " in line for _, line in cloud.log)

    cloud.script["fail"] = []
    assert launch.main(["reap", "leaked", "--delete"], **world) == 0
    cloud.now += 100
    assert {one.name for one in cloud.there()} == {"pile", "old", "theirs"}
    # One that cannot be deleted keeps none of the others, and is named.
    cloud.script["fail"] = [{"when": " delete old ", "error": "denied"}]
    assert launch.main(["reap", "--delete"], **world) == 2
    cloud.now += 100
    assert {one.name for one in cloud.there()} == {"old", "theirs"}
    assert "not deleted: old in us-central1-a: gcloud" in capsys.readouterr().out
    cloud.script["fail"] = []
    assert launch.main(["reap", "--delete"], **world) == 0
    cloud.now += 100
    assert {one.name for one in cloud.there()} == {"theirs"}


def test_verbs_against_the_program_on_path(tmp_path, monkeypatch):
    """The double as a program: what is a function call elsewhere is a process here."""
    program = tmp_path / "bin" / "gcloud"
    program.parent.mkdir()
    double = Path(__file__).parent / "gcloud_double.py"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -S {double} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    monkeypatch.setenv("GCLOUD_DOUBLE", str(tmp_path))
    (tmp_path / "scenario.json").write_text(json.dumps({"speed": 200, "deletes": 100}))
    world, said = World(), []
    rest = {"make_bucket": lambda url, patience=0: world.bucket, "say": said.append, "sleep": lambda seconds: None}
    flags = [*JOB, "--config=experiments/pile.py:1.4b", "--skip_plan"]
    assert launch.main(["create", *flags], **rest) == 0
    assert (tmp_path / "there").read_text() == "pile"
    assert launch.main(["create", *flags], **rest) == 0
    assert launch.main(["status", *flags], **rest) == 0
    # A `not found` soon after a create would be waited for; that is real time here.
    world.bucket.objects["launch.json"] = (json.dumps(world.remembered() | {"asked": 0}).encode(), 99)
    assert launch.main(["delete", *flags], **rest) == 0
    assert "nothing bills" in said[-1]
    log = (tmp_path / "log").read_text()
    assert log.count(" create ") == 1 and log.count(" delete pile --zone=us-east5-a --force --async") == 1
