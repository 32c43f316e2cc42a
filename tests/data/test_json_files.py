"""JSON files written and read, and files that hold no object: one line each, which names the file."""

import pytest

from spiral_jax.data.json_files import read_json_object, write_json
from spiral_jax.errors import SpiralError


def test_an_object_is_read_as_utf8_whatever_the_locale(tmp_path):
    (tmp_path / "x.json").write_bytes('{"a": [1, null], "é": "ü"}'.encode())
    assert read_json_object(tmp_path / "x.json") == {"a": [1, None], "é": "ü"}
    (tmp_path / "x.json").write_bytes('\ufeff{"é": "\ufeff"}'.encode())
    assert read_json_object(tmp_path / "x.json") == {"é": "\ufeff"}


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "is not JSON (Expecting value: line 1 column 1 (char 0))"),
        (b'{"a": 1', "is not JSON (Expecting ',' delimiter: line 1 column 8 (char 7))"),
        (b'{"a": "\xff"}', "is not JSON ('utf-8' codec can't decode byte 0xff in position 7: invalid start byte)"),
        (b"[" * 200_000, "is not JSON ("),
        (b'{"a": ' + b"1" * 5_000 + b"}", "is not JSON (Exceeds the limit"),
        (b'[{"a": 1}]', "is an array; allowed"),
        (b'"text"', "is a single value; allowed"),
        (b"null", "is a single value; allowed"),
    ],
)
def test_a_file_without_an_object_is_refused_in_one_line(tmp_path, content, found):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(SpiralError) as caught:
        read_json_object(path)
    message = str(caught.value)
    assert message.startswith(f"{path} {found}")
    assert message.endswith("; allowed: a JSON object")
    assert "\n" not in message


def test_a_file_that_is_missing_or_a_folder_is_refused(tmp_path):
    with pytest.raises(SpiralError) as caught:
        read_json_object(tmp_path / "x.json")
    assert str(caught.value) == f"{tmp_path / 'x.json'} does not exist; allowed: a file with a JSON object"
    with pytest.raises(SpiralError) as caught:
        read_json_object(tmp_path)
    assert str(caught.value) == f"{tmp_path} cannot be read (Is a directory); allowed: a JSON object"


def test_what_is_written_is_read_again(tmp_path):
    values = {"b": [1, None, 0.1], "a": {"é": "ü\n"}}
    write_json(tmp_path / "x.json", values)
    assert read_json_object(tmp_path / "x.json") == values
    assert (tmp_path / "x.json").read_bytes().startswith(b'{\n  "b": [\n    1,')
    with pytest.raises(SpiralError, match="cannot be written"):
        write_json(tmp_path / "no/x.json", values)
