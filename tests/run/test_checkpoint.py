"""Saving on one mesh and restoring on another, what is kept, and checkpoints that do not fit."""

import dataclasses
import math
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from cases import slow
from states import CONFIG, META, assert_bitwise_equal, random_state

import spiral_jax
from spiral_jax.errors import Damaged, Diverged, SpiralError
from spiral_jax.model.spiralformer import abstract_params
from spiral_jax.parallel.mesh import MeshConfig, make_mesh
from spiral_jax.run.checkpoint import CheckpointConfig, Checkpoints
from spiral_jax.run.config import RunConfig
from spiral_jax.run.reading import reading
from spiral_jax.training.step import abstract_state

# orbax leaves reads unfinished when one of them fails.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def abstract(mesh=(1, 1, 1), config=CONFIG):
    """The state's shapes and shardings on a mesh of as many devices as it needs."""
    return abstract_state(config, make_mesh(MeshConfig(*mesh), jax.devices()[: math.prod(mesh)]))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run directory with one checkpoint, of step 4, written from a mixed mesh; and the state."""
    workdir = tmp_path_factory.mktemp("saved")
    state = random_state(abstract((2, 2, 2)))
    checkpoints = Checkpoints(workdir)
    checkpoints.save(4, state, META)
    checkpoints.close()
    CONFIG.save(workdir / "config.json")
    return workdir, state


@pytest.mark.parametrize("mesh", [(2, 2, 2), (1, 1, 1), *(slow(m) for m in [(1, 8, 1), (1, 2, 4)])], ids=str)
def test_restores_onto_any_mesh(saved, mesh):
    workdir, state = saved
    layout = abstract(mesh)
    checkpoints = Checkpoints(workdir, read_only=True)
    restored = checkpoints.restore(checkpoints.latest_step(), layout)
    checkpoints.close()
    assert_bitwise_equal(restored, state)
    for x, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(layout), strict=True):
        assert x.sharding.is_equivalent_to(wanted.sharding, x.ndim)


def test_load_gives_model_and_parameters(saved):
    workdir, state = saved
    model, params = spiral_jax.load(workdir)
    assert model.config == CONFIG.model
    assert_bitwise_equal(params, state.params)
    assert {x.sharding.num_devices for x in jax.tree.leaves(params)} == {1}
    _, params = spiral_jax.load(str(workdir), step=4)
    assert_bitwise_equal(params, state.params)


def test_meta_comes_back(saved):
    workdir, _ = saved
    checkpoints = Checkpoints(workdir, read_only=True)
    meta = checkpoints.load_meta(4)
    checkpoints.close()
    assert meta["data"] == META["data"]
    assert RunConfig.from_dict(meta["config"]) == CONFIG


@pytest.mark.parametrize(
    "change",
    [dict(d_model=64), dict(core_layers=2), dict(topology="base"), dict(chunks=(4, 1)), dict(vocab_size=128)],
    ids=str,
)
def test_a_checkpoint_of_another_model_is_refused(saved, change):
    workdir, _ = saved
    other = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, **change))
    checkpoints = Checkpoints(workdir, read_only=True)
    with pytest.raises(SpiralError) as error:
        checkpoints.restore(4, abstract(config=other))
    checkpoints.close()
    assert_names_the_checkpoint(error, workdir)


def assert_names_the_checkpoint(error, workdir):
    message = str(error.value)
    assert str(workdir / "checkpoints" / "4") in message
    assert "\n" not in message


def test_parameters_of_another_model_are_refused(saved):
    workdir, _ = saved
    other = dataclasses.replace(CONFIG.model, d_model=64)
    with pytest.raises(SpiralError) as error, reading(workdir) as opened:
        opened.restore(abstract_params(other))
    assert_names_the_checkpoint(error, workdir)


def test_no_such_step_is_refused(saved):
    workdir, _ = saved
    with pytest.raises(SpiralError, match=r"no checkpoint of step 7; allowed: \[4\]"):
        spiral_jax.load(workdir, step=7)


def test_load_without_a_run_is_one_line(tmp_path):
    allowed = "the directory of a run, or a folder of a GPT-NeoX or an exported model"
    with pytest.raises(SpiralError, match=rf"^path is '.*/nowhere', which does not exist; allowed: {allowed}$"):
        spiral_jax.load(tmp_path / "nowhere")
    with pytest.raises(SpiralError, match="has no checkpoints; allowed: "):
        spiral_jax.load(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(SpiralError, match="no checkpoint of step"):
        spiral_jax.load(tmp_path)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_the_state_may_be_donated_while_it_is_saved(tmp_path):
    """Saving is asynchronous; the next step overwrites the state's memory."""
    layout = abstract((1, 8, 1))
    state = random_state(layout, step=1)
    expected = jax.tree.map(np.array, state)
    next_step = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, META)
    for _ in range(3):
        state = next_step(state)
    jax.block_until_ready(state)
    checkpoints.wait()
    assert_bitwise_equal(checkpoints.restore(1, layout), expected)
    checkpoints.close()


def kept(workdir, steps, **fields) -> list[int]:
    checkpoints = Checkpoints(workdir, CheckpointConfig(**fields))
    for step in steps:
        checkpoints.save(step, random_state(abstract(), step), META)
    checkpoints.close()
    reopened = Checkpoints(workdir, read_only=True)
    found = reopened.steps()
    assert reopened.latest_step() == max(found)
    reopened.close()
    return found


def test_the_newest_are_kept(tmp_path):
    assert kept(tmp_path, [1, 2, 3, 4], keep=2) == [3, 4]


def test_multiples_of_the_interval_are_kept_for_good(tmp_path):
    assert kept(tmp_path, [2, 3, 4, 5, 6, 7], keep=1, keep_every_steps=3, every_steps=1) == [3, 6, 7]


def test_saving_a_step_again_changes_nothing(tmp_path):
    layout, checkpoints = abstract(), Checkpoints(tmp_path)
    checkpoints.save(3, random_state(layout, step=3), META)
    checkpoints.save(3, random_state(layout, step=3, seed=1), META)
    checkpoints.wait()
    assert_bitwise_equal(checkpoints.restore(3, layout), random_state(layout, step=3))
    checkpoints.close()


def test_a_relative_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoints = Checkpoints(Path("run"))
    checkpoints.save_start({"w": np.ones(2, np.float32)}, META)
    checkpoints.close()
    assert (tmp_path / "run/checkpoints/0").is_dir()


def test_when_a_checkpoint_is_due(tmp_path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(every_steps=4))
    assert [step for step in range(1, 11) if checkpoints.due(step, last_step=10)] == [4, 8, 10]
    assert checkpoints.latest_step() is None and checkpoints.steps() == []
    checkpoints.close()


def test_an_unfinished_save_is_no_checkpoint(saved, tmp_path):
    """What a kill leaves behind is not taken for a checkpoint."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, random_state(abstract()), META)
    checkpoints.close()
    whole = tmp_path / "checkpoints" / "1"
    whole.rename(tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp")
    reopened = Checkpoints(tmp_path, read_only=True)
    assert reopened.latest_step() is None
    reopened.close()


def damaged(saved, tmp_path, change) -> str:
    """What is said of a copy of the checkpoint in which a file was changed; "" if its arrays are those saved."""
    workdir, state = saved
    shutil.copytree(workdir / "checkpoints", tmp_path / "checkpoints")
    change(tmp_path / "checkpoints" / "4")
    checkpoints = Checkpoints(tmp_path, read_only=True)
    try:
        meta = checkpoints.load_meta(4)
        restored = checkpoints.restore(4, abstract((2, 2, 2)))
    except Damaged as error:
        assert "\n" not in str(error) and str(tmp_path / "checkpoints" / "4") in str(error)
        return str(error)
    finally:
        checkpoints.close()
        shutil.rmtree(tmp_path / "checkpoints")
    assert_bitwise_equal(restored, state)
    assert meta["data"] == META["data"]
    return ""


def test_one_value_changed_in_its_file_is_damage(saved, tmp_path):
    """Readable by every library, and wrong: written anew with another number in one array."""
    _, state = saved
    checkpoints = Checkpoints(tmp_path)
    other = state.replace(params=jax.tree.map(lambda x: x.at[(0,) * x.ndim].add(1), state.params))
    checkpoints.save(4, other, META)
    checkpoints.close()
    swapped = damaged(saved, tmp_path / "x", lambda folder: (shutil.rmtree(folder / "params"),
                      shutil.copytree(tmp_path / "checkpoints" / "4" / "params", folder / "params")))  # fmt: skip
    assert "is not what was saved" in swapped


def test_under_the_name_of_another_step_it_is_damage(saved, tmp_path):
    workdir, _ = saved
    shutil.copytree(workdir / "checkpoints" / "4", tmp_path / "checkpoints" / "9")
    checkpoints = Checkpoints(tmp_path, read_only=True)
    with pytest.raises(Damaged, match=r"checkpoints/9 is damaged \(it is the checkpoint of step 4\)$"):
        checkpoints.load_meta(9)
    checkpoints.close()


def test_what_is_not_finite_is_never_saved(tmp_path):
    state = random_state(abstract())
    kernel = state.params["head"]["kernel"]
    state.params["head"]["kernel"] = kernel.at[3, 4].set(np.inf)
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(Diverged, match=r"^step 4: params/head/kernel is not finite .* there is no checkpoint$"):
        checkpoints.save(4, state, META)
    assert checkpoints.steps() == []
    checkpoints.close()


def test_what_is_set_aside_is_in_nobodys_way(tmp_path):
    layout, checkpoints = abstract(), Checkpoints(tmp_path)
    for step in (3, 4):
        checkpoints.save(step, random_state(layout, step), META)
    checkpoints.wait()
    assert checkpoints.set_aside(4) == str(tmp_path / "damaged" / "4.0")
    checkpoints.reload()
    assert checkpoints.steps() == [3]
    checkpoints.save(4, random_state(layout, 4, seed=2), META)
    checkpoints.wait()
    assert_bitwise_equal(checkpoints.restore(4, layout), random_state(layout, 4, seed=2))
    assert checkpoints.set_aside(4) == str(tmp_path / "damaged" / "4.1")
    checkpoints.close()


@pytest.mark.parametrize("damage", ["array", "meta"])
def test_a_damaged_checkpoint_is_one_line(tmp_path, damage):
    layout, checkpoints = abstract(), Checkpoints(tmp_path)
    checkpoints.save(4, random_state(layout), META)
    checkpoints.wait()
    folder = tmp_path / "checkpoints" / "4"
    if damage == "meta":
        (path,) = (path for path in (folder / "meta").iterdir() if path.name == "metadata")
        path.write_text("{")
    else:
        for path in (folder / "params").rglob("*"):
            if path.is_file() and "/d/" in str(path):
                path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(SpiralError) as error:
        checkpoints.load_meta(4) if damage == "meta" else checkpoints.restore(4, layout)
    assert_names_the_checkpoint(error, tmp_path)
    checkpoints.close()
