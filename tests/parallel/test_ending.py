"""Several processes end together."""

import pytest
from pairs import both_end, flags_of

from spiral_jax.run.claim import claim


def test_what_only_process_0_can_see_ends_the_others_too(folder, start):
    (folder / "taken").mkdir()
    with claim(folder / "taken"):
        done = start("train", *flags_of(folder, "taken"), timeout=40)
    both_end(done, "another process is training there")
    assert done[1].stderr.startswith("error: process 0: --workdir")


@pytest.mark.slow
def test_data_that_cannot_be_prepared_ends_all(folder, start):
    done = start("train", *flags_of(folder, "empty"), "--config.data.paths=/no/such/file", timeout=60)
    both_end(done, "/no/such/file")


@pytest.mark.slow
def test_a_failure_in_a_step_of_one_process_ends_the_other(folder, start):
    done = start("train", *flags_of(folder, "fails"), sabotage=":fail:1:2", timeout=90)
    both_end(done, "a file of process 1: broken")


@pytest.mark.slow
def test_a_defect_has_its_traceback_and_ends_the_other(folder, start):
    main, other = start("train", *flags_of(folder, "crashes"), sabotage=":crash:1:2", timeout=90)
    assert other.returncode == 1 and "Traceback" in other.stderr and "a defect" in other.stderr
    assert main.returncode == 1 and main.stderr == "error: process 1: RuntimeError: a defect\n"
