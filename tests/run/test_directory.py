"""Where a run's directory may be."""

import pytest
from verbs import call

from spiral_jax import evaluate, export, generate, import_hf, prepare
from spiral_jax.errors import SpiralError
from spiral_jax.run.directory import run_directory, workdir_of


@pytest.mark.parametrize("place", ["s3://bucket/run", "gs://bucket", "memory://run"])
def test_urls_are_one_line_and_make_no_folder(place, tmp_path, monkeypatch):
    """Not a local folder by the name of the scheme."""
    monkeypatch.chdir(tmp_path)
    for verb, *arguments in (
        (evaluate, f"--workdir={place}"),
        (generate, f"--workdir={place}", "--prompt=a"),
        (export, f"--workdir={place}", f"--output={tmp_path}/out"),
        (export, f"--workdir={tmp_path}", f"--output={place}"),
        (import_hf, f"--input={tmp_path}", f"--workdir={place}"),
        (prepare, f"--input={__file__}", f"--output={place}", "--tokenizer=bytes"),
    ):
        status, errors = call(verb, *arguments)
        assert status == 2 and errors.count("\n") == 1, errors
        assert f"is '{place}'; allowed: a path" in errors
    with pytest.raises(SpiralError, match=f"--workdir is '{place}'"):
        workdir_of(place)
    assert not list(tmp_path.iterdir())


def test_a_file_url_is_its_path(tmp_path):
    (tmp_path / "run").mkdir()
    assert workdir_of(f"file://{tmp_path}/run") == run_directory(f"file://{tmp_path}/run") == tmp_path / "run"
    assert (tmp_path / "run").is_dir()
