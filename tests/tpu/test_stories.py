"""The stories of lost days and money that launchers have caused, by their numbers; hosts' own are in test_hosts.

Each runs the babysitter, or a verb, against a cloud in virtual time that keeps account of what really bills.
"""

import pytest

from spiral_jax.errors import SpiralError
from tests.tpu.cloud import DIRECT, QUEUED
from tests.tpu.world import World
from tpu.gcloud import redacted, shown


def queued(*events):
    """A queued resource that gets its chips after two minutes, and what happens to it then: (seconds, event)."""
    return [*QUEUED, *({"at": at, **event} for at, event in events)]


def ended_well(world: World, status: int) -> None:
    assert status == 0, world.said
    assert world.left() == []
    assert world.heard("nothing bills")


@pytest.mark.parametrize("error", ["network", "auth", "no_account", "denied", "no_project", "503", "hang", "internal"])
@pytest.mark.parametrize("provider", ["qr", "vm"])
def test_story_01_a_describe_that_failed_is_not_read_as_gone(error, provider):
    outage = {"when": " describe ", "error": error, "from": 600, "to": 4200}
    world = World({"fail": [outage], "jobs": [{"runs": 7200, "status": 0}]}, provider=provider, max_chip_hours=80)
    ended_well(world, world.run())
    assert world.created() == 1
    assert world.cloud.billed() * 8 / 3600 < 8 * 3


@pytest.mark.parametrize("error", ["network", "no_project"])
def test_story_01_nothing_is_created_before_gone_was_said(error):
    world = World({"fail": [{"when": " describe ", "error": error, "from": 0, "to": 1800}]})
    ended_well(world, world.run())
    assert world.cloud.slices[0].created - world.cloud.start >= 1800


@pytest.mark.parametrize(
    "provider, kind", [("qr", "queued-resources"), ("qr", "tpu-vm"), ("vm", "tpu-vm")], ids=["request", "node", "vm"]
)
def test_story_01_what_is_missing_once_while_its_hosts_speak_is_there(provider, kind):
    once = {"when": f"{kind} describe pile", "error": "missing", "nth": [40]}
    world = World({"fail": [once], "jobs": [{"runs": 3000, "status": 0}]}, provider=provider)
    ended_well(world, world.run())
    assert world.cloud.seen["0"] > 40 and world.created() == 1 and len(world.attempts) == 1


@pytest.mark.parametrize("state", ["REPAIRING", "RESTARTING", "REIMAGING", "HIDDEN", "UNKNOWN"])
def test_story_02_what_comes_back_by_itself_is_waited_for(state):
    broken = (3000, {"state": "ACTIVE", "nodes": {"0": {"state": state, "description": "a link is down"}}})
    world = World({"timelines": [queued(broken, (9000, {"state": "ACTIVE"}))], "jobs": [{"runs": 7200, "status": 0}]})
    ended_well(world, world.run())
    assert world.created() == 1 and len(world.attempts) == 2
    deletes = [when for when, line in world.cloud.log if " delete " in line]
    assert min(deletes) - world.cloud.start > 9000
    assert world.heard("a link is down")
    assert "0 failures" not in world.said and not world.heard("failure 1")


def test_story_02_hosts_that_end_while_a_node_is_repaired_have_not_failed():
    """They lose their sibling; the slice is theirs again before anybody has asked what became of them."""
    broken = (3000, {"state": "ACTIVE", "nodes": {"0": {"state": "REPAIRING"}}})
    jobs = [{"runs": 7200, "status": 0, "lost": 43}]
    world = World({"timelines": [queued(broken, (4000, {"state": "ACTIVE"}))], "jobs": jobs}, max_failures=0)
    ended_well(world, world.run())
    assert world.created() == 1 and len(world.attempts) == 2 and world.heard("interruption 1")
    assert world.heard("a node was repaired (host 0: exit status 43")


@pytest.mark.parametrize("state", ["SUSPENDED", "FAILED"])
def test_story_03_what_never_comes_back_is_deleted_until_gone_and_created_again(state):
    lost = {"state": state, "error": {"code": 8, "message": "Insufficient capacity."}}
    world = World({"timelines": [queued((3000, lost)), QUEUED], "jobs": [{"runs": 7200, "status": 0}], "deletes": 600})
    ended_well(world, world.run())
    assert world.created() == 2
    lines = [(when, line) for when, line in world.cloud.log if " delete " in line or " create " in line]
    assert [line.split()[4] for _, line in lines][:3] == ["create", "delete", "delete"]  # sent again after a while
    assert "--force" in lines[1][1]
    first, second = world.cloud.slices
    assert second.created >= first.gone and world.heard("interruption 1")


def test_symptoms_of_nodes_are_shown_once():
    symptom = {"createTime": "2026-11-26T18:00:00Z", "symptomType": "HBM_OUT_OF_MEMORY", "workerId": "1"}
    ill = (600, {"state": "ACTIVE", "nodes": {"0": {"state": "READY", "symptoms": [symptom]}}})
    world = World({"timelines": [queued(ill)]})
    ended_well(world, world.run())
    assert sum("pile 2026-11-26T18:00:00Z HBM_OUT_OF_MEMORY worker 1" in line for line in world.said) == 1


@pytest.mark.parametrize("node", ["PREEMPTED", "TERMINATED", "STOPPED", None])
def test_story_04_a_preempted_node_has_some_other_state_or_none(node):
    lost = {"state": "ACTIVE", "nodes": {"0": node and {"state": node}}}
    world = World({"timelines": [queued((3000, lost)), QUEUED], "jobs": [{"runs": 7200, "status": 0}]}, max_failures=0)
    ended_well(world, world.run())
    assert world.created() == 2 and world.heard("interruption 1 (at most 100 are taken): preempted")


@pytest.mark.parametrize("node", ["PREEMPTED", "TERMINATED", "STOPPED", "GONE"])
def test_story_04_so_does_one_that_was_created_directly(node):
    direct = [*DIRECT, {"at": 3000, "state": node}]
    script = {"timelines": [direct, DIRECT], "jobs": [{"runs": 7200, "status": 0}]}
    world = World(script, provider="vm", max_failures=0)
    ended_well(world, world.run())
    assert world.created() == 2 and world.heard("interruption 1")


def test_story_04_a_preemption_is_told_from_a_deletion_by_hand():
    """Whoever took the slice away does not want it back."""
    by_hand = queued((3000, {"state": "SUSPENDED", "initiator": "USER"}))
    world = World({"timelines": [by_hand], "jobs": [{"runs": 7200, "status": 0}]})
    assert world.run() == 2
    assert world.created() == 1 and world.left() == [] and world.heard("taken away by hand")

    world = World({"timelines": [queued((3000, {"state": "GONE"}))], "jobs": [{"runs": 7200, "status": 0}]})
    assert world.run() == 2
    assert world.created() == 1 and world.heard("deleted by hand") and world.heard("nothing bills")


def test_story_05_a_slice_elsewhere_under_the_same_name_is_refused():
    world = World({"jobs": [{"runs": 9000, "status": 0}]})
    world.killed(at=200)
    assert len(world.left()) == 1
    other = World(zone="us-central1-a")
    other.cloud, other.bucket.objects = world.cloud, world.bucket.objects
    other.cloud.now += 7200  # whoever held it is dead
    with pytest.raises(SpiralError, match="allowed, until it is deleted: my-project us-east5-a qr v5p:2x2x2 x 1"):
        other.run()
    assert world.created() == 1
    with pytest.raises(SpiralError, match="us-east5-a"):  # and is not said to be gone because it is not there
        other.babysitter().delete()


def test_story_05_a_second_launcher_is_refused_while_the_first_lives():
    world = World({"jobs": [{"runs": 9000, "status": 0}]})
    sleep, second = world.sleep, []

    def also_another(seconds: float) -> None:
        if world.elapsed > 2000 and not second:
            second.append(1)
            world.sleep = sleep  # the second's own; the first one's is this one
            with pytest.raises(SpiralError, match="one launcher at a time"):
                # While the second one waits, the first one goes on.
                other = world.babysitter("other:2:b")
                other.sleep = lambda seconds: (sleep(seconds), first.store.save(first.memory))
                other.run()
        sleep(seconds)

    first = world.babysitter("first:1:a")
    first.sleep = also_another
    assert first.run() == 0
    assert world.created() == 1 and second


def test_story_09_of_several_exits_the_first_decides():
    """Host 0 was told to save and did; host 1 lost its peer."""
    jobs = [{"runs": 3000, "status": 42, "siblings": {"1": 43}}, {"runs": 3000, "status": 0}]
    world = World({"jobs": jobs}, max_failures=0)
    ended_well(world, world.run())
    assert world.heard("interruption 1 (at most 100 are taken): saved but unfinished (host 0: exit status 42")
    # And the other way about: the peer was lost first.
    world = World({"jobs": [{"runs": 3000, "status": 43, "siblings": {"1": 42}}]}, max_failures=0)
    assert world.run() == 1
    assert world.left() == [] and world.heard("failure 1") and not world.heard("interruption")


def test_story_09_ends_that_came_of_a_preemption_are_no_failures():
    """The job ends with 43 a minute before the cloud says that the slice is gone."""
    lost = queued((3000, {"state": "ACTIVE"}), (3060, {"state": "SUSPENDING"}), (3090, {"state": "SUSPENDED"}))
    world = World(
        {"timelines": [lost, QUEUED], "jobs": [{"runs": 2700, "status": 43}, {"runs": 60, "status": 0}]}, max_failures=0
    )
    ended_well(world, world.run())
    assert len(world.attempts) == 2 and world.heard("interruption 1")


@pytest.mark.parametrize("at", [1, 31, 100, 400, 3000, 7500, 7600])
def test_story_10_ctrl_c_leaves_nothing_or_says_what_bills(at):
    world = World({"jobs": [{"runs": 7200, "status": 0}]})
    world.interrupt_at = at
    status = world.run()
    last = world.said[-1]
    if world.left():
        assert status == 130
        assert "pile (8 chips of v5p in us-east5-a)" in last
        assert "delete it with: python -m tpu.launch delete pile --accelerator=v5p-16 --zone=us-east5-a" in last
        bills = any(one.bills(world.cloud.now) for one in world.cloud.slices)
        assert "BILLS" in last if bills else "BILLS" not in last or "PROVISIONING" in last
    else:
        assert "nothing bills" in last
    world.interrupt_at = float("inf")
    ended_well(world, world.run())  # and it goes on, without a second slice
    assert world.created() == 1


def test_story_10_ctrl_c_in_the_middle_of_a_create_names_what_may_come():
    world = World({"lands": 100})
    execute = world.cloud.execute

    def interrupted(arguments, timeout):
        answer = execute(arguments, timeout)
        if "create" in arguments:
            raise KeyboardInterrupt
        return answer

    world.cloud.execute = interrupted
    assert world.run() == 130
    assert "may still come into being and bill" in world.said[-1]
    world.cloud.execute = execute
    assert world.babysitter().delete() == 0
    assert world.created() == 1 and world.left() == []


def test_story_10_nothing_runs_again_after_success():
    world = World({"jobs": [{"runs": 600, "status": 0}]})
    ended_well(world, world.run())
    calls = len([line for _, line in world.cloud.log if " create " in line])
    assert world.run() == 0  # by a script that does not look
    assert calls == len([line for _, line in world.cloud.log if " create " in line]) == 1
    with pytest.raises(SpiralError, match="has finished"):
        world.babysitter().create()


def test_story_11_after_a_silent_death_the_kernel_has_the_last_word():
    kernel = ["traps: python3[4242] general protection fault ip:7f2c in libtpu.so"]
    dies = {"runs": 600, "status": 139, "line": "killed by SIGSEGV", "kernel": kernel}
    world = World({"jobs": [dies | {"status": None}, dies, {"runs": 600, "status": 0}]})
    ended_well(world, world.run())
    assert sum("kernel: traps: python3[4242]" in line for line in world.said) == 1
    assert world.heard("failure 1 (at most 3 are taken): host 0: died silently")


def test_story_12_no_secret_is_printed(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123")
    command = [
        "gcloud",
        "compute",
        "--metadata=hf_token=hf_abcdefgh,x=1",
        "--command=WANDB_API_KEY=0123456789abcdef0123 run",
    ]
    text = shown(command)
    assert "hf_abcdefgh" not in text and "0123456789abcdef" not in text and "x=1" in text and "run" in text
    assert "hunter2hunter2" not in redacted("ERROR: --password=hunter2hunter2 was wrong")
    assert redacted("ERROR: https://x/?access_token=ya29.abc&y=2").endswith("access_token=***")


def test_story_13_hosts_that_cannot_be_set_up_end_it_before_the_money_is_gone():
    world = World({"jobs": [{"trouble": "host 3: uv: no matching distribution for libtpu==0.0.42.1"}]}, max_failures=2)
    assert world.run() == 1
    assert world.left() == [] and len(world.attempts) == 0
    assert world.heard("failure 3 (at most 2 are taken): host 3: uv: no matching distribution")
    assert world.cloud.billed() < 3600


@pytest.mark.parametrize("lands", [0, 20, 80])
def test_story_15_a_kill_that_races_a_create(lands):
    """The launcher dies while its create is under way; `delete` finds nothing yet, and waits."""
    for step in range(1, 30):
        world = World({"lands": lands, "jobs": [{"runs": 9000, "status": 0}]})
        world.killed(at=step)
        assert world.babysitter("other:2:b").delete() == 0, world.said
        world.cloud.now += 3600
        assert world.left() == [], (step, world.said)
