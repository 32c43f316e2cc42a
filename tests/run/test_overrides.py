"""`--config.FIELD=VALUE` as people type it."""

from pathlib import Path

import pytest
from absl import flags
from verbs import call

from spiral_jax import command, evaluate, prepare, train
from spiral_jax.data.storage import expanded
from spiral_jax.errors import SpiralError
from spiral_jax.run.overrides import as_typed

CONFIG = """
from spiral_jax.run.config import default_config

def get_config(argument=""):
    config = default_config()
    config.model.update(dict(topology="mesh", memory_slots=3, offsets=(1, 0), chunks=(2, 1)))
    config.optimizer.warmup_steps = 5
    return config
"""


def config_of(tmp_path, monkeypatch, *arguments):
    (tmp_path / "config.py").write_text(CONFIG, encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["x", f"--config={tmp_path}/config.py", *arguments])
    values = flags.FlagValues()
    command.define_config(values)
    command._parse(values, "x")
    return command.config_of(values)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("/my texts", ("/my texts",)),
        ("2024", ("2024",)),
        ("1e-3", ("1e-3",)),
        ("None", ("None",)),
        ("lr=1e-3,wd=0.1", ("lr=1e-3,wd=0.1",)),
        ("data/[ab]*.txt", ("data/[ab]*.txt",)),
        ("it's", ("it's",)),
        ("'/my texts'", ("/my texts",)),
        ("('a b', 'c')", ("a b", "c")),
        ("['a']", ("a",)),
        ("", ()),
    ],
)
def test_what_is_typed_for_a_field_of_texts_is_a_text(tmp_path, monkeypatch, typed, meant):
    for field in ("paths", "exclude", "validation_paths", "stores"):
        assert getattr(config_of(tmp_path, monkeypatch, f"--config.data.{field}={typed}").data, field) == meant
    assert config_of(tmp_path, monkeypatch, "--config.data.paths", typed).data.paths == meant


def test_a_comma_separates_names(tmp_path, monkeypatch):
    for typed in ("a,b", "a, b", "('a', 'b')"):
        assert config_of(tmp_path, monkeypatch, f"--config.evaluation.tasks={typed}").evaluation.tasks == ("a", "b")


def test_a_field_that_may_be_none_can_be_given_as_none(tmp_path, monkeypatch):
    before = config_of(tmp_path, monkeypatch)
    assert (before.model.memory_slots, before.optimizer.warmup_steps) == (3, 5)
    fields = ("model.memory_slots", "model.offsets", "optimizer.warmup_steps", "logging.peak_flops")
    config = config_of(tmp_path, monkeypatch, *(f"--config.{field}=None" for field in fields))
    assert (config.model.memory_slots, config.model.offsets, config.optimizer.warmup_steps) == (None, None, None)
    assert config_of(tmp_path, monkeypatch, "--config.model.memory_slots=7").model.memory_slots == 7
    with pytest.raises(SpiralError, match=r"^--config\.train\.steps is 'None'; allowed: an integer"):
        config_of(tmp_path, monkeypatch, "--config.train.steps=None")


@pytest.mark.parametrize("typed", ["('a', 2)", "(1, 2)", "[None]"])
def test_a_tuple_of_something_else_is_refused(tmp_path, monkeypatch, typed):
    with pytest.raises(SpiralError, match=r"^data\.paths\[\d\] is "):
        config_of(tmp_path, monkeypatch, f"--config.data.paths={typed}")


def test_other_arguments_are_left_as_they_are():
    others = ["--workdir", "a b", "--config=x.py:1,2", "--config.train.steps=3", "--config.nope=a b", "--", "x"]
    assert as_typed(others) == (others, [])
    assert as_typed(["--config.data.paths"]) == (["--config.data.paths"], [])


NOBODY = "~nobody-here/x"


@pytest.mark.parametrize(
    ("verb", "arguments"),
    [
        (train, (f"--workdir={NOBODY}",)),
        (train, ("--workdir={folder}/run", f"--import={NOBODY}")),
        (evaluate, (f"--workdir={NOBODY}",)),
        (prepare, ("--input={folder}/text", "--tokenizer=bytes", f"--output={NOBODY}")),
        (prepare, ("--input={folder}/text", f"--tokenizer={NOBODY}", "--output={folder}/out")),
        (prepare, (f"--input={NOBODY}", "--tokenizer=bytes", "--output={folder}/out")),
        (prepare, (f"--inspect={NOBODY}",)),
    ],
)
def test_a_home_of_nobody_is_one_line(tmp_path, monkeypatch, verb, arguments):
    (tmp_path / "config.py").write_text(CONFIG, encoding="utf-8")
    (tmp_path / "text").write_text("text", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    arguments = [argument.format(folder=tmp_path) for argument in arguments]
    status, errors = call(verb, *[f"--config={tmp_path}/config.py"] * (verb is train), *arguments)
    assert status == 2 and errors.count("\n") == 1 and "~nobody-here" in errors, errors
    assert not (tmp_path / "~nobody-here").exists()


def test_other_homes_are_found(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expanded("--x", "~/a") == tmp_path / "a" and expanded("--x", "a/~b") == Path("a/~b")
    with pytest.raises(SpiralError, match=r"^--x is '~nobody-here'; allowed: another path; ~nobody-here is no user"):
        expanded("--x", "~nobody-here")
