"""What a job, a cloud, a bucket and a launcher can do to each other, beside the stories."""

import dataclasses
import itertools

import pytest

from spiral_jax.errors import SpiralError, Unreachable
from spiral_jax.hardware import parse_slice
from tests.tpu.cloud import DIRECT, QUEUED
from tests.tpu.test_stories import ended_well, queued
from tests.tpu.world import World
from tpu import hosts
from tpu.babysit import what_bills
from tpu.memory import Memory, Taken
from tpu.providers import Observation, State, provider_of


def creates(world: World) -> list[float]:
    return [when - world.cloud.start for when, line in world.cloud.log if " create " in line]


@pytest.mark.parametrize(
    "status, result, attempts, heard",
    [
        (0, 0, 1, "the end: finished (host 0: exit status 0"),
        (1, 1, 2, "a fault of ours, twice"),
        (2, 2, 1, "the end: something that only you can mend (host 0: exit status 2: last line)"),
        (42, 42, 4, "interruption 4 (at most 3 are taken): saved but unfinished"),
        (43, 1, 3, "failure 3 (at most 2 are taken): host 0: exit status 43"),
        (44, 44, 1, "the end: diverged"),
        (137, 1, 3, "failure 3 (at most 2 are taken): host 0: exit status 137"),
        (None, 1, 3, "failure 3 (at most 2 are taken): host 0: died silently"),
    ],
)
def test_each_exit_status_for_ever(status, result, attempts, heard):
    world = World({"jobs": [{"runs": 600, "status": status}]}, max_failures=2, max_preemptions=3)
    assert world.run() == result
    assert len(world.attempts) == attempts and world.heard(heard), world.said
    assert world.created() == 1 and world.left() == [] and world.heard("nothing bills")


@pytest.mark.parametrize("status", [1, 42, 43, 137, None])
def test_each_exit_status_that_is_started_again(status):
    world = World({"jobs": [{"runs": 600, "status": status}, {"runs": 600, "status": 0}]})
    ended_well(world, world.run())
    assert world.created() == 1 and len(world.attempts) == 2


def test_hosts_that_are_silent_while_the_slice_is_well_are_a_failure():
    world = World({"jobs": [{"runs": 600, "status": 0, "mute": True}, {"runs": 600, "status": 0}]}, max_failures=1)
    ended_well(world, world.run())
    assert world.heard("failure 1 (at most 1 are taken): no sign of life of some host for 10 minutes")


def test_pauses_double_and_preemptions_have_a_cap():
    lost = [*QUEUED, {"at": 150, "state": "SUSPENDED"}]
    world = World({"timelines": [lost]}, max_preemptions=8)
    assert world.run() == 42
    assert world.created() == 9 and world.left() == [] and world.heard("allowed: a larger --max_preemptions")
    pauses = [later - sooner for sooner, later in itertools.pairwise(creates(world))]
    assert pauses == sorted(pauses) and pauses[-1] > 1800 > pauses[0]


@pytest.mark.parametrize("provider, timeline", [("qr", QUEUED), ("vm", DIRECT)])
@pytest.mark.parametrize("error", ["quota", "http_quota"])
def test_a_quota_that_is_never_granted(provider, timeline, error):
    fail = [{"when": " create ", "error": error}]
    world = World({"fail": fail, "timelines": [timeline]}, provider=provider, max_failures=3)
    assert world.run() == 2
    assert len(creates(world)) == 4 and world.created() == 0 and world.heard("has been exceeded. Limit: 0")
    assert world.heard("nothing bills")


def test_a_quota_that_was_still_being_given_back():
    world = World({"fail": [{"when": " create ", "error": "quota", "nth": [1, 2]}]})
    ended_well(world, world.run())
    assert len(creates(world)) == 3


def test_a_direct_create_is_tried_every_30_to_60_seconds_until_there_is_capacity():
    fail = [{"when": " create ", "error": "capacity", "from": 0, "to": 7200}]
    world = World({"fail": fail, "timelines": [DIRECT]}, provider="vm", max_failures=0, max_preemptions=0)
    ended_well(world, world.run())
    pauses = [later - sooner for sooner, later in itertools.pairwise(creates(world))]
    assert len(pauses) > 100 and all(30 <= pause <= 60 + 10 for pause in pauses)


@pytest.mark.parametrize("error, status", [("denied", 2), ("no_account", 2), ("invalid", 2)])
@pytest.mark.parametrize("provider", ["qr", "vm"])
def test_a_create_that_is_refused_ends_it(error, status, provider):
    world = World({"fail": [{"when": " create ", "error": error}]}, provider=provider)
    assert world.run() == status
    assert len(creates(world)) == 1 and world.heard("nothing bills")


@pytest.mark.parametrize("error", ["network", "hang", "internal", "503"])
@pytest.mark.parametrize("effect", [False, True])
@pytest.mark.parametrize("provider", ["qr", "vm"])
def test_a_create_of_which_nobody_knows_what_became(error, effect, provider):
    fail = {"when": " create ", "error": error, "nth": [1], "effect": effect and error != "hang"}
    world = World({"fail": [fail], "lands": 15}, provider=provider)
    ended_well(world, world.run())
    assert world.created() == 1


def test_a_create_that_came_true_in_part():
    """Of two slices one has no node, and then the request fails."""
    half = [*QUEUED[:3], {"at": 120, "state": "ACTIVE", "nodes": {"1": None}}]
    world = World({"timelines": [half, QUEUED]}, num_slices=2)
    ended_well(world, world.run())
    assert world.created() == 2 and world.heard("pile-1 NOT_FOUND")
    assert "--node-count=2 --node-prefix=pile" in " ".join(line for _, line in world.cloud.log)


def test_a_request_that_the_service_gives_up_is_a_failure():
    bad = {"state": "FAILED", "error": {"code": 3, "message": "The given subnetwork is not there."}}
    world = World({"timelines": [[*QUEUED[:2], {"at": 90, **bad}]]}, max_failures=1)
    assert world.run() == 1
    assert world.created() == 2 and world.left() == [] and world.heard("The given subnetwork is not there.")


def test_a_direct_node_that_failed_while_it_was_made_is_removed():
    broken = [{"at": 0, "state": "CREATING"}, {"at": 50, "state": "TERMINATED"}]
    fail = {"when": " create ", "error": "internal", "nth": [1], "effect": True}
    world = World({"timelines": [broken, DIRECT], "fail": [fail]}, provider="vm")
    ended_well(world, world.run())
    assert world.created() == 2


@pytest.mark.parametrize("hours", [0.05, 3, 20])
@pytest.mark.parametrize(
    "script", [{"jobs": [{"runs": 10**6, "status": 0}]}, {"jobs": [{"trouble": "host 1: no route"}]}]
)
def test_the_cap_of_chip_hours_ends_everything(hours, script):
    world = World(script | {"deletes": 250}, max_chip_hours=hours, max_failures=100)
    assert world.run() == 2
    assert world.left() == [] and world.heard("chip-hours are spent; allowed: a larger --max_chip_hours")
    assert world.cloud.billed() * 8 / 3600 <= hours
    assert hours < 1 or world.cloud.billed() * 8 / 3600 > hours - 1.2


@pytest.mark.parametrize("provider", ["qr", "vm"])
@pytest.mark.parametrize("fault", [{}, {"when": " ssh ", "error": "hang"}])
def test_the_cap_holds_while_hosts_do_not_answer(provider, fault):
    script = {"fail": [fault] if fault else [], "set_up": 5000, "timelines": [QUEUED if provider == "qr" else DIRECT]}
    world = World(script, provider=provider, max_chip_hours=5, max_failures=100)
    assert world.run() == 2
    assert world.left() == [] and world.cloud.billed() * 8 / 3600 <= 5


def test_the_cap_holds_over_launchers_and_slices():
    lost = queued((2000, {"state": "SUSPENDED"}))
    world = World({"timelines": [lost], "jobs": [{"runs": 10**6, "status": 0}]}, max_chip_hours=15)
    for _ in range(4):
        world.killed(at=150)
        world.cloud.now += 60
    assert world.run() == 2
    assert world.created() > 2 and world.left() == []
    assert 8 < world.cloud.billed() * 8 / 3600 <= 15


def test_a_deletion_that_fails_at_first_is_sent_again():
    fail = [{"when": " delete ", "error": "network", "nth": [1, 2, 3]}]
    world = World({"fail": fail, "jobs": [{"runs": 60, "status": 0}]})
    ended_well(world, world.run())


def test_a_finished_job_may_keep_its_slice_and_is_still_not_created_again():
    world = World({"jobs": [{"runs": 60, "status": 0}]}, delete_at_success=False)
    assert world.run() == 0
    assert len(world.left()) == 1 and "BILLS; delete it with: python -m tpu.launch delete pile" in world.said[-1]
    assert world.run() == 0 and world.created() == 1
    assert world.babysitter("x:1:a").delete() == 0 and world.left() == []
    assert world.run() == 0 and world.created() == 1


def test_stop_is_not_answered_by_a_new_start():
    world = World({"jobs": [{"runs": 90000, "status": 0}]})
    world.killed(at=100)
    world.bucket.objects["control/stop"] = (str(world.cloud.now + 600).encode(), 1)
    assert world.run() == 42
    assert len(world.attempts) == 1 and "BILLS; delete it with" in world.said[-1]
    assert world.remembered()["kept"]


def test_a_bucket_that_does_not_answer_stops_what_is_new_and_not_what_ends():
    """While it is away the slice is lost, and then the chip-hours run out."""
    lost = queued((3000, {"state": "SUSPENDED"}))
    world = World({"timelines": [lost, QUEUED], "bucket_down": [(2500, 20000)], "jobs": [{"runs": 3600, "status": 0}]})
    ended_well(world, world.run())
    assert creates(world)[1] >= 20000
    world = World({"bucket_down": [(2500, 90000)], "jobs": [{"runs": 80000, "status": 0}]}, max_chip_hours=30)
    world.run()
    assert world.left() == [] and world.cloud.billed() * 8 / 3600 <= 30


@pytest.mark.parametrize("write", range(1, 16))
def test_an_answer_of_the_bucket_that_is_lost(write):
    """The launcher finds its own memory, of another generation than it knows."""
    world = World({"answers_lost": [write], "jobs": [{"runs": 600, "status": 0}]})
    try:
        ended_well(world, world.run())
    except Unreachable:  # the first one, before anything is begun: it says so and ends
        assert write == 1 and world.heard("nothing bills")
        ended_well(world, world.run())
    assert world.created() == 1


def test_a_launcher_that_is_told_of_another_says_what_bills():
    world = World({"jobs": [{"runs": 10**6, "status": 0}]})
    world.killed(at=60)
    world.cloud.now += 400
    one = world.babysitter("elsewhere:1:b")

    def sleep(seconds):
        world.bucket.put("launch.json", {"owner": "elsewhere:2:c", "phase": "present"})
        world.sleep(seconds)

    one.sleep = sleep
    with pytest.raises(Taken, match="elsewhere:2:c"):
        one.run()
    assert "BILLS; delete it with" in world.said[-1]


def test_what_was_counted_before_a_stop_is_not_counted_again():
    world = World({"jobs": [{"runs": 40000, "status": 0}]}, max_chip_hours=170)
    world.killed(at=100)
    world.bucket.objects["control/stop"] = (str(world.cloud.now + 20000).encode(), 1)
    assert world.run() == 42
    world.bucket.delete("control/stop")
    world.cloud.now += 7200  # it bills on
    ended_well(world, world.run())
    counted = world.remembered()["chip_seconds"] / 8
    assert counted == pytest.approx(world.cloud.billed(), rel=0.02)


@pytest.mark.parametrize("status", [2, 44])
def test_what_is_mended_may_go_on_under_its_name(status):
    world = World({"jobs": [{"runs": 600, "status": status}, {"runs": 600, "status": 0}]})
    assert world.run() == status and world.left() == []
    ended_well(world, world.run())
    assert len(world.attempts) == 2


def test_a_finished_job_that_kept_its_slice_is_not_run_again():
    world = World({"jobs": [{"runs": 60, "status": 0}]}, delete_at_success=False)
    assert world.run() == 0
    world.job = dataclasses.replace(world.job, delete_at_success=True)
    with pytest.raises(SpiralError, match="has finished; allowed: another NAME"):
        world.babysitter("x:1:a").start()
    assert len(world.left()) == 1 and len(world.attempts) == 1


def test_stop_while_a_create_is_landing_does_not_say_that_nothing_bills():
    script = {"lands": 60, "fail": [{"when": " create ", "error": "network", "effect": True}]}
    for step in range(1, 50):
        world = World(script)
        world.killed(at=step)
        if world.created():
            break
    world.bucket.objects["control/stop"] = (str(world.cloud.now).encode(), 1)
    world.cloud.now += 1
    assert world.run() == 42
    assert len(world.left()) == 1 and "delete it with: python -m tpu.launch delete pile" in world.said[-1]


@pytest.mark.parametrize("bucket", ["away for a moment", "read only", "gone"])
def test_delete_deletes_whatever_the_bucket_says(bucket):
    """It comes back before the deletion is sent, or it may be read alone, or there is none any more."""
    world = World({"jobs": [{"runs": 10**6, "status": 0}]})
    world.killed(at=60)
    world.cloud.now += 4000
    if bucket == "away for a moment":
        world.bucket_down = [(world.elapsed, world.elapsed + 15)]
    elif bucket == "read only":
        world.script["writes_refused"] = [(0, 10**9)]
    else:
        world.bucket.get = gone
    assert world.babysitter("x:1:a").delete() == 0
    assert world.left() == []


def gone(name):
    raise SpiralError("--bucket is gs://b; allowed: a bucket that is there (404 Not Found)")


def test_a_deletion_that_could_not_be_remembered_is_still_ours():
    """The slice is suspended while the bucket refuses writes; that it is gone then was nobody's hand."""
    lost = queued((3000, {"state": "SUSPENDED"}))
    script = {"timelines": [lost, QUEUED], "writes_refused": [(2990, 3600)], "jobs": [{"runs": 4000, "status": 0}]}
    world = World(script)
    ended_well(world, world.run())
    assert world.created() == 2 and not world.heard("by hand")


def test_a_start_of_which_the_launcher_does_not_hear_goes_on():
    world = World({"jobs": [{"runs": 7200, "status": 0, "unanswered": True}]}, max_failures=0)
    ended_well(world, world.run())
    assert len(world.attempts) == 1 and world.heard("attempt 1 could not be started")


def test_a_program_that_cannot_be_run_for_a_moment_ends_nothing():
    world = World({"jobs": [{"runs": 7200, "status": 0}]})
    execute, calls = world.gcloud.execute, itertools.count()

    def failing(arguments, timeout):
        if (call := next(calls)) in (5, 6):
            raise OSError("Cannot allocate memory") if call == 5 else SpiralError("gcloud is not on PATH")
        return execute(arguments, timeout)

    world.gcloud.execute = failing
    ended_well(world, world.run())
    assert world.heard("Cannot allocate memory") and world.heard("gcloud is not on PATH")


def test_quota_that_is_given_back_after_every_preemption_counts_for_nothing():
    lost = queued((3000, {"state": "SUSPENDED"}))
    fail = [{"when": " create ", "error": "quota", "nth": [1, 3, 5, 7]}]
    world = World({"timelines": [lost] * 4 + [QUEUED], "fail": fail, "jobs": [{"runs": 9000, "status": 0}]})
    world.job = dataclasses.replace(world.job, max_failures=2)
    ended_well(world, world.run())
    assert world.created() == 5


def test_a_create_that_was_refused_may_be_mended():
    world = World({"fail": [{"when": " create ", "error": "invalid", "nth": [1]}]})
    assert world.babysitter("x:1:a").create() == 2 and world.heard("nothing bills")
    assert world.babysitter("x:2:a").create() == 0 and world.created() == 1


def test_stop_is_written_before_anything_is_read():
    """An attempt may be coming up whose plan is not there yet."""
    world = World()
    hosts.stop(provider_of(world.job, world.gcloud), world.bucket, 1)
    assert "control/stop" in world.bucket.objects


def test_what_is_being_deleted_may_bill():
    world = World()
    seen = Observation(State.TRANSIENT, "DELETING", billing=None)
    assert "may bill until it is gone" in what_bills(world.job, seen, Memory(phase="deleting"), 0.0)


def test_what_belongs_to_somebody_else_is_left_alone():
    world = World()
    gcloud = ["gcloud", "compute", "tpus", "queued-resources", "create", "pile", "--zone=us-east5-a"]
    world.cloud.execute([*gcloud, "--accelerator-type=v5p-8", "--runtime-version=x", "--node-id=pile"])
    assert world.run() == 2 and world.heard(
        "is not labelled as that of gs://my-bucket/runs/pile; allowed: another NAME"
    )
    assert world.babysitter("x:1:a").delete() == 2
    assert len(world.left()) == 1 and world.created() == 1


SOON = [{"at": 0, "state": "ACCEPTED"}, {"at": 40, "state": "ACTIVE"}]
SCRIPTS = {
    "finishes": ({"jobs": [{"runs": 60, "status": 0}], "timelines": [SOON], "lands": 20}, 0),
    "preempted": (
        {"jobs": [{"runs": 100, "status": 0}], "timelines": [[*SOON, {"at": 250, "state": "SUSPENDED"}], SOON]},
        0,
    ),
    "fails": ({"jobs": [{"runs": 20, "status": 137}, {"runs": 20, "status": 2}], "timelines": [SOON]}, 2),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_launcher_killed_at_any_step_goes_on_when_started_again(name):
    """Before or after each command, each write to the bucket, each sleep: once, and with a second death soon after."""
    script, result = SCRIPTS[name]
    whole = World(script, slice=parse_slice("v5p-8"))
    whole.run()
    for step in range(1, whole.steps + 1):
        world = World(script, slice=parse_slice("v5p-8"))
        world.killed(at=step)
        if step % 3 == 0:
            world.killed(at=7)
        world.cloud.now += 400 if step % 2 else 0
        assert world.run() == result, (step, world.said)
        assert world.left() == [] and world.heard("nothing bills"), step
        assert name == "fails" or not world.heard("failure"), (step, world.said)
        assert world.created() <= 2


@pytest.mark.slow
def test_so_does_one_that_creates_directly():
    script = {"timelines": [[*DIRECT, {"at": 400, "state": "PREEMPTED"}], DIRECT], "jobs": [{"runs": 200, "status": 0}]}
    world = World(script, provider="vm")
    world.run()
    for step in range(1, world.steps + 1):
        world = World(script, provider="vm")
        world.killed(at=step)
        assert world.run() == 0 and world.left() == [], (step, world.said)
