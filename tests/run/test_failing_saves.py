"""Saves that the disk refuses: one line, older checkpoints whole, later saves as if nothing had been."""

import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from cases import slow
from etils.epath import Path
from full_disk import small_disk
from states import CONFIG, META, assert_bitwise_equal, random_state, saves_of

from spiral_jax.parallel.mesh import MeshConfig, make_mesh
from spiral_jax.run.checkpoint import CheckpointConfig, Checkpoints, SaveFailed
from spiral_jax.run.config import RunConfig
from spiral_jax.training.step import abstract_state

FULL = "No space left on device"


@pytest.fixture(scope="module")
def layout():
    return abstract_state(CONFIG, make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]))


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk", megabytes=8) as disk:
        yield disk


@pytest.mark.parametrize("attempts", [10, slow(100)])
def test_a_disk_full_at_any_write_of_a_save(disk, layout, attempts):
    """Room for nothing, for the first file, for half of them, for all but the last: each leaves what was there."""
    first, checkpoints = random_state(layout, 1), Checkpoints(disk.folder)
    before = disk.used()
    checkpoints.save(1, first, META)
    checkpoints.wait()
    size, failed = disk.used() - before, 0
    for step, room in enumerate(np.linspace(0, size, attempts, dtype=int), 2):
        state = random_state(layout, step, seed=step)
        disk.leave(int(room))
        try:
            checkpoints.save(step, state, META)
            checkpoints.wait()
        except SaveFailed as error:
            failed += 1
            assert str(error) == (
                f"{disk.folder}/checkpoints/{step} cannot be saved ({FULL}); the newest checkpoint is of step 1"
            )
        else:  # there was room for all of it
            shutil.rmtree(checkpoints.set_aside(step))
            checkpoints.reload()
        assert checkpoints.steps() == [1]
        if step % 5 == 0:
            assert_bitwise_equal(checkpoints.restore(1, layout), first)
    assert failed > 0.7 * attempts
    disk.free()
    assert_bitwise_equal(checkpoints.restore(1, layout), first)
    checkpoints.save(step, state, META)
    checkpoints.close()
    reopened = Checkpoints(disk.folder, read_only=True)
    assert reopened.steps() == [1, step]
    assert_bitwise_equal(reopened.restore(step, layout), state)
    reopened.close()
    assert {path.name for path in (disk.folder / "checkpoints").iterdir()} == {"1", str(step)}


def test_a_run_that_was_moved_is_not_begun_at_its_old_place(tmp_path, layout):
    checkpoints = Checkpoints(tmp_path / "run")
    checkpoints.save(1, random_state(layout, 1), META)
    checkpoints.wait()
    (tmp_path / "run").rename(tmp_path / "moved")
    with pytest.raises(SaveFailed, match=r"is not there any more.*; the newest checkpoint is of step 1$"):
        checkpoints.save(2, random_state(layout, 2), META)
    checkpoints.close()
    assert [path.name for path in tmp_path.iterdir()] == ["moved"]


def test_what_a_kill_left_of_a_save_is_removed_by_the_next(tmp_path, layout):
    unfinished = tmp_path / "checkpoints" / "1.orbax-checkpoint-tmp"
    (unfinished / "params").mkdir(parents=True)
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps() == [] and unfinished.is_dir()
    checkpoints.save(2, random_state(layout, 2), META)
    checkpoints.close()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]


def saves(checkpoints, **fields):
    config = RunConfig(model=CONFIG.model, train=CONFIG.train, checkpoint=CheckpointConfig(every_steps=2, **fields))
    return saves_of(checkpoints, config)


def wait_for_the_disk(saving, step) -> None:
    """Until a save that goes on beside training has ended: `due` is asked after every step."""
    while saving._checkpoints._saving is not None:
        saving.due(step)


def test_a_run_stops_after_the_step_in_which_its_save_failed(disk, layout):
    checkpoints = Checkpoints(disk.folder)
    saving = saves(checkpoints)
    saving(2, random_state(layout, 2))
    wait_for_the_disk(saving, 3)
    disk.leave(20_000)
    with pytest.raises(SaveFailed, match=rf"checkpoints/4 cannot be saved \({FULL}\); .* of step 2$"):
        saving(4, random_state(layout, 4))
        wait_for_the_disk(saving, 5)
    checkpoints.close()


def test_a_run_that_goes_on_saves_again(disk, layout, capfd):
    checkpoints = Checkpoints(disk.folder)
    saving = saves(checkpoints, on_failure="go_on")
    disk.leave(20_000)
    saving(2, random_state(layout, 2))
    wait_for_the_disk(saving, 3)
    disk.free()
    saving(4, random_state(layout, 4))
    saving.finish(4)
    assert checkpoints.steps() == [4]
    (line,) = capfd.readouterr().err.splitlines()
    assert line == (
        f"note: {disk.folder}/checkpoints/2 cannot be saved ({FULL}); there is no checkpoint; training goes on, and "
        "saves again when it is due"
    )
    disk.leave(20_000)
    with pytest.raises(SaveFailed, match=r"checkpoints/10 cannot be saved .* of step 4$"):  # the last one
        saving(10, random_state(layout, 10))
        saving.finish(10)
    checkpoints.close()


def test_a_failed_save_on_a_signal_is_no_success(disk, layout):
    """Whatever `on_failure` is: nobody may think that the state was saved."""
    checkpoints = Checkpoints(disk.folder)
    saving = saves(checkpoints, on_failure="go_on")
    disk.leave(0)
    with pytest.raises(SaveFailed, match="checkpoints/3 "):
        saving(3, random_state(layout, 3))
        saving.finish(3)
    checkpoints.close()


def test_a_save_that_could_not_even_begin_is_no_success(tmp_path, layout):
    checkpoints = Checkpoints(tmp_path / "run")
    saving = saves(checkpoints, on_failure="go_on")
    (tmp_path / "run").rename(tmp_path / "moved")
    saving(3, random_state(layout, 3))
    with pytest.raises(SaveFailed, match="checkpoints is not there any more"):
        saving.finish(3)
    checkpoints.close()


SCRIPT = """
import gc, sys
from spiral_jax import command
from spiral_jax.run import checkpoint
import states
from etils.epath import Path


def main(values):
    import jax
    from spiral_jax.parallel.mesh import MeshConfig, make_mesh
    from spiral_jax.training.step import abstract_state
    layout = abstract_state(states.CONFIG, make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]))
    checkpoints = checkpoint.Checkpoints(Path(sys.argv[0]))
    if checkpoints.steps():
        checkpoints.restore(1, layout)
    checkpoints.save(2, states.random_state(layout, 2), states.META)
    checkpoints.wait()


sys.argv = [sys.argv[1]]
command.run("save", "", lambda values: None, main)
"""


def one_line(workdir) -> str:
    """What a process that restores step 1, if there is one, and saves step 2 says, to its very end."""
    tests = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": f"{tests.parent}:{tests}"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(workdir)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_only_our_line_shows_of_a_save_that_failed(disk):
    disk.leave(60_000)
    assert f"cannot be saved ({FULL})" in one_line(disk.folder)


def test_only_our_line_shows_of_a_damaged_checkpoint(tmp_path, layout):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, random_state(layout, 1), META)
    checkpoints.close()
    for path in (tmp_path / "checkpoints/1").rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "checkpoints/1 is damaged (cannot be restored: " in one_line(tmp_path)
