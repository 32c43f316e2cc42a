"""The study of hierarchical tasks: arms of both tasks can stand in one study, and the floor is that of the grammar."""

import numpy as np
import pytest

from experiments.design import comparable_hash, load
from spiral_jax.data.examples import ExampleStream
from spiral_jax.evaluate import EXAMPLES


@pytest.mark.parametrize("edition", ["small", "full"])
def test_arms_differ_in_task_and_model_alone(edition):
    study = load("hierarchy", edition)
    assert len({comparable_hash(arm.config) for arm in study.arms}) == 1
    assert {arm.config.data.examples for arm in study.arms} == {"listops", "cfg3b"}
    for contrast in (study.primary, *study.others):
        assert study.arm(contrast.arm).factors["task"] == study.arm(contrast.against).factors["task"]


@pytest.mark.slow
def test_the_floor_is_what_the_grammar_costs_on_the_windows_that_are_scored():
    arm = load("hierarchy", "small").arm("cfg3b-vanilla")
    length = arm.config.train.sequence_length
    stream = ExampleStream("cfg3b", seed=0, length=length, vocab_size=4)
    nats = np.mean([stream.source.nats(e.targets_L) for e in stream.held_out(range(EXAMPLES))]) / length
    assert arm.factors["floor_nats"] == pytest.approx(nats, abs=1e-5)
