"""Any damage to the newest of two checkpoints: it is resumed as it was saved, or the one before is. Nothing else."""

import functools
import shutil

import numpy as np
import pytest
from cases import slow
from states import CONFIG, assert_bitwise_equal, random_state

from spiral_jax.parallel.mesh import MeshConfig, make_mesh
from spiral_jax.parallel.processes import ALONE
from spiral_jax.run.checkpoint import Checkpoints
from spiral_jax.run.resume import newest_whole
from spiral_jax.training.step import abstract_state

OLD, NEW = 3, 4


@pytest.fixture(scope="module")
def layout():
    return abstract_state(CONFIG, make_mesh(MeshConfig(2, 2, 2)))


@pytest.fixture(scope="module")
def saved(tmp_path_factory, layout):
    """A run directory with two checkpoints, and their states and fingerprints by step."""
    workdir, states = tmp_path_factory.mktemp("saved"), {}
    checkpoints = Checkpoints(workdir)
    for step in (OLD, NEW):
        states[step] = random_state(layout, step, seed=step), [f"text of {step}"]
        meta = {"config": CONFIG.to_dict(), "data": {"step": step, "fingerprints": states[step][1]}}
        checkpoints.save(step, states[step][0], meta)
    checkpoints.close()
    return workdir, states


def resumed(saved, layout, tmp_path, capsys, change) -> int:
    """The step that a copy of the run goes on from after a change to its newest checkpoint."""
    source, states = saved
    shutil.copytree(source, tmp_path / "run")
    change(tmp_path / "run/checkpoints" / str(NEW))
    checkpoints = Checkpoints(tmp_path / "run")
    try:
        found = newest_whole(CONFIG, tmp_path / "run", checkpoints, layout, ALONE)
        state, fingerprints = states[found.step]
        assert_bitwise_equal(found.arrays, state)
        assert found.fingerprints == fingerprints
        out, errors = capsys.readouterr()
        assert errors == ""
        if found.step == NEW:
            assert out == "" and not (tmp_path / "run/damaged").exists()
        else:
            assert out.startswith(f"{tmp_path}/run/checkpoints/{NEW} is damaged (") and out.count("\n") == 1
            assert out.endswith(f"; it is now {tmp_path}/run/damaged/{NEW}.0, and the run goes on from step {OLD}\n")
            assert checkpoints.steps() == [OLD]
    finally:
        checkpoints.close()
        shutil.rmtree(tmp_path / "run")
    return found.step


def files_of(folder) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def flip(folder, name, rng):
    raw = bytearray((folder / name).read_bytes())
    if raw:
        raw[rng.integers(len(raw))] ^= 1 << rng.integers(8)
    (folder / name).write_bytes(raw)


def remove(folder, name):
    (folder / name).unlink()


def halve(folder, name):
    raw = (folder / name).read_bytes()
    (folder / name).write_bytes(raw[: len(raw) // 2])


@pytest.mark.parametrize("flips", [5, slow(300)])
def test_a_flipped_bit(saved, layout, tmp_path, capsys, flips):
    """In every file of it once, as far as there are flips; then in any, large ones more often."""
    rng, folder = np.random.default_rng(flips), saved[0] / "checkpoints" / str(NEW)
    files = files_of(folder)
    share = np.sqrt([1 + (folder / name).stat().st_size for name in files])
    drawn = rng.choice(files, size=flips, p=share / share.sum())
    drawn[: min(len(files), flips // 2)] = rng.permutation(files)[: flips // 2]
    steps = [
        resumed(saved, layout, tmp_path, capsys, functools.partial(flip, name=str(name), rng=rng)) for name in drawn
    ]
    assert steps.count(OLD) > flips / 10


@pytest.mark.slow
def test_a_file_lost_or_halved(saved, layout, tmp_path, capsys):
    steps = [
        resumed(saved, layout, tmp_path, capsys, functools.partial(damage, name=name))
        for name in files_of(saved[0] / "checkpoints" / str(NEW))
        for damage in (remove, halve)
    ]
    assert steps.count(OLD) > len(steps) / 10


def other_step(folder):
    """The checkpoint before, under this one's name: whole, and not this one."""
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name(str(OLD)), folder)


def other_array(folder):
    shutil.rmtree(folder / "params")
    shutil.copytree(folder.with_name(str(OLD)) / "params", folder / "params")


def edited_meta(folder):
    (path,) = (path for path in (folder / "meta").iterdir() if path.name == "metadata")
    text = path.read_text()
    assert f"text of {NEW}" in text
    path.write_text(text.replace(f"text of {NEW}", f"text of {OLD}"))


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize("change", [other_step, other_array, edited_meta, empty])
def test_what_is_readable_and_wrong(saved, layout, tmp_path, capsys, change):
    assert resumed(saved, layout, tmp_path, capsys, change) == OLD
