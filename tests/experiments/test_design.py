"""What a study declares: mistakes in it, and what trials decide."""

import dataclasses

import pytest

from experiments.design import Arm, Contrast, Gate, Study, comparable_hash, difference, load, run_config, shaping
from experiments.record import Evaluation
from spiral_jax.errors import SpiralError
from spiral_jax.run.config import default_config


def values(**model):
    found = default_config()
    found.model.update(model)
    return found


ARMS = (Arm("a", values()), Arm("b", values(topology="anchor")))
STUDY = Study("s", "small", "?", ARMS, Contrast("b", "a"), learning_rates=(1e-3, 2e-3, 4e-3), seeds=(1, 2))


@pytest.mark.parametrize("change, expected", [
    ({"arms": (ARMS[0], ARMS[0])}, "an arm's name is 'a'; allowed: each once"),
    ({"arms": (Arm("A b", values()), *ARMS)}, "an arm's name is 'A b'; allowed: lower-case"),
    ({"primary": Contrast("b", "c")}, "a contrast's arm is 'c'; allowed: a, b"),
    ({"learning_rates": (2e-3, 1e-3)}, "learning_rates is .*; allowed: rising ones"),
    ({"tuning_seed": 2}, r"tuning_seed is 2; allowed: none of the seeds \(1, 2\)"),
    ({"seeds": ()}, "seeds is "),
    ({"gates": (Gate("c-seed1", 1.0, ""),)}, "a gate's run is 'c-seed1'; allowed: a run's name"),
    ({"gates": (Gate("a-seed1", 1.0, ""),)}, "a gate's run is 'a-seed1'; allowed: a trial of a learning rate"),
    ({"kept": ("c",)}, "kept is 'c'; allowed: a run's name"),
])  # fmt: skip
def test_mistakes_in_a_declaration(change, expected):
    with pytest.raises(SpiralError, match=f"^{expected}"):
        dataclasses.replace(STUDY, **change)


def test_a_wrong_configuration_names_the_arm():
    with pytest.raises(SpiralError, match=r"^arm x: model\.num_heads is 0; allowed: "):
        _ = Arm("x", values(num_heads=0)).config


def trial(record, arm: str, rate: float, nats: float | None, status: str = "finished"):
    texts = {} if nats is None else {"validation": Evaluation(nats, (), ())}
    return dataclasses.replace(record, arm=arm, stage="tune", learning_rate=rate, status=status, evaluation=texts)


def test_the_best_trial_decides(record):
    trials = [trial(record, "a", rate, nats) for rate, nats in ((1e-3, 3.0), (2e-3, 2.9), (4e-3, 2.95))]
    tuned = STUDY.tuned(ARMS[0], trials)
    assert tuned is not None and (tuned.learning_rate, tuned.at_edge) == (2e-3, False)
    assert STUDY.tuned(ARMS[1], trials) is None  # none of its own
    assert STUDY.tuned(ARMS[0], trials[:2]) is None  # not all: the last may be the best
    rates = {run.name: run.learning_rate for run in STUDY.runs(trials)}
    assert rates["a-seed2"] == 2e-3 and rates["b-seed2"] is None and rates["b-lr0.004"] == 4e-3


def test_an_edge_is_noticed_and_failures_are_waited_for(record):
    trials = [trial(record, "a", 1e-3, 3.0), trial(record, "a", 2e-3, 3.1), trial(record, "a", 4e-3, None, "diverged")]
    tuned = STUDY.tuned(ARMS[0], trials)
    assert tuned is not None and (tuned.learning_rate, tuned.at_edge) == (1e-3, True)
    trials[2] = dataclasses.replace(trials[2], status="failed")
    assert STUDY.tuned(ARMS[0], trials) is None
    lost = [trial(record, "a", rate, None, "diverged") for rate in STUDY.learning_rates]
    assert STUDY.tuned(ARMS[0], lost) is None
    untried = dataclasses.replace(STUDY, learning_rates=())
    own = untried.tuned(ARMS[0], [])
    assert own is not None and (own.learning_rate, own.at_edge) == (6e-4, False)


def test_what_may_be_compared():
    a, b, other = (arm.config for arm in (*ARMS, Arm("c", values())))
    assert comparable_hash(a) == comparable_hash(b)
    other = dataclasses.replace(other, train=dataclasses.replace(other.train, batch_size=8))
    assert comparable_hash(other) != comparable_hash(a)
    elsewhere = dataclasses.replace(a, data=dataclasses.replace(a.data, stores=("x",)), seed=3)
    assert comparable_hash(elsewhere) == comparable_hash(a)


def test_a_record_of_another_declaration_is_noticed(record):
    run = next(run for run in STUDY.runs() if run.name == "b-lr0.002")
    same = dataclasses.replace(record, learning_rate=2e-3, config=shaping(run_config(run)))
    assert difference(same, run) == ""
    assert difference(dataclasses.replace(same, learning_rate=1e-3), run).startswith("optimizer.peak_learning_rate was")
    assert difference(dataclasses.replace(same, config={}), run) == "model.topology was the default and is anchor"


def test_a_study_of_ones_own(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def get_study(edition):\n    return 1 / 0\n")
    with pytest.raises(SpiralError, match=rf"^{path}, line 2: ZeroDivisionError"):
        load(str(path), "small")
    path.write_text("def get_study(edition):\n    return 1\n")
    with pytest.raises(SpiralError, match="what get_study gives is 1; allowed: a Study"):
        load(str(path), "small")
