"""Up-cycling: which of the source's layers go where, and the function that comes of it."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from folders import run_of, write_folder
from verbs import call

import spiral_jax
from spiral_jax import train
from spiral_jax.convert.upcycle import UpcycleConfig, fresh_linears, place, source_layers, upcycled
from spiral_jax.errors import SpiralError
from spiral_jax.model.config import ModelConfig
from spiral_jax.model.spiralformer import abstract_params
from spiral_jax.parallel.mesh import MeshConfig, make_mesh
from spiral_jax.run.config import RunConfig
from spiral_jax.training.step import abstract_state

SOURCE = ModelConfig(vocab_size=19, d_model=16, num_heads=2, prelude_layers=6, core_layers=0, coda_layers=0,
                     rotary_fraction=0.5, chunks=(), topology="base", dtype="float32")  # fmt: skip
LOOP = dataclasses.replace(SOURCE, prelude_layers=1, core_layers=4, coda_layers=1, chunks=(1,))
UNSHARED = dataclasses.replace(LOOP, core_layers=2, chunks=(1, 1), shared_core=False)
SPIRAL = dataclasses.replace(LOOP, core_layers=2, chunks=(4, 2, 1), topology="mesh")
GIVEN = UpcycleConfig(source="x")
TRAIN = """
from spiral_jax.run.config import default_config

def get_config(argument=""):
    config = default_config()
    config.model.update(dict(vocab_size=19, d_model=16, num_heads=2, prelude_layers=1, core_layers=4, coda_layers=1,
                             rotary_fraction=0.5, chunks=(1,), topology="base", dtype="float32"))
    config.train.update(dict(steps=1, batch_size=8, sequence_length=8))
    config.optimizer.update(dict(warmup_steps=0, schedule="constant", peak_learning_rate=1e-30))
    config.data.update(dict(paths=("{text}",), validation_fraction=0.0, tokenizer="{folder}/tokenizer.json"))
    config.mesh.fsdp = 2
    config.upcycle.source = "{folder}"
    return config
"""


@pytest.fixture(scope="module")
def source(random_model):
    """Parameters of the source."""
    return random_model(SOURCE)[2]


@pytest.fixture(scope="module")
def folder(random_model, tmp_path_factory):
    hf_config, tensors, _ = random_model(SOURCE)
    folder = tmp_path_factory.mktemp("upcycle") / "source"
    return write_folder(folder, hf_config, {k: v.astype(np.float32) for k, v in tensors.items()})


def kernels(params, stack):
    return np.asarray(params[stack]["layers"]["qkv"]["kernel"])


def test_all_layers_and_one_full_iteration_are_the_source(source, forward):
    tokens_BxL = np.random.default_rng(0).integers(0, 19, (2, 11)).astype(np.int32)
    expected = forward(SOURCE, source, tokens_BxL)
    np.testing.assert_array_less(1e-3, np.abs(expected).max())
    taken = upcycled(GIVEN, LOOP, SOURCE, source)
    np.testing.assert_allclose(forward(LOOP, taken, tokens_BxL), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "changes, model, expected",
    [
        # The first, the last, those between.
        ({}, LOOP, ([[0]], [[1], [2], [3], [4]], [[5]])),
        ({"core": (1, 4)}, SPIRAL, ([[0]], [[1], [4]], [[5]])),
        ({"prelude": (2,), "coda": (5,)}, SPIRAL, ([[2]], [[3], [4]], [[5]])),
        ({"prelude": (3,), "core": (3, 0), "coda": (3,)}, SPIRAL, ([[3]], [[3], [0]], [[3]])),
        # Layer i of the core is the mean of i, i + K, i + 2 K, ... of those listed.
        ({"core_method": "average"}, SPIRAL, ([[0]], [[1, 3], [2, 4]], [[5]])),
        ({"core": (5, 4, 3, 2, 1, 0), "core_method": "average"}, SPIRAL, ([[0]], [[5, 3, 1], [4, 2, 0]], [[5]])),
        ({}, UNSHARED, ([[0]], [[1], [2], [3], [4]], [[5]])),
        ({"core": ()}, dataclasses.replace(SPIRAL, core_layers=0), ([[0]], [], [[5]])),
        ({}, dataclasses.replace(SOURCE, prelude_layers=2, coda_layers=1), ([[0], [1]], [], [[5]])),
    ],
)  # fmt: skip
def test_which_layers(source, changes, model, expected):
    config = dataclasses.replace(GIVEN, **changes)
    parts = source_layers(config, model, SOURCE)
    assert (parts["prelude"], parts["core"], parts["coda"]) == expected
    taken, given = upcycled(config, model, SOURCE, source), kernels(source, "prelude")
    core = [stack for stack in taken if stack.startswith("core")]
    stacks = {"prelude": ["prelude"], "core": core, "coda": ["coda"]}
    for part, groups in zip(stacks, expected, strict=True):
        found = [layer for stack in stacks[part] for layer in kernels(taken, stack)]
        assert len(found) == len(groups)
        for layer, group in zip(found, groups, strict=True):
            mean = sum(given[i].astype(np.float64) for i in group) / len(group)
            np.testing.assert_array_equal(layer, mean.astype(np.float32))
    assert taken["embed"] is source["embed"] and taken["head"] is source["head"]
    assert taken["final_norm"] is source["final_norm"]
    assert not [group for group in taken if group == "entry" or group.startswith("steps_")]


@pytest.mark.parametrize(
    "changes, model, named",
    [
        ({}, {"d_model": 32}, r"model\.d_model: d_model is 32; allowed: 16"),
        ({}, {"num_heads": 4}, r"model\.num_heads"),
        ({}, {"vocab_size": 20}, r"model\.vocab_size: vocab_size is 20; allowed: 19"),
        ({}, {"rotary_fraction": 1.0}, r"model\.rotary_fraction: rotary_dims is 8; allowed: 4"),
        ({}, {"rotary_base": 5.0}, r"model\.rotary_base"),
        ({}, {"layer_norm_epsilon": 1e-6}, r"model\.layer_norm_epsilon"),
        ({"prelude": (0, 1)}, {}, r"upcycle\.prelude is \(0, 1\); allowed: 1 layers"),
        ({"coda": (6,)}, {}, r"upcycle\.coda is \(6,\); allowed: layers of the source, 0\.\.5"),
        ({"core": (1,)}, {}, r"upcycle\.core is \(1,\); allowed: 2 layers"),
        ({}, {}, r"upcycle\.core by default is \(1, 2, 3, 4\); allowed: 2 layers.*average"),
        ({}, {"prelude_layers": 7}, r"model\.prelude_layers \+ model\.coda_layers is 8"),
        ({}, {"coda_layers": 7}, r"model\.prelude_layers \+ model\.coda_layers is 8"),
        ({"core": (1, 2, 3), "core_method": "average"}, {}, r"upcycle\.core is \(1, 2, 3\).*a multiple of the 2"),
        ({"coda": (1,), "core_method": "average"}, {}, r"upcycle\.core by default is \(\)"),
        ({"core": (1,)}, {"core_layers": 0}, r"upcycle\.core is \(1,\); allowed: 0"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(source, changes, model, named):
    with pytest.raises(SpiralError, match=named) as error:
        upcycled(dataclasses.replace(GIVEN, **changes), dataclasses.replace(SPIRAL, **model), SOURCE, source)
    assert "\n" not in str(error.value)


# Looped sources


LOOPED = dataclasses.replace(SPIRAL, chunks=(8, 4, 2, 1), memory_slots=7)


@pytest.fixture(scope="module")
def looped(random_model):
    return random_model(LOOPED)[2]


@pytest.mark.parametrize(
    "chunks, iterations",
    [((4, 2, 1), (1, 2, 3)), ((8, 8, 4, 2, 1), (0, 0, 1, 2, 3)), ((1, 2, 4, 8), (3, 2, 1, 0)), ((8, 4, 2, 1), ())],
)
def test_iterations_left_out_repeated_and_reordered(looped, chunks, iterations):
    """Every array is where the field says, and nothing starts anew."""
    model = dataclasses.replace(LOOPED, chunks=chunks)
    taken = upcycled(dataclasses.replace(GIVEN, iterations=iterations), model, LOOPED, looped)
    for part in ("embed", "head", "final_norm", "prelude", "core", "coda", "entry"):
        jax.tree.map(np.testing.assert_array_equal, taken[part], looped[part])
    for t, source in enumerate(iterations or range(4)):
        jax.tree.map(np.testing.assert_array_equal, taken[f"steps_{t}"], looped[f"steps_{source}"])
    assert fresh_linears(model, taken) == []
    shapes = jax.tree.map(np.shape, taken)
    assert shapes == jax.tree.map(np.shape, abstract_params(model))


def test_cores_of_their_own_go_with_their_iterations(random_model):
    config = dataclasses.replace(LOOPED, shared_core=False, topology="gated")
    params = random_model(config)[2]
    taken = upcycled(dataclasses.replace(GIVEN, iterations=(3, 1, 1, 0)), config, config, params)
    for t, source in enumerate((3, 1, 1, 0)):
        jax.tree.map(np.testing.assert_array_equal, taken[f"cores_{t}"], params[f"cores_{source}"])
        jax.tree.map(np.testing.assert_array_equal, taken[f"steps_{t}"]["gate"], params[f"steps_{source}"]["gate"])


def test_the_same_schedule_is_the_same_function(looped, forward):
    tokens_BxL = np.random.default_rng(0).integers(0, 19, (2, 21)).astype(np.int32)
    taken = upcycled(GIVEN, LOOPED, LOOPED, looped)
    np.testing.assert_array_equal(forward(LOOPED, taken, tokens_BxL), forward(LOOPED, looped, tokens_BxL))


def test_what_a_looped_source_has_not_starts_as_always(looped):
    """Other slots (T + 3 of another T), another chunk size, another topology: said by name."""
    fewer = dataclasses.replace(LOOPED, chunks=(4, 2, 1), memory_slots=None)
    taken = upcycled(dataclasses.replace(GIVEN, iterations=(1, 2, 3)), fewer, LOOPED, looped)
    routers = [f"{group}/{side}" for group in ("entry", "steps_0", "steps_1", "steps_2") for side in ("write", "read")]
    assert fresh_linears(fewer, taken) == routers
    assert set(taken["steps_0"]) == {"scorer", "allocator"}
    other = dataclasses.replace(LOOPED, chunks=(4, 4, 2, 1), topology="gated")
    taken = upcycled(GIVEN, other, LOOPED, looped)
    assert fresh_linears(other, taken) == ["steps_0/gate", "steps_0/allocator", *(f"steps_{t}/gate" for t in (1, 2, 3))]


@pytest.mark.parametrize(
    "iterations, source, named",
    [
        ((), LOOPED, r"upcycle\.iterations is \(\); allowed: 3 of the source's iterations 0\.\.3"),
        ((1, 2), LOOPED, r"upcycle\.iterations is \(1, 2\); allowed: 3 of"),
        ((1, 2, 4), LOOPED, r"upcycle\.iterations is \(1, 2, 4\); allowed: 3 of"),
        ((1, 2, 3), SOURCE, r"upcycle\.iterations is \(1, 2, 3\); allowed: nothing"),
    ],
)
def test_iterations_that_are_not_there_are_named(iterations, source, named, random_model):
    config = dataclasses.replace(GIVEN, iterations=iterations, core=(1, 2))
    with pytest.raises(SpiralError, match=named):
        upcycled(config, SPIRAL, source, random_model(source)[2])


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"core_method": "sum"}, "upcycle.core_method"),
        ({"source": "x", "core": (-1,)}, "upcycle.core"),
        ({"prelude": (1,)}, "upcycle.prelude"),
        ({"iterations": (1,)}, "upcycle.iterations"),
        ({"source": "x", "iterations": (-1,)}, "upcycle.iterations"),
    ],
)
def test_bad_sections(fields, named):
    with pytest.raises(SpiralError, match=named):
        RunConfig.from_dict({"upcycle": fields})


@pytest.mark.parametrize("mesh", [(8, 1, 1), (2, 2, 2), (1, 8, 1)])
def test_parameters_lie_where_the_program_wants_them(source, mesh):
    model = dataclasses.replace(SPIRAL, vocab_size=20)  # which divides over the mesh
    grown = source | {
        "embed": {"embedding": np.arange(320, dtype=np.float32).reshape(20, 16)},
        "head": {"kernel": np.arange(320, dtype=np.float64).reshape(16, 20)},
    }
    taken = upcycled(dataclasses.replace(GIVEN, core_method="average"), model,
                     dataclasses.replace(SOURCE, vocab_size=20), grown)  # fmt: skip
    layout = abstract_state(RunConfig(model=model), make_mesh(MeshConfig(*mesh), jax.devices())).params
    placed = place(taken, layout)
    assert placed["entry"] is not None and jax.tree.structure(placed) == jax.tree.structure(layout)
    for array, like, host in zip(
        *map(jax.tree.leaves, ({group: placed[group] for group in taken}, {g: layout[g] for g in taken}, taken)),
        strict=True,
    ):
        assert (array.sharding, array.dtype) == (like.sharding, like.dtype)
        np.testing.assert_array_equal(np.asarray(array), host)


@pytest.mark.slow
def test_the_command_starts_from_the_source_and_resumes_without_it(folder, tmp_path, capsys):
    """On a mesh; a step of no size leaves what it started from, also of the averaged core."""
    (tmp_path / "text.txt").write_text("a b b a " * 40)
    copy = tmp_path / "source"
    shutil.copytree(folder, copy)
    config = tmp_path / "config.py"
    config.write_text(TRAIN.replace("{text}", f"{tmp_path}/text.txt").replace("{folder}", str(copy)))
    arguments = (f"--config={config}", f"--workdir={tmp_path}/run")
    refused = (
        ("--config.model.d_model=32", "model.d_model"),
        ("--config.upcycle.core=(1,)", "upcycle.core"),
        ("--config.upcycle.source=/no/folder", "/no/folder"),
        ("--config.upcycle.core_method=sum", "upcycle.core_method"),
    )
    for override, named in refused:
        status, errors = call(train, *arguments, override)
        assert status == 2 and errors.count("\n") == 1 and named in errors, errors
    assert not (tmp_path / "run").exists()
    assert call(train, *arguments) == (0, "")
    assert f"starting from the layers of {copy}" in capsys.readouterr().out
    params = jax.tree.map(np.asarray, spiral_jax.load(tmp_path / "run")[1])
    given = jax.tree.map(np.asarray, spiral_jax.load(folder)[1])
    np.testing.assert_array_equal(kernels(params, "core"), kernels(given, "prelude")[1:5])
    np.testing.assert_array_equal(params["head"]["kernel"], given["head"]["kernel"])
    assert json.loads((tmp_path / "run/config.json").read_text())["upcycle"]["source"] == str(copy)

    shutil.rmtree(copy)
    (tmp_path / "source").mkdir()
    shutil.copy(folder / "tokenizer.json", copy)
    assert call(train, *arguments) == (0, "")
    assert "finished: 1 steps" in capsys.readouterr().out
    status, errors = call(train, *arguments, "--config.upcycle.core_method=average")
    assert status == 2 and "upcycle.core_method is " in errors and "which the run was saved with" in errors


def test_a_run_can_be_the_source(folder, tmp_path):
    from spiral_jax.run.directory import read_model

    expected = read_model(folder)
    found = read_model(run_of(folder, tmp_path / "run"))
    assert found[0] == expected[0]
    jax.tree.map(np.testing.assert_array_equal, found[1], expected[1])
