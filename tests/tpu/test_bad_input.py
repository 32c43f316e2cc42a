"""What a user can get wrong at the launcher: one line, status 2, and no command of the cloud was run."""

import importlib.util
import json
import os
from pathlib import Path

import pytest
from cases import slow

from spiral_jax.errors import SpiralError
from tests.tpu.launches import BAD, DESCRIBED, POINT, changed, fake
from tests.tpu.launches import GOOD as PLAIN
from tpu import plan
from tpu.launch import VERBS, main

GOOD = (*PLAIN, "--config=experiments/pile.py:1.4b,spiral_b", "--max_chip_hours=100")


@pytest.fixture
def asked(tmp_path, monkeypatch) -> Path:
    """A file to which every call of gcloud and kubectl would add a line; there is no account."""
    log = tmp_path / "calls"
    log.write_text("")
    for name in ("gcloud", "kubectl"):
        fake(tmp_path / name, f'echo "{name} $*" >>{log}; echo "You do not have an active account" >&2; exit 1')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    return log


@pytest.fixture
def framework(monkeypatch, tmp_path):
    """Answers of the framework's verbs, at once."""
    answers = {"spiral_jax.describe": json.loads(json.dumps(DESCRIBED)), "spiral_jax.aot": POINT}

    def child(module, *arguments, **others):
        if isinstance(answers[module], Exception):
            raise answers[module]
        return json.dumps(answers[module])

    monkeypatch.setattr(plan, "_child", child)
    monkeypatch.setattr(plan, "_resolve", lambda: "resolved")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return answers


def refused(capsys, *arguments, words):
    assert main(arguments) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1 and line.endswith("\n"), line
    assert words in line


@pytest.mark.parametrize("arguments, words", BAD.values(), ids=BAD)
def test_flags(arguments, words, asked, capsys):
    given = changed(*arguments)
    for verb in ("create", "babysit"):
        refused(capsys, verb, *given, words=words)
    assert asked.read_text() == ""


LINES = {
    "no verb": ((), "VERB"),
    "unknown verb": (("launch", *GOOD), "'launch'"),
    "no name": (("create", *GOOD[1:]), "NAME"),
    "no accelerator": (("create", GOOD[0], *GOOD[2:]), "--accelerator"),
    "no config": (("create", *PLAIN), "--config is missing"),
    "config that is not there": (("create", *PLAIN, "--config=nope.py"), "--config is 'nope.py'"),
    "config that git ignores": (("create", *PLAIN, "--config=.venv/x.py"), "--config is '.venv/x.py'"),
    "import that is not there": (("create", *GOOD, "--import=mine.py"), "--import is 'mine.py'"),
    "babysitting no config": (("babysit", *PLAIN, "--max_chip_hours=9", "--skip_plan"), "--config is missing"),
    "running no config": (("run", *PLAIN, "--dry_run"), "--config is missing"),
    "running a config that is not there": (("run", *PLAIN, "--config=nope.py", "--dry_run"), "--config is 'nope.py'"),
    "logs of no host": (("logs", *PLAIN, "--host=99", "--dry_run"), "--host is 99; allowed: 0 to 15"),
    "image": (("create", *GOOD, "--provider=gke", "--image=a b;c"), "--image is 'a b;c'"),
    "reaping a name": (("reap", "a;reboot"), "NAME is 'a;reboot'"),
    "reaping a zone": (("reap", "--zone=x;y", "--dry_run"), "--zone is 'x;y'"),
    "reaping no zone": (("reap", "--zone="), "--zone is ''"),
    "reaping a project": (("reap", "--project=p;q"), "--project is 'p;q'"),
    "no cap": (("babysit", *GOOD[:-1]), "--max_chip_hours is missing"),
    "list without a budget": (("babysit", "--jobs=x.json"), "--max_chip_hours"),
    "list that is not there": (("babysit", "--jobs=/nowhere.json", "--max_chip_hours=1"), "--jobs is '/nowhere.json'"),
}


@pytest.mark.parametrize("arguments, words", LINES.values(), ids=LINES)
def test_command_lines(arguments, words, asked, framework, capsys):
    refused(capsys, *arguments, words=words)
    assert asked.read_text() == ""


def test_no_credentials(asked, framework, capsys):
    refused(capsys, "create", *GOOD, words="credentials of gcloud is missing; allowed: an account")
    # A token was asked for, and that was all.
    assert set(asked.read_text().splitlines()) == {"gcloud auth print-access-token --quiet"}


def in_plan(framework, problem):
    """Makes the framework find a problem."""
    if problem == "does not fit":
        framework["spiral_jax.aot"] = SpiralError(
            "--topology is 'v5p:4x4x4', of which a device needs 99 GiB; allowed: x"
        )
    elif problem == "unknown field":
        framework["spiral_jax.describe"] = SpiralError(
            "--config.train.stepz is not a field; allowed: those of docs/config.md"
        )
    elif problem == "no data":
        framework["spiral_jax.describe"] = SpiralError(
            "data.stores is 'gs://b/pile', which holds no tokens; allowed: a store"
        )
    elif problem == "local data":
        framework["spiral_jax.describe"]["reads"] = {"data.stores": ["/data/pile"]}


@pytest.mark.parametrize(
    "problem, zone, words",
    [
        (
            "other region",
            "us-east5-a",
            "which is in us-central1, while us-east5-a is in us-east5; allowed: one in us-east5",
        ),
        ("does not fit", "us-central1-a", "of which a device needs 99 GiB"),
        ("unknown field", "us-central1-a", "--config.train.stepz is not a field"),
        ("no data", "us-central1-a", "data.stores is 'gs://b/pile', which holds no tokens"),
        ("local data", "us-central1-a", "data.stores is '/data/pile'; allowed: gs://..."),
    ],
)
@pytest.mark.parametrize("verb", [slow("plan"), "create", slow("babysit")])
def test_what_the_plan_finds(verb, problem, zone, words, asked, framework, bucket_url, capsys):
    """The bucket is there, in us-central1."""
    in_plan(framework, problem)
    given = changed(f"--bucket={bucket_url}", f"--zone={zone}", *GOOD[-2:])
    refused(capsys, verb, *given, words=words)
    assert asked.read_text() == ""


def test_a_bucket_that_is_not_there(asked, framework, bucket_url, capsys):
    given = changed(f"--bucket={bucket_url}x", "--zone=us-central1-a", *GOOD[-2:])
    refused(capsys, "create", *given, words=f"{bucket_url}x")
    assert asked.read_text() == ""


def test_a_good_plan_is_no_error(asked, framework, bucket_url, capsys):
    """So that the rest of this file is refused for the reason it says."""
    given = changed(f"--bucket={bucket_url}", "--zone=us-central1-a", *GOOD[-2:])
    assert main(["plan", *given]) == 0
    assert "chip-hours" in capsys.readouterr().out and asked.read_text() == ""


@pytest.mark.parametrize("verb", sorted(VERBS.keys() - {"reap"}))
def test_every_verb_refuses_names(verb, asked, capsys):
    """Also those that create nothing: a name goes into their commands, too."""
    refused(capsys, verb, *changed("a;reboot"), words="NAME is 'a;reboot'")
    assert asked.read_text() == ""
