"""The configuration: every field round trips, every mistake is one line that names its field, what may change later."""

import dataclasses
import json

import pytest

from spiral_jax.errors import SpiralError
from spiral_jax.run.config import RunConfig, default_config
from spiral_jax.training.schedules import learning_rate

SMALL = {
    "model": {"vocab_size": 64, "d_model": 32, "num_heads": 4, "chunks": (4, 2, 1), "dtype": "float32"},
    "train": {"steps": 100, "batch_size": 8, "sequence_length": 16},
    "data": {"paths": ("a.txt",)},
}


def config_of(*, schedule="cosine", **fields) -> RunConfig:
    """SMALL with fields changed: config_of(train__steps=7)."""
    values = default_config()
    for room, entries in SMALL.items():
        values[room].update(entries)
    values.optimizer.schedule = schedule
    for name, value in fields.items():
        *rooms, field = name.split("__")
        target = values
        for room in rooms:
            target = target[room]
        target[field] = value
    return RunConfig.from_dict(values.to_dict())


def leaves(values, prefix=""):
    """(dotted name, value) of every field."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def nested(name: str, value):
    """{"a": {"b": value}} of "a.b"."""
    for part in reversed(name.split(".")):
        value = {part: value}
    return value


def refused(values) -> str:
    """The message of a configuration that must be refused: one line."""
    with pytest.raises(SpiralError) as error:
        RunConfig.from_dict(values)
    message = str(error.value)
    assert message and "\n" not in message
    return message


def test_default_config_is_the_default():
    assert RunConfig.from_dict(default_config()) == RunConfig()
    assert RunConfig.from_dict(default_config().to_dict()) == RunConfig()
    assert RunConfig.from_dict({}) == RunConfig()


def test_json_round_trip(tmp_path):
    config = config_of(model__offsets=(1, 0, 0), optimizer__warmup_steps=3, logging__peak_flops=1e12, seed=5)
    config.save(tmp_path / "config.json")
    assert RunConfig.from_dict(json.loads((tmp_path / "config.json").read_text())) == config
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_fields_that_people_override_most_are_there():
    fields = dict(leaves(default_config().to_dict()))
    wanted = ("train.steps", "train.batch_size", "train.sequence_length", "seed", "model.chunks", "mesh.fsdp")
    assert set(wanted) <= fields.keys()


def test_recipe_is_the_default():
    """docs/spec.md section 5."""
    config = RunConfig()
    assert (config.train.steps, config.train.batch_size, config.train.sequence_length) == (120_818, 512, 4096)
    assert config.train.tokens_per_step == 2**21
    o = config.optimizer
    assert (o.schedule, o.beta1, o.beta2, o.epsilon, o.weight_decay) == ("cosine", 0.9, 0.95, 1e-8, 0.01)
    assert (o.clip_norm, o.warmup_fraction, o.final_fraction) == (1.0, 0.01, 0.1)
    assert config.model.dtype == "bfloat16"


@pytest.mark.parametrize("name", [name for name, _ in leaves(default_config().to_dict())])
def test_every_field_refuses_a_wrong_type_by_name(name):
    assert refused(nested(name, {"no": "such type"})).startswith(name)


@pytest.mark.parametrize(
    "name, value",
    [
        ("train.steps", "10"),
        ("train.steps", 10.0),
        ("train.steps", True),
        ("seed", True),
        ("seed", "0"),
        ("optimizer.peak_learning_rate", "fast"),
        ("optimizer.peak_learning_rate", True),
        ("model.chunks", 4),
        ("model.chunks", (4, "2")),
        ("model.chunks", (4, 2.0)),
        ("model.unroll", 1),
        ("model.dtype", 32),
        ("optimizer.warmup_steps", 1.5),
        ("data.paths", "a.txt"),
        ("train", 3),
        ("logging.tensorboard", "yes"),
    ],
)
def test_wrong_types_are_refused(name, value):
    assert name in refused(nested(name, value))


@pytest.mark.parametrize(
    "name, value",
    [
        ("seed", -1),
        ("seed", 2**32),
        ("train.steps", 0),
        ("train.batch_size", 0),
        ("train.sequence_length", 0),
        ("train.accumulation", 0),
        ("train.loss_block", 0),
        ("train.attention", "flash"),
        ("optimizer.schedule", "linear"),
        ("optimizer.warmup_steps", -1),
        ("optimizer.warmup_fraction", 1.5),
        ("optimizer.decay_fraction", -0.1),
        ("optimizer.final_fraction", 2.0),
        ("optimizer.beta1", 1.0),
        ("optimizer.beta2", -0.5),
        ("optimizer.epsilon", 0.0),
        ("optimizer.peak_learning_rate", 0.0),
        ("optimizer.peak_learning_rate", float("nan")),
        ("optimizer.peak_learning_rate", float("inf")),
        ("optimizer.weight_decay", -1.0),
        ("optimizer.clip_norm", -1.0),
        ("optimizer.clip_norm", float("nan")),
        ("evaluation.every_steps", -1),
        ("evaluation.batches", -1),
        ("checkpoint.every_steps", 0),
        ("checkpoint.keep", 0),
        ("checkpoint.keep_every_steps", -1),
        ("logging.every_steps", 0),
        ("logging.seconds", -1.0),
        ("logging.peak_flops", 0.0),
        ("summary.sample_tokens", -1),
        ("summary.prompt_tokens", 0),
        ("summary.temperature", -0.1),
        ("mesh.tensor", 0),
        ("model.num_heads", 5),
        ("model.topology", "spiral"),
        ("model.chunks", (0,)),
        ("model.dtype", "float16"),
        ("model.rotary_fraction", 1.5),
        ("data.validation_fraction", 1.0),
    ],
)
def test_values_out_of_range_are_refused_by_name(name, value):
    message = refused(nested(name, value))
    assert name in message
    assert name.startswith("mesh") or str(value)[:3] in message


@pytest.mark.parametrize(
    "name, suggestion",
    [
        ("train.step", "train.steps"),
        ("model.d_modle", "model.d_model"),
        ("optimiser", "optimizer"),
        ("optimizer.peak_learning", "optimizer.peak_learning_rate"),
        ("checkpoint.every_step", "checkpoint.every_steps"),
    ],
)
def test_an_unknown_field_is_refused_with_a_suggestion(name, suggestion):
    message = refused(nested(name, 1))
    assert message.startswith(f"{name} is not a field") and f"did you mean {suggestion}?" in message


def test_an_unlike_field_is_refused_with_a_list():
    message = refused({"mesh": {"zzzzz": 1}})
    assert "mesh.zzzzz" in message and "data, fsdp, tensor" in message


def test_integers_are_numbers_and_lists_are_tuples():
    config = RunConfig.from_dict({"optimizer": {"clip_norm": 1}, "model": {"chunks": [2, 1]}})
    assert type(config.optimizer.clip_norm) is float
    assert config.model.chunks == (2, 1)


# What may change on resume.


@pytest.mark.parametrize(
    "field, value",
    [
        ("mesh__fsdp", 2),
        ("checkpoint__every_steps", 7),
        ("checkpoint__keep", 9),
        ("evaluation__every_steps", 3),
        ("evaluation__batches", 2),
        ("logging__every_steps", 5),
        ("logging__peak_flops", 1e12),
        ("summary__sample_tokens", 4),
        ("train__accumulation", 4),
        ("train__attention", "xla"),
        ("data__read_threads", 7),
        ("data__prefetch_batches", 7),
        ("data__workers", 7),
        ("data__longest_record", 7),
        ("data__retry_seconds", 7.0),
        ("data__stores", ("gs://moved",)),
    ],
)
@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_where_and_how_it_runs_may_change(field, value, schedule):
    config_of(schedule=schedule, **{field: value}).check_resume(config_of(schedule=schedule), 50)


def test_the_validation_store_may_move():
    moved = config_of(data__stores=("a",), data__validation_store="gs://moved")
    moved.check_resume(config_of(data__stores=("a",)), 50)


@pytest.mark.parametrize(
    "field, value",
    [
        ("seed", 1),
        ("model__d_model", 64),
        ("model__chunks", (2, 1)),
        ("model__topology", "anchor"),
        ("model__dtype", "bfloat16"),
        ("train__batch_size", 16),
        ("train__sequence_length", 32),
        ("optimizer__peak_learning_rate", 1e-3),
        ("optimizer__warmup_steps", 9),
        ("optimizer__clip_norm", 0.5),
        ("data__paths", ("b.txt",)),
        ("data__tokenizer", "bpe"),
    ],
)
def test_what_is_computed_may_not(field, value):
    saved, given = config_of(), config_of(**{field: value})
    with pytest.raises(SpiralError) as error:
        given.check_resume(saved, 50)
    message = str(error.value)
    before = dict(leaves(saved.to_dict()))[field.replace("__", ".")]
    assert message.startswith(field.replace("__", ".")) and "\n" not in message
    assert repr(before) in message and repr(value) in message


def mixed(weights, starts, stores=("a", "b")) -> RunConfig:
    return config_of(data__stores=stores, data__weights=weights, data__stage_starts=starts)


def test_stages_to_come_may_change_and_bring_stores():
    saved = mixed(((0.7, 0.3), (0.5, 0.5)), (0, 80))
    for weights, starts in (
        (((0.7, 0.3),), (0,)),
        (((0.7, 0.3), (0.1, 0.9)), (0, 60)),
        (((0.7, 0.3), (0.1, 0.9)), (0, 50)),  # 50 steps are done: the next one may be of another mixture
        (((0.7, 0.3, 0.0), (0.1, 0.1, 0.8)), (0, 60)),
    ):
        mixed(weights, starts, ("a", "b", "c")[: len(weights[0])]).check_resume(saved, 50)


@pytest.mark.parametrize(
    "weights, starts",
    [
        (((0.6, 0.4), (0.5, 0.5)), (0, 80)),
        (((0.7, 0.3), (0.5, 0.5)), (0, 49)),
        (((0.7, 0.2, 0.1), (0.5, 0.5, 0.0)), (0, 80)),
        ((), (0,)),
    ],
)
def test_stages_that_were_used_may_not_change(weights, starts):
    saved = mixed(((0.7, 0.3), (0.5, 0.5)), (0, 80))
    with pytest.raises(SpiralError, match=r"data\.weights with .* for the 50 steps that are done; allowed: "):
        mixed(weights, starts, ("a", "b", "c")[: len(weights[0])] if weights else ("a", "b")).check_resume(saved, 50)


def test_saved_as_json_is_the_same_configuration():
    """Tuples come back from JSON as lists; that is no difference."""
    config = config_of()
    config.check_resume(RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))), 50)


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_steps_may_not_fall_below_what_is_done(schedule):
    with pytest.raises(SpiralError, match=r"^train\.steps is 49; allowed: 100, .*50 steps are done"):
        config_of(schedule=schedule, train__steps=49).check_resume(config_of(schedule=schedule), 50)


@pytest.mark.parametrize("steps", [60, 200])
def test_cosine_fixes_the_steps(steps):
    with pytest.raises(SpiralError, match=rf"^train\.steps is {steps}; allowed: 100, .*cosine"):
        config_of(train__steps=steps).check_resume(config_of(), 50)


def warm(steps, schedule):
    """A run whose warm-up does not depend on its length."""
    return config_of(schedule=schedule, train__steps=steps, optimizer__warmup_steps=10)


@pytest.mark.parametrize("done, steps", [(50, 200), (50, 60), (10, 200), (100, 150), (50, 50)])
def test_constant_goes_on_for_longer(done, steps):
    warm(steps, "constant").check_resume(warm(100, "constant"), done)


@pytest.mark.parametrize("done, steps, ok", [
    (80, 200, True),   # the decay of the last 20 % begins after step 80
    (81, 200, False),  # one step of it is done
    (50, 200, True),
    (50, 62, False),   # would have begun after step 49
    (50, 63, True),
    (10, 200, True),
])  # fmt: skip
def test_wsd_goes_on_while_the_rate_is_constant(done, steps, ok):
    given, saved = warm(steps, "wsd"), warm(100, "wsd")
    if ok:
        given.check_resume(saved, done)
    else:
        with pytest.raises(SpiralError, match=rf"^train\.steps is {steps}; allowed: 100, .*step {done}"):
            given.check_resume(saved, done)


@pytest.mark.parametrize("schedule", ["constant", "wsd"])
def test_a_warm_up_that_would_have_been_another_is_refused(schedule):
    """W = 1 % of the steps: after 2 steps of 100 the rate has been at its peak; of 1000 it would still be rising."""
    config_of(schedule=schedule, train__steps=1000).check_resume(config_of(schedule=schedule), 10)
    with pytest.raises(SpiralError, match=r"^train\.steps"):
        config_of(schedule=schedule, train__steps=1000).check_resume(config_of(schedule=schedule), 2)


@pytest.mark.slow
def test_a_resume_never_changes_a_rate_that_was_used():
    """Whatever the rule lets through, by brute force over lengths and steps done, warm-up of a fixed length."""
    for schedule in ("cosine", "wsd", "constant"):
        for saved_steps in (20, 31):
            saved = config_of(schedule=schedule, train__steps=saved_steps, optimizer__warmup_steps=3)
            before = learning_rate(saved.optimizer, saved_steps)
            for steps in (10, 19, 20, 25, 40):
                given = dataclasses.replace(saved, train=dataclasses.replace(saved.train, steps=steps))
                after = learning_rate(given.optimizer, steps)
                for done in range(1, saved_steps + 1):
                    try:
                        given.check_resume(saved, done)
                    except SpiralError:
                        continue
                    assert all(float(before(k)) == float(after(k)) for k in range(done)), (schedule, steps, done)
