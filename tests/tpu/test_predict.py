"""The list of points that `python -m tpu.predict` compiles."""

import pytest

from spiral_jax.errors import SpiralError
from tpu import predict


def test_every_point_that_is_there_is_of_the_list():
    assert {path.stem for path in predict.FOLDER.glob("*.json")} <= predict.POINTS.keys()


def test_unknown_points_are_named():
    with pytest.raises(SpiralError, match="the point is '2b'; allowed: 160m-v5p-4x4x4-vanilla, "):
        predict.main(["2b"])


def test_what_is_missing_is_compiled(tmp_path, monkeypatch):
    """And nothing that is there, unless it is named."""
    made = []
    monkeypatch.setattr(predict, "FOLDER", tmp_path)
    monkeypatch.setattr(predict, "compile_point", lambda *point: made.append(point[-1].stem))
    names = list(predict.POINTS)
    for name in names[1:]:
        (tmp_path / f"{name}.json").write_text("{}")
    predict.main([])
    predict.main(names[1:2])
    assert made == names[:2]
