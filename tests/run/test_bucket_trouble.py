"""A bucket that does not answer, or loses an answer: nothing is taken for missing or damaged, nothing is removed."""

import json
import types

import pytest
from states import CONFIG, META, random_state, saves_of
from verbs import call

from spiral_jax import command, evaluate, import_hf
from spiral_jax.convert.folder import is_huggingface, output_folder
from spiral_jax.data.bucket import Versioned
from spiral_jax.data.json_files import read_json
from spiral_jax.data.staging import UNFINISHED, whole_folder
from spiral_jax.errors import SpiralError, Unreachable
from spiral_jax.parallel.mesh import MeshConfig, make_mesh
from spiral_jax.run import own_code, row_parts, side_files
from spiral_jax.run.aside import marked, set_aside
from spiral_jax.run.checkpoint import CheckpointConfig, Checkpoints, SaveUnreachable
from spiral_jax.run.directory import open_data, validation_store_of
from spiral_jax.run.disk_hold import DiskHold
from spiral_jax.run.metrics import LoggingConfig, MetricsWriter, read_rows, rows_of
from spiral_jax.run.provenance import last_start
from spiral_jax.run.refused import NothingLeft
from spiral_jax.run.step_folders import BucketStepFolders
from spiral_jax.training.step import abstract_state

gcsfs = pytest.importorskip("gcsfs.core", reason="gcsfs is not installed")
HttpError, validate_response = (getattr(gcsfs, name) for name in ("HttpError", "validate_response"))
ProxyError = pytest.importorskip("requests.exceptions").ProxyError


def everything(method, path):
    return True


def nothing(method, path):
    return False


@pytest.fixture
def trouble(place, monkeypatch):
    """`fails(method, path)` says which of gcsfs' requests end in an error, after all its tries."""
    found = types.SimpleNamespace(fails=nothing, error=HttpError({"code": 503, "message": "gone"}))
    ask = gcsfs.GCSFileSystem._call

    async def asked(self, method, path, *args, **kwargs):
        if found.fails(method, path.format(*args)):
            raise found.error
        return await ask(self, method, path, *args, **kwargs)

    monkeypatch.setattr(gcsfs.GCSFileSystem, "_call", asked)
    return found


def test_whole_checkpoints_are_no_leftovers_whatever_orbax_has_seen(place):
    # An item of a step has such an object of its own.
    for name in ("4/commit_success.txt", "4/meta/x", "8/commit_success.txt", "12/meta/commit_success.txt"):
        (place / "checkpoints" / name).write_bytes(b"")
    folders = BucketStepFolders(place / "checkpoints")
    assert folders.whole() == {4, 8}
    assert [path.name for path in folders.unfinished({4})] == ["12"]


def test_an_opening_that_cannot_see_a_whole_checkpoint_is_refused(place, trouble):
    (place / "checkpoints/4/commit_success.txt").write_bytes(b"")
    # fsspec's `isdir`, which orbax asks, makes "no" of this one, as it is an OSError.
    trouble.error = ProxyError("502")
    trouble.fails = lambda method, path: "checkpoints/4" in path and "commit" not in path
    with pytest.raises(Unreachable, match="checkpoints/4 cannot be seen now, although it is there"):
        Checkpoints(place, read_only=True)


def test_what_was_set_aside_stays_whatever_epath_says(place, trouble):
    """Its `is_dir` makes "no" of a broken connection, too."""
    (place / "checkpoints/8/meta/x").write_bytes(b"")
    set_aside(place / "checkpoints/8", place)
    trouble.error, trouble.fails = ProxyError("502"), lambda method, path: path.endswith("/damaged")
    assert marked(place) == {"8"}


def test_a_start_that_could_not_reach_the_bucket_removes_nothing(place):
    hold = DiskHold(place, "of nobody")  # never taken, and so nothing to remove
    (place / ".lock").write_bytes(b"")
    with pytest.raises(Unreachable), NothingLeft(place) as started, started.claimed(hold):
        (place / "cache/x/train/tokens.bin").write_bytes(b"copied")
        raise Unreachable("gone")
    assert (place / "cache/x/train/tokens.bin").exists()
    with pytest.raises(SpiralError), NothingLeft(place) as started, started.claimed(hold):
        (place / "config").write_bytes(b"")
        raise SpiralError("refused")
    assert not (place / "config").exists() and (place / "cache/x/train/tokens.bin").exists()


@pytest.mark.slow
def test_a_save_whose_end_is_not_known_is_refused_and_stays(place, trouble):
    layout = abstract_state(CONFIG, make_mesh(MeshConfig(2, 2, 2)))
    checkpoints = Checkpoints(place, CheckpointConfig(keep=2))
    checkpoints.save(1, random_state(layout, 1), META)
    checkpoints._manager.wait_until_finished()
    trouble.fails = everything
    with pytest.raises(SaveUnreachable, match="checkpoints/1 cannot be saved"):
        checkpoints.wait()
    trouble.fails = nothing
    assert BucketStepFolders(place / "checkpoints").whole() == {1}


def test_errors_of_a_bucket_that_nobody_expected_are_one_line(place, trouble):
    (place / "checkpoints/4/meta/x").write_bytes(b"")
    trouble.fails = everything
    for error in (trouble.error, ProxyError("502")):
        trouble.error = error
        status, errors = call(evaluate, f"--workdir={place}")
        assert status == 43 and errors.count("\n") == 1 and str(error) in errors, errors
    for code, status in ((403, 2), (404, 2), (408, 43), (429, 43), (500, 43)):
        assert command._outcome(HttpError({"code": code, "message": "as it says"}))[0] == status
    with pytest.raises(ValueError) as caught:  # of its own, as gcsfs makes it
        validate_response(400, b'{"error": {"message": "an invalid name"}}', "b/o")
    assert command._outcome(caught.value)[0] == 2
    assert command._outcome(ValueError("Bad"))[0] == 1
    assert command._outcome(OSError("a disk"))[0] == 1


def test_what_cannot_be_read_now_is_neither_damaged_nor_missing(place, trouble):
    for name in ("data.json", "environment.json", "config.json", "wandb_id", "own_code.json", "tokenizer_config.json"):
        (place / name).write_text("{}")
    trouble.fails = lambda method, path: method == "GET"
    for read in (
        lambda: read_json(place / "data.json"),
        lambda: open_data(place, ["f"]),
        lambda: validation_store_of(place),
        lambda: last_start(place / "environment.json"),
        lambda: side_files.mend(place),
        lambda: is_huggingface(place),
        lambda: own_code.changes(place, CONFIG.to_dict()),
        lambda: import_hf._end_of_text(place),
    ):
        with pytest.raises(Unreachable, match=r"\(gone, 503\)"):
            read()
    trouble.fails = nothing
    assert not (place / "damaged").exists()


def test_a_removal_whose_answer_was_lost_is_one(place, monkeypatch):
    from google.cloud.storage.blob import Blob

    delete, rm = Blob.delete, gcsfs.GCSFileSystem._rm_file

    def twice(self, **kwargs):
        delete(self, **kwargs)
        delete(self, **kwargs)

    async def rm_twice(self, path, **kwargs):
        await rm(self, path, **kwargs)
        await rm(self, path, **kwargs)

    monkeypatch.setattr(Blob, "delete", twice)
    assert Versioned(place / ".lock").now() is not None
    monkeypatch.setattr(gcsfs.GCSFileSystem, "_rm_file", rm_twice)
    (place / "wandb_id").write_text("x")
    set_aside(place / "wandb_id", place)
    assert not (place / "wandb_id").exists() and (place / "damaged/wandb_id.0").read_text() == "x"


def test_rows_come_before_their_checkpoint_or_it_does_not(place, trouble, monkeypatch, capsys):
    monkeypatch.setattr(row_parts, "_SECONDS_BETWEEN_ATTEMPTS", 0.0)
    writer, saved = MetricsWriter(place, LoggingConfig()), []
    checkpoints = types.SimpleNamespace(
        due=lambda step, last: True, wait=lambda: None, check=lambda: None, save=lambda step, *_: saved.append(step)
    )
    asked = []
    trouble.fails = lambda method, path: "metrics" in path and (method == "GET" or bool(asked.append(path)) or True)
    writer.write({"step": 1, "loss": 1.0})
    with pytest.raises(SaveUnreachable, match=r"step 1 is not saved, as its rows cannot be written \(gone, 503\)"):
        saves_of(checkpoints, CONFIG, flush=writer.flush)(1, None)
    assert len(asked) == row_parts.ATTEMPTS and saved == []
    trouble.fails = nothing
    saves_of(checkpoints, CONFIG, flush=writer.flush)(1, None)
    assert saved == [1] and [row["step"] for row in read_rows(rows_of(place))] == [1]
    writer.close()


def test_a_copy_that_breaks_off_is_gone_on_with_and_is_never_a_mixture(place, trouble):
    def export(number, more=()):
        with whole_folder(place) as folder:
            for name in ("config.json", "export.json", "model-1.safetensors", "model-2.safetensors", *more):
                (folder / name).write_text(f"{number} {name}")

    export(1, more=["model-3.safetensors"])
    assert not (place / UNFINISHED).exists()
    with pytest.raises(SpiralError, match="allowed: a folder that is new or empty"):
        output_folder("output", str(place))
    posts = []
    trouble.fails = lambda method, path: method == "POST" and bool(posts.append(path) or len(posts) > 2)
    with pytest.raises(Unreachable, match=r"cannot be written \(gone, 503\)"):
        export(2)
    trouble.fails = nothing
    assert not (place / "config.json").exists() and not (place / "export.json").exists()
    assert "model-3.safetensors" in json.loads((place / UNFINISHED).read_text())["files"]
    assert output_folder("output", str(place)) == place
    trouble.fails = lambda method, path: method == "DELETE" and path.endswith("model-3.safetensors")
    with pytest.raises(Unreachable):
        export(2)
    assert (place / UNFINISHED).exists()
    trouble.fails = nothing
    export(2)
    assert sorted(path.name for path in place.iterdir()) == [
        "config.json", "export.json", "model-1.safetensors", "model-2.safetensors"
    ]  # fmt: skip
    assert {path.read_text()[0] for path in place.iterdir()} == {"2"}
