"""Cells of `python -m tests.punish`: whatever is done to a run, it ends as if it had been left alone."""

import pytest
from cases import slow
from punish import CELLS, punisher

QUICK = ("SIGKILL/commit", "SIGTERM/evaluation", "non-finite/step")
# How the punished start ends, by kind; SIGTERM and two of them end with 143 where there is nothing to save yet.
FIRST = {"SIGKILL": {-9}, "SIGTERM": {42}, "twice": {42}, "SIGSTOP": {0}, "disk full": {2}, "non-finite": {44},
         "flipped bit": {-9}, "dead peer": {-9}}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    with punisher(tmp_path_factory.mktemp("punish")) as made:
        yield made


@pytest.mark.parametrize("cell", [cell if cell in QUICK else slow(cell) for cell in CELLS])
def test_ends_as_if_left_alone(made, cell):
    row = made.row(cell)
    kind, moment = cell.split("/")
    assert row.same and set(row.statuses[-1]) == {0}, row
    allowed = {143} if kind in ("SIGTERM", "twice") and moment in ("start", "compile") else FIRST[kind]
    if cell == "disk full/exit":
        allowed = {0}  # all of it is written
    assert row.statuses[0][0] in allowed, row
    if kind == "SIGTERM" or kind == "SIGSTOP":
        assert row.steps_lost == 0, row
    assert not [line for line in row.lines if "Traceback" in line], row
