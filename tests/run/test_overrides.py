"""`--config.FIELD=VALUE` as people type it."""

import pytest
from absl import flags
from verbs import call

from spiral_jax import command, describe
from spiral_jax.errors import SpiralError
from spiral_jax.run.overrides import as_typed

CONFIG = """
from spiral_jax.run.config import default_config

def get_config(argument=""):
    config = default_config()
    config.model.update(dict(topology="mesh", memory_slots=3, offsets=(1, 1), chunks=(2, 1)))
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


def test_a_home_of_nobody_is_one_line(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG, encoding="utf-8")
    for argument in ("--config.data.tokenizer=~nobody-here/t.json", "--import=~nobody-here/x.py"):
        status, errors = call(describe, f"--config={tmp_path}/config.py", argument)
        assert status == 2 or "tokenizer" in argument, errors
        assert errors.count("\n") <= 1, errors
