import os

import pytest

from spiral_jax.corpus.sources import find_sources, hold_out, read_text
from spiral_jax.errors import SpiralError


def write(root, names, content="text\n"):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def names_of(*paths, **kwargs):
    return [source.name for source in find_sources([str(path) for path in paths], **kwargs)]


def split(folder, fraction):
    """What is trained on, and what is validated on."""
    sources = hold_out(find_sources([str(folder)]), fraction)
    return [[source for source in sources if source.split == split] for split in ("train", "validation")]


def test_folders_are_walked_in_order_of_names_without_hidden_files(tmp_path):
    write(tmp_path, ["b.txt", "a/z.txt", "a.txt", "a/.hidden", ".git/config", "a/__pycache__/m.pyc", "B.txt"])
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert names_of(tmp_path) == ["B.txt", "a.txt", "a/z.txt", "b.txt"]


def test_links_to_folders_are_followed_and_every_folder_comes_once(tmp_path):
    """Whatever circles there are; and a link to a folder does not change what its files are called."""
    corpus = tmp_path / "corpus"
    write(corpus, ["real/a.txt", "real/deep/b.txt", "z.txt"])
    write(tmp_path, ["elsewhere/c.txt", "elsewhere/deep/d.txt", "elsewhere/.hidden/e.txt"])
    (corpus / "again").symlink_to(corpus / "real")
    (corpus / "link").symlink_to(tmp_path / "elsewhere")
    (corpus / "more").symlink_to(tmp_path / "elsewhere")
    for folder in (corpus, corpus / "real", tmp_path / "elsewhere"):
        for number in range(3):
            (folder / f"loop{number}").symlink_to(corpus)
    expected = ["link/c.txt", "link/deep/d.txt", "real/a.txt", "real/deep/b.txt", "z.txt"]
    assert names_of(corpus) == names_of(corpus / "**/*.txt") == names_of(corpus / "**") == expected
    assert names_of(corpus / "**/deep/*") == ["link/deep/d.txt", "real/deep/b.txt"]
    assert names_of(corpus / "*/deep/**/*.txt") == ["again/deep/b.txt", "link/deep/d.txt"]


def test_patterns_cross_folders_and_names_are_relative_to_the_fixed_part(tmp_path):
    write(tmp_path, ["x/a.py", "x/b.txt", "x/deep/er/c.py", "x/__pycache__/d.py", "y/e.py"])
    assert names_of(tmp_path / "x/**/*.py") == ["a.py", "deep/er/c.py"]
    assert names_of(tmp_path / "*/*.py") == ["x/a.py", "y/e.py"]


def test_names_do_not_depend_on_where_the_root_is(tmp_path, monkeypatch):
    for machine in ("one", "other/place"):
        write(tmp_path / machine / "corpus", ["b", "a/c"])
    assert names_of(tmp_path / "one/corpus") == names_of(tmp_path / "other/place/corpus")
    monkeypatch.chdir(tmp_path / "one")
    assert names_of("corpus") == names_of(tmp_path / "one/corpus")


def test_a_file_reached_twice_is_listed_once(tmp_path):
    write(tmp_path, ["a.txt", "b.txt"])
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    assert names_of(tmp_path / "b.txt", tmp_path, tmp_path / "*.txt") == ["b.txt", "a.txt"]


def test_a_name_with_pattern_characters_is_taken_as_it_is(tmp_path):
    write(tmp_path, ["part[1].txt", "part1.txt"])
    assert names_of(tmp_path / "part[1].txt") == ["part[1].txt"]


def test_exclude_matches_the_full_path(tmp_path):
    write(tmp_path, ["lib/a.py", "lib/site-packages/b.py", "lib/deep/site-packages/c/d.py"])
    assert names_of(tmp_path, exclude=["*/site-packages/*"]) == ["lib/a.py"]


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("missing.txt", "does not exist"),
        ("*.nothing", "matches no file"),
        ("empty", "without files"),
    ],
)
def test_a_path_without_files_is_named(tmp_path, path, reason):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SpiralError, match=rf"data\.validation_paths is .*{reason}") as error:
        find_sources([str(tmp_path / path)], field="data.validation_paths")
    assert path in str(error.value) and "\n" not in str(error.value)


def test_excluding_everything_is_an_error(tmp_path):
    write(tmp_path, ["a.txt", "b.txt"])
    with pytest.raises(SpiralError, match=r"data\.exclude leaves out all 2 files"):
        find_sources([str(tmp_path)], ["*.txt"])


def test_empty_files_are_no_documents(tmp_path):
    write(tmp_path, ["a/__init__.py", "b/__init__.py"], content="")
    with pytest.raises(SpiralError, match=r"data\.paths: no text in"):
        find_sources([str(tmp_path)])
    write(tmp_path, ["a/module.py"])
    assert names_of(tmp_path) == ["a/module.py"]


@pytest.mark.parametrize("content", [b"a\r\nb\rc\n\n", "no \ufeffbom \U0001f600".encode(), b"\n", b"\x00\x0c\n"])
def test_text_is_the_bytes_of_the_file(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    [source] = find_sources([str(tmp_path / "a")])
    assert read_text(source).encode() == content
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbf" + content)
    assert read_text(source).encode() == content


def test_invalid_utf8_names_file_and_byte(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    [source] = find_sources([str(tmp_path)])
    with pytest.raises(SpiralError, match=r"latin\.txt: byte 3 is not UTF-8"):
        read_text(source)


def test_a_file_that_vanished_is_named(tmp_path):
    write(tmp_path, ["a.txt"])
    [source] = find_sources([str(tmp_path)])
    (tmp_path / "a.txt").unlink()
    with pytest.raises(SpiralError, match=r"a\.txt cannot be read"):
        read_text(source)


def test_adding_files_moves_no_file_between_the_splits(tmp_path):
    write(tmp_path, [f"{i}.txt" for i in range(400)])
    train, validation = split(tmp_path, 0.1)
    assert len(train) + len(validation) == 400
    assert 20 <= len(validation) <= 60  # 40 expected, standard deviation 6
    write(tmp_path, [f"new{i}.txt" for i in range(100)])
    more_train, more_validation = split(tmp_path, 0.1)
    assert {d.name for d in train} <= {d.name for d in more_train}
    assert {d.name for d in validation} <= {d.name for d in more_validation}


def test_a_single_file_holds_out_its_last_lines(tmp_path):
    text = "".join(f"line {i}\r\n" for i in range(1000))
    (tmp_path / "book.txt").write_bytes(text.encode())
    [train], [validation] = split(tmp_path, 0.05)
    assert read_text(train) + read_text(validation) == text
    assert read_text(validation).startswith("line ") and 0.04 < len(read_text(validation)) / len(text) <= 0.05


@pytest.mark.parametrize("text", ["one line\n", "no line end", "a\n\n", "x" * 1000 + "\n", "é\n"])
def test_both_parts_of_a_short_file_hold_something(tmp_path, text):
    (tmp_path / "a").write_text(text)
    [train], [validation] = split(tmp_path, 0.05)
    assert read_text(train) and read_text(validation) and read_text(train) + read_text(validation) == text


def test_nothing_is_held_out_for_a_fraction_of_0(tmp_path):
    write(tmp_path, ["a", "b"])
    sources = find_sources([str(tmp_path)])
    assert hold_out(sources, 0) == sources and split(tmp_path, 0) == [sources, []]
