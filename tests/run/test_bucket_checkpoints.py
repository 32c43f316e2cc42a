"""Checkpoints on a bucket: whole or not there, damaged or not, and never without the claim."""

import pytest
from states import CONFIG, META, assert_bitwise_equal, random_state

from spiral_jax.errors import SpiralError, Unreachable
from spiral_jax.parallel.mesh import MeshConfig, make_mesh
from spiral_jax.parallel.processes import ALONE
from spiral_jax.run import checkpoint as module
from spiral_jax.run.checkpoint import CheckpointConfig, Checkpoints, SaveFailed
from spiral_jax.run.reading import reading
from spiral_jax.run.resume import newest_whole
from spiral_jax.training.step import abstract_state


@pytest.fixture(scope="module")
def layout():
    return abstract_state(CONFIG, make_mesh(MeshConfig(2, 2, 2)))


def save(place, layout, steps, seed=0, **given) -> Checkpoints:
    checkpoints = Checkpoints(place, CheckpointConfig(keep=2), **given)
    for step in steps:
        meta = {"config": CONFIG.to_dict(), "data": {"step": step, "fingerprints": ["abc"]}}
        checkpoints.save(step, random_state(layout, step, seed), meta)
    checkpoints.wait()
    return checkpoints


def flip(folder) -> None:
    """A bit of every object with data below a folder."""
    import fsspec

    files = fsspec.filesystem("gcs")
    for name in (name for name in files.find(str(folder)) if "/d/" in name):
        content = bytearray(files.cat_file(name))
        content[len(content) // 2] ^= 8
        files.pipe_file(name, bytes(content))


@pytest.mark.slow
def test_what_was_saved_comes_back_and_the_newest_are_kept(place, layout):
    save(place, layout, [1, 2, 3]).close()
    again = Checkpoints(place)
    assert again.steps() == [2, 3]
    assert_bitwise_equal(again.restore(3, layout), random_state(layout, 3))
    again.close()
    with reading(place) as saved:
        assert saved.step == 3 and saved.config() == CONFIG
    with pytest.raises(SpiralError, match=r"has no checkpoint of step 7; allowed: \[2, 3\]"), reading(place, 7):
        pass


@pytest.mark.slow
def test_one_that_was_never_completed_is_none_and_is_removed_by_the_next_save(place, layout):
    """As a kill leaves it: everything is there but the object that is written last."""
    save(place, layout, [1, 2]).close()
    (place / "checkpoints/2/commit_success.txt").unlink()
    checkpoints = Checkpoints(place, CheckpointConfig(keep=2))
    assert checkpoints.steps() == [1]
    checkpoints.save(3, random_state(layout, 3), META)
    checkpoints.close()
    assert not (place / "checkpoints/2").exists()
    checkpoints = save(place, layout, [4])
    assert checkpoints.steps() == [3, 4]
    checkpoints.close()


@pytest.mark.slow
def test_a_damaged_one_is_marked_and_its_step_can_be_saved_again(place, layout, capsys):
    save(place, layout, [3, 4]).close()
    flip(place / "checkpoints/4/params")
    with (
        pytest.raises(SpiralError, match=r"4 is damaged .* allowed: --step=3"),
        reading(place) as saved,
    ):
        saved.restore(layout.params)

    checkpoints = Checkpoints(place, CheckpointConfig(keep=2))
    found = newest_whole(CONFIG, place, checkpoints, layout, ALONE)
    assert found.step == 3 and checkpoints.steps() == [3]
    assert f"; it is now marked by {place}/damaged/4, and the run goes on from step 3" in capsys.readouterr().out
    assert (place / "checkpoints/4/params").is_dir()  # not removed
    checkpoints.close()

    # By whoever opens it; also if the process was killed between the mark and the rest.
    (place / "checkpoints/4/commit_success.txt").write_text("x")
    reader = Checkpoints(place, read_only=True)
    assert reader.steps() == [3]
    reader.close()
    checkpoints = Checkpoints(place, CheckpointConfig(keep=2))
    checkpoints.save(5, random_state(layout, 5), META)
    checkpoints.wait()
    assert checkpoints.steps() == [3, 5] and (place / "checkpoints/4/params").is_dir()
    checkpoints.save(4, random_state(layout, 4, seed=9), META)
    checkpoints.close()
    again = Checkpoints(place)
    assert_bitwise_equal(again.restore(4, layout), random_state(layout, 4, seed=9))
    assert not (place / "damaged/4").exists()
    again.close()


def test_a_bucket_that_does_not_answer_damages_nothing(place, layout, monkeypatch):
    save(place, layout, [3, 4]).close()
    checkpoints = Checkpoints(place, CheckpointConfig(keep=2))

    def restore(*_, **__):
        raise ValueError("UNAVAILABLE: Error reading gs://bucket/...: 503")

    monkeypatch.setattr(checkpoints._reader, "restore", restore)
    with pytest.raises(Unreachable, match="4 cannot be read now"):
        newest_whole(CONFIG, place, checkpoints, layout, ALONE)
    assert not (place / "damaged").exists()
    checkpoints.close()


def test_nothing_is_committed_without_the_claim(place, layout):
    """What the last check raises; in a run it ends the process."""
    save(place, layout, [1]).close()

    def lost():
        raise OSError("the run was taken over")

    checkpoints = Checkpoints(place, CheckpointConfig(keep=2), before_commit=lost)
    checkpoints.save(2, random_state(layout, 2), META)
    with pytest.raises(SaveFailed, match=r"2 cannot be saved .the run was taken over"):
        checkpoints.wait()
    assert not (place / "checkpoints/2/commit_success.txt").exists()
    checkpoints.close()
    reader = Checkpoints(place, read_only=True)
    assert reader.steps() == [1]
    reader.close()


def test_meta_is_read_once(place, layout, monkeypatch):
    save(place, layout, [1]).close()
    reads, read = [], module.Checkpoints._read_meta
    monkeypatch.setattr(module.Checkpoints, "_read_meta", lambda self, step: reads.append(step) or read(self, step))
    with reading(place) as saved:
        saved.config()
        saved.restore(layout.params)
    assert reads == [1]
