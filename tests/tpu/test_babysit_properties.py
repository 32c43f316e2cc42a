"""Whatever a cloud does, and whenever the launcher dies: never two slices, nothing after success, never over a cap."""

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spiral_jax.hardware import parse_slice
from tests.tpu.cloud import DIRECT, QUEUED
from tests.tpu.world import World
from tpu.bucket import Unreachable

CHIPS, CAP, FAILURES, PREEMPTIONS = 4, 9.0, 2, 4

moments = st.integers(120, 4000)
nodes = st.sampled_from(
    ["READY", "REPAIRING", "RESTARTING", "PREEMPTED", "TERMINATED", "STOPPED", "DELETING", "ODD", None]
)
queued_events = st.one_of(
    st.builds(lambda node: {"state": "ACTIVE", "nodes": {"0": node and {"state": node}}}, nodes),
    st.sampled_from(
        [
            {"state": "ACTIVE"},
            {"state": "SUSPENDING"},
            {"state": "SUSPENDED"},
            {"state": "SUSPENDED", "initiator": "USER"},
            {"state": "FAILED", "error": {"code": 3, "message": "no"}},
            {"state": "FAILED", "error": {"code": 8, "message": "full"}},
            {"state": "ODD"},
            {"state": "GONE"},
        ]
    ),
)
node_events = nodes.map(lambda node: {"state": node or "GONE"})


def timelines(first, events):
    """What becomes of one slice after another: the usual beginning, then anything at any time."""
    later = st.lists(st.tuples(moments, events), max_size=4).map(lambda pairs: sorted(pairs, key=lambda pair: pair[0]))

    def one_of(pairs):
        states = [event["state"] for _, event in pairs]
        last = states.index("GONE") + 1 if "GONE" in states else len(pairs)  # nothing comes back from there
        return [*first, *({"at": at} | event for at, event in pairs[:last])]

    one = later.map(one_of)
    return st.lists(one, min_size=1, max_size=3)


jobs = st.lists(
    st.fixed_dictionaries(
        {"runs": st.integers(0, 3000), "status": st.sampled_from([0, 0, 1, 2, 42, 43, 44, 137, 143, None])},
        optional={"lost": st.sampled_from([0, 42, 43, 143]), "mute": st.just(True), "trouble": st.just("host 0: no")},
    ),
    min_size=1,
    max_size=4,
)
faults = st.lists(
    st.builds(
        lambda when, error, since, length, effect: {
            # What is refused has no effect; where the answer was lost, it may have had its own.
            "when": f" {when} ", "error": error, "effect": effect and error in ("network", "503"),
            "from": since, "to": since + length,
        },
        st.sampled_from(["describe", "create", "delete", "ssh"]),
        st.sampled_from(["network", "auth", "503", "hang", "no_project", "quota", "capacity", "denied"]),
        st.integers(0, 4000), st.integers(10, 1500), st.booleans(),
    ),
    max_size=3,
)  # fmt: skip


def script(first, events):
    return st.fixed_dictionaries(
        {
            "timelines": timelines(first, events),
            "jobs": jobs,
            "fail": faults,
            "lands": st.sampled_from([0, 0, 15, 60]),
            "deletes": st.sampled_from([5, 60, 200]),
            "bucket_down": st.lists(st.integers(0, 4000).map(lambda at: (at, at + 300)), max_size=2),
        }
    )


def lives_through(script: dict, deaths: list[int], provider: str) -> World:
    """The world after launchers that died at their n-th step, and one that did not. `World` checks each create."""
    world = World(
        script, provider=provider, max_chip_hours=CAP, max_failures=FAILURES, max_preemptions=PREEMPTIONS,
        slice=parse_slice("v5p-8"),
    )  # fmt: skip
    for death in deaths:
        with contextlib.suppress(Unreachable):
            # It had come to its end before, or had written so as it died.
            if not world.killed(at=death) or world.remembered().get("phase") == "ended":
                return world
    while True:
        try:
            world.run(hours=24 * 7)
            return world
        except Unreachable:  # when it wanted to begin; a script would try again
            world.cloud.now += 60


def check(world: World, launchers: int) -> None:
    asked = [when for when, line in world.cloud.log if " create " in line]
    assert world.left() == [] or world.heard("delete it with: "), world.said
    assert world.created() <= PREEMPTIONS + FAILURES + 2
    assert len(world.attempts) <= PREEMPTIONS + FAILURES + 2 + launchers
    assert all(when <= world.finished_at for when in asked)
    # The cap is kept but for the time in which the cloud or the bucket let nobody know or delete anything.
    away = sum(fault["to"] - fault["from"] for fault in world.script["fail"])
    away += sum(until - since for since, until in world.bucket_down)
    assert world.cloud.billed() * CHIPS / 3600 <= CAP + CHIPS * away / 3600, world.said


@settings(max_examples=25, deadline=None, derandomize=True)
@given(script(QUEUED, queued_events), st.lists(st.integers(1, 400), max_size=2))
def test_queued_resources(script, deaths):
    check(lives_through(script, deaths, "qr"), 1 + len(deaths))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(script(DIRECT, node_events), st.lists(st.integers(1, 400), max_size=2))
def test_direct_nodes(script, deaths):
    check(lives_through(script, deaths, "vm"), 1 + len(deaths))


@pytest.mark.slow
@settings(max_examples=3000, deadline=None)
@given(script(QUEUED, queued_events), st.lists(st.integers(1, 900), max_size=4))
def test_queued_resources_at_length(script, deaths):
    check(lives_through(script, deaths, "qr"), 1 + len(deaths))


@pytest.mark.slow
@settings(max_examples=2000, deadline=None)
@given(script(DIRECT, node_events), st.lists(st.integers(1, 900), max_size=4))
def test_direct_nodes_at_length(script, deaths):
    check(lives_through(script, deaths, "vm"), 1 + len(deaths))
