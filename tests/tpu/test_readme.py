"""tpu/README.md: every command on it is one that its program takes, and what it says is run, is run."""

import re
import shlex
from pathlib import Path

import pytest
from pages import ROOT, commands, lint, parse_verb

from tpu import launch
from tpu.first_hour.__main__ import parser as first_hour

PAGE = ROOT / "tpu" / "README.md"
LAUNCHES = commands(PAGE, "python -m tpu.launch")


@pytest.fixture
def printed(tmp_path, monkeypatch):
    """(arguments of the launcher) to the commands that it prints with --dry_run; none of them is run."""

    def refuse(*_):
        raise AssertionError("a dry run ran something")

    def dry_run(arguments):
        lines = []
        verb = arguments[0]
        skip = ["--skip_plan"] if verb in ("plan", "create", "babysit") else []
        assert launch.main([*arguments, "--dry_run", *skip], say=lines.append, execute=refuse) == 0
        return [shlex.split(line) for line in lines if line.startswith("gcloud ")]

    return dry_run


def test_the_page_is_one_page():
    assert len(PAGE.read_text(encoding="utf-8").splitlines()) <= 90


def test_every_command_is_of_a_program_that_is_known():
    kinds = [" ".join(arguments[:3])[:21] for arguments in commands(PAGE)]
    assert {kind for kind in kinds if not kind.startswith("gcloud ")} == {
        "python -m tpu.first_h", "python -m tpu.launch", "python -m spiral_jax."
    }  # fmt: skip
    assert {arguments[3] for arguments in LAUNCHES} == {
        "plan", "babysit", "status", "logs", "stop", "delete", "reap"
    }  # fmt: skip


def test_launcher_lines_are_taken_by_the_launcher(printed):
    for arguments in LAUNCHES:
        printed(arguments[3:])


def test_a_line_with_a_wrong_flag_is_not(printed):
    with pytest.raises(AssertionError):
        printed([*LAUNCHES[0][3:], "--acelerator=v5p-128"])


def test_the_lines_that_the_launcher_runs_are_those_that_it_prints(printed):
    said = [arguments for arguments in commands(PAGE, "gcloud compute tpus")]
    done = [command for arguments in LAUNCHES for command in printed(arguments[3:])]
    assert len(said) == 5
    for command in said:
        assert command in done, shlex.join(command)
    # And what is left out of the page is what its last sentence says.
    rest = {command[4] for command in done if command not in said}
    assert rest <= {"scp", "ssh"}


def test_other_lines_of_ours_parse():
    for arguments in commands(PAGE, "python -m tpu.first_hour"):
        first_hour().parse_args(arguments[3:])
    assert len([parse_verb(arguments) for arguments in commands(PAGE, "python -m spiral_jax.")]) == 2


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", PAGE.read_text(encoding="utf-8")):
        assert (PAGE.parent / target).exists(), target


@pytest.mark.slow
def test_gcloud_accepts_every_line():
    found = commands(PAGE, "gcloud")
    assert len(found) == 13
    assert not list(filter(None, map(lint, found)))
    assert "nrecognized" in lint([*found[3], "--no-such-flag"]), "a bad flag is refused"


def test_the_predictions_page_moved_whole():
    page = Path(ROOT / "tpu" / "predictions" / "README.md").read_text(encoding="utf-8")
    assert "Nothing here has run on a TPU" in page and "## Muon beside AdamW" in page
