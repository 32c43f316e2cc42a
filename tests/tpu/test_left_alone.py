"""What costs money while nobody looks: lines that nobody reads, names that two have, answers that make no sense."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from spiral_jax.errors import SpiralError
from tests.tpu.cloud import DIRECT, QUEUED
from tests.tpu.launches import ROOT
from tests.tpu.test_launch import CONFIG, JOB, typed
from tests.tpu.world import Killed, World
from tpu import reap
from tpu.decide import Action, JobStatus, decide, not_created
from tpu.gcloud import Gcloud
from tpu.memory import Memory
from tpu.providers import Observation, State, provider_of

TELLS = """
import sys
from tpu.telling import tell
tell("first")
sys.stdin.readline()
for _ in range(3):
    tell("nobody reads this")
sys.exit(7)
"""


def test_a_reader_that_is_gone_ends_nobody():
    """It has something to delete yet; and its exit status is its own."""
    child = subprocess.Popen(
        [sys.executable, "-c", TELLS], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdout.readline() == b"first\n"  # at once, though it is a pipe
    child.stdout.close()
    _, errors = child.communicate(b"\n", timeout=20)
    assert child.returncode == 7 and errors.decode().splitlines() == ["nobody reads this"] * 3


def test_a_disk_that_is_full_ends_nobody():
    with open("/dev/full", "w") as full:
        child = subprocess.run([sys.executable, "-c", TELLS], cwd=ROOT, input=b"\n", stdout=full, stderr=full)
    assert child.returncode in (7, 120)  # the latter is Python's own complaint, about the same disk


def test_a_launch_keeps_to_the_project_that_it_began_with(world, capsys):
    """Whatever gcloud's setting is by then: in another project the slice would seem to be gone."""
    without = [word for word in JOB if not word.startswith("--project")]

    def at_home(verb, *flags):
        return typed(world, verb, *flags, job=without)

    assert at_home("create", *CONFIG) == 0 and world.created() == 1
    asked = [line for _, line in world.cloud.log if " compute " in line]
    assert asked and all("--project=my-project" in line for line in asked)
    world.cloud.script["project"] = "another"
    assert at_home("delete") == 2
    assert "pile is another us-east5-a" in capsys.readouterr().err and len(world.left()) == 1
    world.cloud.script["project"] = ""
    assert at_home("status") == 2
    assert "--project is missing; allowed: its id" in capsys.readouterr().err
    assert typed(world, "delete") == 0 and world.left() == []


def test_two_launches_of_one_name_do_not_share_a_slice(world):
    """A colleague's bucket is another one, whose memory knows of no slice."""
    world.killed(at=100)
    assert len(world.left()) == 1
    other = World()
    other.cloud, other.gcloud = world.cloud, world.gcloud
    other.job = replace(other.job, bucket="gs://other/runs")
    other.said = world.said
    assert other.babysitter("other:1:b").run() == 2
    assert world.heard("is not labelled as that of gs://other/runs/pile") and len(world.left()) == 1
    assert len(world.attempts) <= 1


@pytest.mark.parametrize(
    "answer",
    ["null", "[]", "3", '{"state": null}', '{"state": "ACTIVE"}', '{"state": {"state": "ACTIVE"}, "tpu": null}',
     '{"state": {"state": "ACTIVE"}, "tpu": {"nodeSpec": [null]}}'],
)  # fmt: skip
@pytest.mark.parametrize("provider", ["qr", "vm"])
def test_an_answer_of_another_shape_says_nothing(answer, provider):
    job = World(provider=provider).job
    gcloud = Gcloud("my-project", execute=lambda arguments, timeout: (0, answer, ""))
    seen = provider_of(job, gcloud).observe()
    assert seen.state is State.UNKNOWN and seen.ours is not False, seen
    memory = Memory(phase="present", attempt=1, started=1.0, looked=1.0, billing=True)
    assert decide(job, memory, seen, JobStatus(beat=90.0), 100.0).action is Action.WAIT


def test_reap_goes_on_beside_an_answer_of_another_shape():
    lines = []
    answers = {"us-east5-a": "[3]", "us-central1-a": "[]"}

    def execute(arguments, timeout):
        return 0, next((text for zone, text in answers.items() if f"--zone={zone}" in arguments), "p\n"), ""

    assert reap.main([f"--zone={zone}" for zone in answers], lines.append, execute=execute) == 2
    assert any(line.startswith("not looked at: us-east5-a: gcloud's answer has another shape") for line in lines)
    assert lines[-1] == "0 found, 0 of them bill, in 1 of 2 zones of p"


def test_labels_that_are_left_out_once_end_nothing():
    job, seen = World().job, Observation(State.READY, "ACTIVE, pile READY", billing=True, ours=None)
    there = Memory(phase="present", attempt=1, started=50.0, looked=90.0, beat=90.0, beat_seen=90.0)
    assert decide(job, there, seen, JobStatus(beat=95.0), 100.0).action is Action.WAIT
    # What was there before anything was asked for is somebody's.
    assert decide(job, Memory(), seen, JobStatus(), 100.0).memory.result == 2
    asked = Memory(phase="creating", asked=90.0)
    assert decide(job, asked, seen, JobStatus(), 100.0).action is Action.WAIT
    assert decide(job, asked, seen, JobStatus(), 900.0).memory.result == 2


def test_an_attempt_whose_launcher_died_while_it_told_the_hosts_goes_on():
    world = World({"jobs": [{"runs": 5000, "status": 0}]})
    steps = next(n for n in range(1, 200) if _started_at(n))
    world.killed(at=steps)
    assert list(world.attempts) == [1]
    world.cloud.now += 60
    assert world.run() == 0 and list(world.attempts) == [1], world.said
    assert world.heard("attempt 1 runs already")


def _started_at(n: int) -> bool:
    """Whether a launcher that dies at its n-th step has told the hosts, and not yet said so on the bucket."""
    world = World({"jobs": [{"runs": 5000, "status": 0}]})
    world.killed(at=n)
    return bool(world.attempts)


def test_hosts_of_a_slice_before_do_not_count_as_running():
    """Their last signs of life are younger than ten minutes, but of a slice that is gone."""
    lost = [*DIRECT, {"at": 300, "state": "GONE"}]
    world = World({"timelines": [lost, DIRECT], "jobs": [{"runs": 5000, "status": 0}]}, provider="vm")
    assert world.run() == 0 and list(world.attempts) == [1, 2], world.said


def test_a_slice_that_is_not_usable_is_mentioned_every_hour():
    repairing = {"at": 600, "state": "ACTIVE", "nodes": {"0": {"state": "REPAIRING"}}}
    jobs = [{"runs": 20000, "status": 0, "lost": 43}, {"runs": 60, "status": 0}]
    world = World({"timelines": [[*QUEUED, repairing, {"at": 6 * 3600, "state": "ACTIVE"}]], "jobs": jobs})
    world.run()
    said = [line for line in world.said if "hours now, and it may bill" in line]
    assert 3 <= len(said) <= 6 and "python -m tpu.launch delete pile" in said[0], world.said


def test_preemptions_and_a_quota_that_is_given_back():
    """The streak of short attempts is none of refused creates."""
    job = World().job
    memory = Memory(phase="creating", streak=7, preemptions=7)
    memory, _ = not_created(job, memory, "quota", "Quota limit", 0.0)
    assert not memory.ending and memory.refused == 1
    for _ in range(job.max_failures):
        memory, _ = not_created(job, replace(memory, phase="creating"), "quota", "Quota limit", 0.0)
    assert memory.result == 2 and memory.ending == "Quota limit"


def test_a_create_that_is_accepted_forgets_those_that_a_quota_refused():
    world = World(
        {"jobs": [{"runs": 60, "status": 0}], "fail": [{"when": " create ", "error": "quota", "nth": [1, 2]}]}
    )
    babysitter = world.babysitter()
    assert babysitter.run() == 0 and babysitter.memory.refused == 0 and world.created() == 1


def test_creates_of_which_nothing_is_known_are_sent_ever_more_rarely():
    world = World({"fail": [{"when": " create ", "error": "no_project"}]})
    babysitter, sleep = world.babysitter(), world.sleep

    def for_a_day(seconds):
        sleep(seconds)
        if world.elapsed > 86400:
            raise Killed

    babysitter.sleep = for_a_day
    with pytest.raises(Killed):
        babysitter.run()
    assert 10 < sum(" create " in line for _, line in world.cloud.log) < 80


@pytest.mark.parametrize("verb, words", [("create", " create "), ("run", " ssh ")])
def test_ctrl_c_in_a_verb_says_what_bills(world, verb, words, monkeypatch):
    if verb == "run":
        typed(world, "create", *CONFIG)
        world.cloud.now += 3600
    sent, execute = [], world.execute

    def interrupted(arguments, timeout):
        answer = execute(arguments, timeout)
        if words in " ".join(arguments) and not sent:
            sent.append(arguments)
            raise KeyboardInterrupt
        return answer

    world.gcloud.execute = world.execute = interrupted
    assert typed(world, verb, *CONFIG) == 130 and sent
    assert "delete it with: python -m tpu.launch delete pile" in world.said[-1], world.said


def test_what_nobody_watches_says_so(world):
    typed(world, "create", *CONFIG, "--max_chip_hours=100")
    assert "nobody watches it now: --max_chip_hours holds under `babysit` only" in world.said[-1]


def test_babysit_without_a_bucket_says_what_bills(world, capsys):
    world.killed(at=100)
    world.bucket_down = [(0, 10**9)]
    assert typed(world, "babysit", *CONFIG, "--max_chip_hours=100") == 2
    assert "BILLS; delete it with" in world.said[-1] or "will when it gets chips" in world.said[-1]


def test_a_memory_of_another_version_is_a_line(world, capsys):
    world.bucket.objects["launch.json"] = (json.dumps({"phase": "present", "colour": "red"}).encode(), 1)
    assert typed(world, "babysit", *CONFIG, "--max_chip_hours=100") == 2
    assert "launch.json is of another version" in capsys.readouterr().err


def test_gke_promises_no_cap(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    world = World()
    flags = ["--provider=gke", *CONFIG, "--image=docker.io/me/spiral"]
    assert typed(world, "create", *flags, "--max_chip_hours=10") == 2
    assert "--max_chip_hours is 10.0; allowed: none with --provider=gke" in capsys.readouterr().err
    assert typed(world, "create", *flags) == 0
    assert world.heard("gcloud container node-pools delete POOL") and "its node pool bills until" in world.said[-1]


def test_a_job_elsewhere_is_refused():
    world = World()
    world.killed(at=100)
    world.job = replace(world.job, project="another-one")
    with pytest.raises(SpiralError, match="allowed, until it is deleted: my-project us-east5-a qr"):
        world.babysitter("other:1:b").run()
