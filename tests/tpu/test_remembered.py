"""What is remembered on the bucket survives outages, other launchers and other flags."""

import dataclasses
import json
from dataclasses import replace

import pytest

from spiral_jax.errors import SpiralError
from tests.tpu.cloud import DIRECT, QUEUED
from tests.tpu.test_launch import CONFIG, JOB, typed
from tests.tpu.world import World
from tpu import launch
from tpu.decide import Action, JobStatus, decide
from tpu.memory import Memory
from tpu.providers import Observation, State

FOR_DAYS = {"jobs": [{"runs": 10**6, "status": 0}]}


def left_alone(**more) -> World:
    """A job that trains, and whose launcher is dead."""
    world = World(FOR_DAYS | more)
    world.killed(at=100)
    world.cloud.now += 600
    world.said.clear()
    return world


def test_a_deletion_without_the_bucket_remembers_what_was():
    world = left_alone()
    before = world.remembered()
    world.bucket_down = [(world.elapsed, world.elapsed + 15)]
    assert world.babysitter("x:1:a").delete() == 0 and world.left() == []
    after = world.remembered()
    assert world.heard("cannot be used") and after["phase"] == "ended" and after["attempt"] == before["attempt"] == 1
    assert after["chip_seconds"] >= before["chip_seconds"] > 0


def test_what_another_version_has_written_is_not_replaced():
    world = left_alone()
    world.bucket.put("launch.json", {"of": "another version"})
    assert world.babysitter("x:1:a").delete() == 0 and world.left() == []
    assert world.remembered() == {"of": "another version"}


def test_a_launcher_that_was_overtaken_writes_nothing_any_more():
    """`delete` writes while `run` asks the cloud: what `run` remembers is no longer so."""
    world = World(FOR_DAYS)
    assert typed(world, "create", *CONFIG) == 0
    world.cloud.now += 3600
    mine, theirs = world.babysitter("elsewhere:1:a"), world.babysitter("elsewhere:2:b")
    with pytest.raises(SpiralError, match="written by another launcher"), mine._holding():
        theirs.memory = theirs.store.save(replace(theirs.store.load(), phase="deleting", ending="deleted", result=2))
        mine.memory = mine.store.save(mine.memory)
    assert world.remembered()["owner"] == "elsewhere:2:b" and world.remembered()["phase"] == "deleting"
    assert theirs._watch() == 2 and world.left() == []


def test_a_slice_that_was_kept_is_not_forgotten_by_a_start_that_saw_nothing():
    outage = {"when": r" describe .*us-east5-a", "error": "auth", "from": 6000, "to": 10000}
    world = left_alone(fail=[outage])
    world.bucket.objects["control/stop"] = (str(world.cloud.now).encode(), 1)
    assert world.run() == 42 and world.left() and world.remembered()["kept"]
    world.bucket.delete("control/stop")
    world.cloud.now = world.cloud.start + 6100
    world.interrupt_at = world.elapsed + 200
    assert world.run() == 130
    world.job = replace(world.job, zone="us-central1-a")
    with pytest.raises(SpiralError, match="allowed, until it is deleted: my-project us-east5-a"):
        world.run(hours=1)
    assert world.created() == 1


@pytest.mark.parametrize("verb, status", [("status", 0), ("stop", 2), ("delete", 2)])
def test_a_slice_elsewhere_is_said_to_bill(verb, status, capsys):
    world = left_alone()
    there = "my-project us-east5-a qr v5p:2x2x2 x 1, where it has a slice"
    assert typed(world, verb, job=[word.replace("us-east5-a", "us-central1-a") for word in JOB]) == status
    said = "\n".join(world.said) + capsys.readouterr().err
    assert there in said and "nothing bills" not in said and len(world.left()) == 1


def test_babysit_elsewhere_does_not_say_that_nothing_bills():
    world = left_alone()
    world.job = replace(world.job, zone="us-central1-a")
    with pytest.raises(SpiralError, match="where it has a slice"):
        world.babysitter("x:1:b").run()
    assert world.heard("pile may bill in my-project us-east5-a") and not world.heard("nothing bills")


def test_stop_reaches_a_job_that_waits_for_chips():
    world = World({"timelines": [[QUEUED[0], {"at": 5000, "state": "ACTIVE"}]]} | FOR_DAYS)
    babysitter, sleep, stopped = world.babysitter(), world.sleep, []

    def and_stop(seconds):
        sleep(seconds)
        if world.elapsed > 1000 and not stopped:
            stopped.append(typed(world, "stop"))

    babysitter.sleep = and_stop
    assert babysitter.run() == 42 and stopped == [0] and not world.attempts
    assert world.heard("asked for on the bucket; pile is ACCEPTED, attempt 0")


def test_stop_of_a_slice_that_was_taken_away_asks_no_hosts():
    world = left_alone()
    one = world.cloud.slices[0]
    one.timeline = [*one.timeline, {"at": world.cloud.now - one.created, "state": "SUSPENDED"}]
    world.cloud.now += 10
    assert typed(world, "stop") == 0
    assert not any(" ssh " in line and when > one.created + 700 for when, line in world.cloud.log)
    assert "control/stop" in world.bucket.objects and world.heard("it does not bill")


@pytest.mark.parametrize("started", [True, False])
def test_an_attempt_that_hosts_were_being_told_of_is_begun_anew(started):
    """Under a number of its own: what is on the bucket for the old one may be mended since."""
    job, now = World().job, 10_000.0
    memory = Memory(phase="present", attempt=1, starting=True, looked=now)
    status = JobStatus(beat=now - 5 if started else 0)
    decision = decide(job, memory, Observation(State.READY, billing=True), status, now)
    assert (decision.action, decision.memory.attempt) == ((Action.WAIT, 1) if started else (Action.START, 2))


@pytest.mark.parametrize("memory, goes_on", [({"deleted": 90}, True), ({"started": 50}, True), ({}, False)])
def test_labels_left_out_while_it_is_deleted(memory, goes_on):
    seen = Observation(State.READY, "ACTIVE, pile READY", billing=True, ours=None)
    known = Memory(phase="deleting", attempt=1, looked=90, ending="the cap", result=2, **memory)
    decision = decide(World().job, known, seen, JobStatus(), 1000.0)
    assert (decision.action is Action.DELETE) is goes_on and (decision.action is Action.END) is not goes_on


@pytest.mark.parametrize(
    "fail, streak",
    [
        ([{"when": " create ", "error": "network", "nth": [1], "effect": True}], 6),
        (
            [
                {"when": " create ", "error": "network", "from": 0, "to": 4000},
                {"when": " create ", "error": "503", "effect": True, "from": 4000, "to": 7400},
            ],
            0,
        ),
    ],
    ids=["after preemptions", "after an hour without a network"],
)
def test_chips_do_not_wait_for_a_pause_before_another_create(fail, streak):
    world = World({"timelines": [DIRECT], "fail": fail}, provider="vm")
    place = "my-project us-east5-a vm v5p:2x2x2 x 1"
    world.bucket.put("launch.json", vars(Memory(streak=streak, preemptions=streak, attempt=streak, where=place)))
    assert world.run() == 0
    ready, told = (
        next(float(line.split()[0]) for line in world.said if what in line) for what in (": ready", "set-up")
    )
    assert told - ready < 120 and world.created() == 1


def refuse(root):
    raise SpiralError("dump.bin has 12,000,000 bytes; allowed: 10,000,000; ignore it for git")


def test_a_start_that_is_refused_says_what_bills(monkeypatch, capsys):
    world = left_alone()
    monkeypatch.setattr(launch, "pack", refuse)
    assert typed(world, "babysit", *CONFIG, "--max_chip_hours=100") == 2
    assert "dump.bin has" in capsys.readouterr().err and "BILLS; delete it with" in world.said[-1]
    world = World()
    assert typed(world, "babysit", *CONFIG, "--max_chip_hours=100") == 2 and not world.said


@pytest.mark.parametrize("labels", ["--labels=spiral-jax=pile,spiral-jax-root=00", "--spot"])
def test_a_slice_of_somebody_else_is_neither_created_nor_run(world, labels, capsys):
    world.cloud.execute(
        [
            *("gcloud", "compute", "tpus", "queued-resources", "create", "pile", "--zone=us-east5-a"),
            *("--accelerator-type=v5p-16", "--runtime-version=x", "--node-id=pile", labels),
        ]
    )
    world.cloud.now += 600
    for verb in ("create", "run"):
        assert typed(world, verb, *CONFIG) == 2
        assert "pile is there and is not labelled" in capsys.readouterr().err
    assert not any(" delete " in line for _, line in world.cloud.log)


def test_all_of_a_memory_is_of_json():
    assert Memory(**json.loads(json.dumps(dataclasses.asdict(Memory())))) == Memory()
