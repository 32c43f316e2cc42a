"""An evaluation that fails, or is not reached, costs no step, and is made up for."""

import pytest
from cases import slow
from pairs import flags_of, write_inputs
from verbs import call

from spiral_jax import train
from spiral_jax.errors import SpiralError, Unreachable
from spiral_jax.evaluation.config import TASKS, VALIDATION, EvaluationConfig
from spiral_jax.evaluation.validation import Validation
from spiral_jax.run.evaluations import Contained
from spiral_jax.run.metrics import read_rows
from spiral_jax.training.loop import Stopped

NO_SAMPLE = ("--config.summary.sample_tokens=0", "--config.summary.plot=False")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a run has finished undisturbed: `alone`."""
    folder = tmp_path_factory.mktemp("evaluations")
    write_inputs(folder)
    assert call(train, *flags_of(folder, "alone"), *NO_SAMPLE) == (0, "")
    return folder


@pytest.mark.parametrize("step", [3, slow(6)])
def test_an_evaluation_that_fails_costs_no_step_and_is_made_up_for(folder, monkeypatch, capsys, step):
    """Also of the last step: the run ends as the one whose evaluations went well."""
    evaluate, name = Validation.__call__, f"failed{step}"

    def fail(self, now, state):
        if now == step:
            raise SpiralError("a row of a task: broken")
        return evaluate(self, now, state)

    with monkeypatch.context() as patched:
        patched.setattr(Validation, "__call__", fail)
        for _ in range(2):  # the second time before any further step
            assert call(train, *flags_of(folder, name), *NO_SAMPLE) == (2, "error: a row of a task: broken\n")
            assert f"saved after step {step} of 6, which was not evaluated" in capsys.readouterr().out
            rows = read_rows(folder / name / "metrics.jsonl")
            assert [row["step"] for row in rows] == list(range(1, step + 1)) and "validation_loss" not in rows[-1]
            assert (folder / name / "checkpoints" / str(step)).is_dir()
    assert call(train, *flags_of(folder, name), *NO_SAMPLE) == (0, "")
    assert "validation after step 6" in capsys.readouterr().out
    found, expected = (read_rows(folder / run / "metrics.jsonl") for run in (name, "alone"))
    assert [row["loss"] for row in found] == [row["loss"] for row in expected]
    assert [row.get("validation_loss") for row in found] == [row.get("validation_loss") for row in expected]
    assert [row["step"] for row in found if "validation_loss" in row] == [3, 6]


def test_what_a_row_lacks_is_what_was_due():
    wanted = EvaluationConfig(every_steps=3, tasks=("piqa",), tasks_every_steps=2)
    assert wanted.missing(3, 8, ["loss"]) == {VALIDATION}
    assert wanted.missing(4, 8, ["loss"]) == {TASKS}
    assert wanted.missing(8, 8, ["loss"]) == {VALIDATION, TASKS}
    assert wanted.missing(6, 8, ["loss", "validation_loss"]) == {TASKS}
    assert wanted.missing(6, 8, ["task/piqa/acc", "validation_loss"]) == set()


@pytest.mark.parametrize("failure", [SpiralError("one"), Unreachable("one"), ValueError("one"), Stopped()])
def test_several_processes_save_after_failures_that_all_of_them_have(failure):
    class Failing:
        values = VALIDATION

        def due(self, step):
            return True

        def __call__(self, step, state):
            raise failure

    alone, several = Contained(Failing(), False), Contained(Failing(), True)
    with pytest.raises(Stopped):
        alone(1, None)
    assert alone.failure is (None if isinstance(failure, Stopped) else failure)
    with pytest.raises(Stopped if type(failure) in (SpiralError, Stopped) else type(failure)):
        several(1, None)
