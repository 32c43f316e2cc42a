import gzip
import json
import re
import sys

import pytest

from spiral_jax.corpus import pieces, texts
from spiral_jax.corpus.pieces import Piece, cut_into_pieces
from spiral_jax.corpus.sources import find_sources
from spiral_jax.corpus.texts import Invalid, Text, read_piece
from spiral_jax.errors import SpiralError

zstandard = pytest.importorskip("zstandard")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

TEXTS = ["first", "zwei\r\nZeilen, Ümlaut", "\U0001f600 astral \u2028 line separator", 'quote " and \\', "x" * 3000]


def pack(content, name):
    if name.endswith(".gz"):
        return gzip.compress(content)
    if not name.endswith((".zst", ".zstd")):
        return content
    return zstandard.ZstdCompressor(write_checksum=True).compress(content)  # as the command zstd does


def lines_of(texts, end="\n"):
    return "".join(json.dumps({"id": i, "text": text}) + end for i, text in enumerate(texts)).encode()


def source(path, format="auto"):
    [found] = find_sources([str(path)], format=format)
    return found


def read(path, *, format="auto", field="text", size=None, monkeypatch=None):
    """Everything in a file, by way of pieces of about `size` bytes; stretches of documents are joined."""
    if size:
        monkeypatch.setattr(pieces, "_SMALLEST_PIECE", size)
        monkeypatch.setattr(pieces, "_LARGEST_PIECE", size)
    found, stretch = [], ""
    for piece in cut_into_pieces([source(path, format)], field):
        for _, item in read_piece(piece, field):
            if isinstance(item, Invalid):
                found.append(item.describe())
                continue
            stretch += item.text
            if item.ends:
                found.append(stretch)
                stretch = ""
    assert not stretch
    return found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.txt", ("text", "")),
        ("a", ("text", "")),
        ("a.py.gz", ("text", "gz")),
        ("a.GZ", ("text", "gz")),
        ("a.jsonl", ("jsonl", "")),
        ("a.NDJSON", ("jsonl", "")),
        ("a.jsonl.zstd", ("jsonl", "zst")),
        ("a.parquet", ("parquet", "")),
    ],
)
def test_the_name_says_what_a_file_is(tmp_path, name, expected):
    (tmp_path / name).write_bytes(b"x")
    found = source(tmp_path / name)
    assert (found.format, found.compression) == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"text": "a"}\n{"text": "b"}\n', "jsonl"),
        (b'\xef\xbb\xbf\n {"text": "a"} \r\n{', "jsonl"),
        (b'{"text": "' + b"x" * 3_000_000 + b'"}', "jsonl"),
        (b'{\n  "name": "a"\n}\n', "text"),
        (b'{"name": "a",\n"more": {}}\n', "text"),
        (b'[{"text": "a"}]\n', "text"),
        (b"x", "text"),
    ],
    ids=range(7),
)
def test_the_first_line_says_whether_json_is_in_lines_packed_or_not(tmp_path, content, expected):
    for name, compression in (("a.json", ""), ("c4.00000-of-01024.json.gz", "gz"), ("a.JSON.zst", "zst")):
        (tmp_path / name).write_bytes(pack(content, name))
        found = source(tmp_path / name)
        assert (found.format, found.compression) == (expected, compression)


@pytest.mark.parametrize(
    ("name", "format", "compression"), [("a.txt", "jsonl", ""), ("a.jsonl.gz", "text", "gz"), ("a.dat", "parquet", "")]
)
def test_the_configuration_may_say_otherwise(tmp_path, name, format, compression):
    (tmp_path / name).write_bytes(b"x")
    found = source(tmp_path / name, format)
    assert (found.format, found.compression) == (format, compression)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.zst", "a.log.zstd"])
@pytest.mark.parametrize("size", [None, 100])
def test_a_text_file_is_a_document_however_it_is_packed(tmp_path, monkeypatch, name, size):
    monkeypatch.setattr(pieces, "LOOKAHEAD", 50)
    text = "\r\n".join(TEXTS) * 5
    (tmp_path / name).write_bytes(pack(text.encode(), name))
    assert read(tmp_path / name, size=size, monkeypatch=monkeypatch) == [text]


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson.gz", "a.json.zst", "a.jsonl.zstd"])
@pytest.mark.parametrize("size", [None, 1, 64, 65, 66, 67, 1000])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n \r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_a_line_of_json_is_a_document_wherever_the_pieces_are_cut(tmp_path, monkeypatch, name, size, end, last):
    monkeypatch.setattr(pieces, "LOOKAHEAD", 50)
    content = lines_of(TEXTS * 3, end)
    content = content if last else content.rstrip()
    (tmp_path / name).write_bytes(pack(content, name))
    assert read(tmp_path / name, size=size, monkeypatch=monkeypatch) == TEXTS * 3


def test_members_of_gzip_and_frames_of_zstd_are_read_one_after_the_other(tmp_path):
    one, other = lines_of(TEXTS), lines_of(["more", "text"])
    for name in ("a.jsonl.gz", "a.jsonl.zst"):
        (tmp_path / name).write_bytes(pack(one, name) + pack(b"", name) + pack(other, name))
        assert read(tmp_path / name) == [*TEXTS, "more", "text"]
    streamed = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(streamed.compress(one) + streamed.flush())
    assert read(tmp_path / "a.jsonl.zst") == TEXTS


@pytest.mark.parametrize("size", [None, 1])
def test_a_row_of_parquet_is_a_document(tmp_path, monkeypatch, size):
    rows = TEXTS * 7
    for kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())):
        table = pyarrow.table({"n": range(len(rows)), "content": pyarrow.array(rows).cast(kind)})
        parquet.write_table(table, tmp_path / "a.parquet", row_group_size=4)
        found = read(tmp_path / "a.parquet", field="content", size=size, monkeypatch=monkeypatch)
        assert found == rows


def test_columns_of_every_kind_of_string_are_text(tmp_path):
    for kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()):
        for column in (pyarrow.array(TEXTS, kind), pyarrow.array(TEXTS).dictionary_encode()):
            parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
            assert read(tmp_path / "a.parquet") == TEXTS


@pytest.mark.parametrize("size", [None, 40])
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.json.zst"])
def test_a_byte_order_mark_in_front_of_a_file_goes(tmp_path, monkeypatch, name, size):
    """What is a character elsewhere stays: one at the start of a text."""
    texts = ["\ufefffirst", "second " * 20, "\ufeff"]
    content, wanted = lines_of(texts), texts
    if name.startswith("a.txt"):
        content, wanted = "".join(texts).encode(), ["".join(texts)]
    (tmp_path / name).write_bytes(pack(b"\xef\xbb\xbf" + content, name))
    assert read(tmp_path / name, size=size, monkeypatch=monkeypatch) == wanted
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + b'{"text": "\xff"}\n')
    assert read(tmp_path / "b.jsonl") == [f"{tmp_path}/b.jsonl:1: byte 13 is not UTF-8 (invalid start byte)"]


@pytest.mark.parametrize("separator", "\x0b\x0c\x1c\x85\u2028\u2029\r")
def test_lines_of_json_end_at_line_feeds_only(tmp_path, separator):
    text = f"a{separator}b"
    (tmp_path / "a.jsonl").write_bytes(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\r\n")
    assert read(tmp_path / "a.jsonl") == [text]


def test_small_files_share_a_piece_and_large_ones_are_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "_SMALLEST_PIECE", 1000)
    sizes = [10, 400, 500, 300, 5000, 20, 30]
    for i, size in enumerate(sizes):
        (tmp_path / f"{i}.txt").write_text(("a" * 9 + "\n") * (size // 10))
    cut = list(cut_into_pieces(find_sources([str(tmp_path)]), "text"))
    names = [[source.name for source in piece.sources] for piece in cut]
    assert names == [["0.txt", "1.txt", "2.txt"], ["3.txt"], *[["4.txt"]] * 5, ["5.txt", "6.txt"]]
    assert sum(piece.input_bytes for piece in cut) == sum(sizes)
    assert len({piece.name for piece in cut}) == len(cut)
    assert sorted(piece.name for piece in cut) == [piece.name for piece in cut]


def test_pieces_of_a_packed_file_are_cut_while_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "_SMALLEST_PIECE", 2**14)
    monkeypatch.setattr(pieces, "LOOKAHEAD", 100)
    frames = [pack(lines_of([f"{i} " * 400] * 5), ".zst") for i in range(1000)]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    path, opened = str(tmp_path / "a.jsonl.zst"), 0
    original = pieces.unpack

    def counting(*args):
        nonlocal opened
        for block in original(*args):
            opened += 1
            yield block

    monkeypatch.setattr(pieces, "unpack", counting)
    it = cut_into_pieces([source(path)], "text")
    contents = [next(it).content for _ in range(3)]
    assert all(2**14 <= len(content) < 2**15 and content.endswith(b"\n") for content in contents)
    assert opened < 30  # of 1000 blocks


BAD_LINES = {
    b"{": r"3: not JSON \(Expecting property name",
    b'{"id": 1}': r'3: no field "text" \(data.text_field\); fields: id',
    b"{}": r'3: no field "text" \(data.text_field\); fields: none',
    b'{"text": null}': r'3: field "text" is null, not a string',
    b'{"text": ["a"]}': r'3: field "text" is an array, not a string',
    b'{"text": 5}': r'3: field "text" is a number, not a string',
    b'["text"]': r'3: an array, not an object with a field "text"',
    b'"text"': r'3: a string, not an object with a field "text"',
    b'{"text": "\\ud800"}': r"3: field \"text\" holds '\\ud800' at character 0, which has no UTF-8 form",
    b'{"text": "caf\xe9"}': r"3: byte 45 is not UTF-8",
    b"[" * 100_000: r"3: not JSON \(maximum recursion",
    b'{"text": ' + b"9" * 5000 + b"}": r"3: not JSON \(Exceeds the limit",
    b'{"a\\nb \\ud800": 1}': r'3: no field "text" \(data.text_field\); fields: a b \\ud800$',
}


@pytest.mark.parametrize("bad", BAD_LINES, ids=range(len(BAD_LINES)))
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize("size", [None, 10])
def test_a_bad_line_is_named_with_its_number_in_the_file(tmp_path, monkeypatch, bad, name, size):
    monkeypatch.setattr(pieces, "LOOKAHEAD", 5)
    content = b'{"text": "one"}\r\n\n' + bad + b'\n{"text": "end", "text": "last", "x": NaN}'
    expected = BAD_LINES[bad].replace("45", str(content.find(b"\xe9")))
    (tmp_path / name).write_bytes(pack(content, name))
    first, error, last = read(tmp_path / name, size=size, monkeypatch=monkeypatch)
    assert (first, last) == ("one", "last") and "\n" not in error
    assert re.search(rf"/{name}:{expected}", error)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.zst"])
def test_text_that_is_not_utf8_is_named_with_its_byte(tmp_path, name):
    (tmp_path / name).write_bytes(pack("naïve ".encode() * 1000 + b"caf\xe9", name))
    assert read(tmp_path / name) == [f"{tmp_path / name}: byte 7003 is not UTF-8 (unexpected end of data)"]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.txt.gz", "a.txt.zst"])
@pytest.mark.parametrize("damage", ["cut off", "corrupt", "no such format", "followed by rubbish"])
def test_packed_files_that_are_damaged_are_named(tmp_path, name, damage):
    import random

    random_text = "".join(random.Random(0).choices("abcdefgh ", k=20000))
    content = bytearray(pack(lines_of([random_text[i : i + 100] for i in range(0, 20000, 100)]), name))
    if damage == "cut off":
        del content[-200:]
    elif damage == "corrupt":
        content[len(content) // 2 : len(content) // 2 + 60] = b"\xff" * 60
    elif damage == "no such format":
        content = b"this is no compressed file"
    else:
        content += b"rubbish"
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SpiralError, match=rf"{name} is .*(damaged|cut off).*; allowed: ") as error:
        read(tmp_path / name)
    assert "\n" not in str(error.value)


def test_damaged_parquet_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 this is none")
    with pytest.raises(SpiralError, match=r"a\.parquet is not a parquet file"):
        read(path)
    parquet.write_table(pyarrow.table({"body": ["x"], "n": [1]}), path)
    with pytest.raises(SpiralError, match=r"data\.text_field is 'text'; allowed: columns of .*a\.parquet: body, n"):
        read(path)
    with pytest.raises(SpiralError, match=r"a\.parquet: column 'n' is of type int64; allowed: string"):
        read(path, field="n")
    parquet.write_table(pyarrow.table({"text": ["".join(map(chr, range(i, i + 300))) for i in range(900)]}), path)
    content = bytearray(path.read_bytes())
    content[100:4000] = b"\xff" * 3900
    path.write_bytes(content)
    with pytest.raises(SpiralError, match=r"a\.parquet (cannot be read|is not a parquet)"):
        read(path)


@pytest.mark.parametrize("size", [None, 1])
def test_bad_rows_are_named_with_their_number_in_the_file(tmp_path, monkeypatch, size):
    broken = pyarrow.array([b"good", b"caf\xe9", None, b"", b"end"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": broken}), tmp_path / "a.parquet", row_group_size=1)
    found = read(tmp_path / "a.parquet", size=size, monkeypatch=monkeypatch)
    assert found[0] == "good" and found[-1] == "end" and len(found) == 4
    assert re.search(r'a\.parquet: row 2: column "text" is not UTF-8', found[1])
    assert re.search(r'a\.parquet: row 3: field "text" is null', found[2])


@pytest.mark.parametrize(("name", "extra"), [("a.txt.zst", "zstd"), ("a.parquet", "parquet")])
def test_a_missing_package_is_named_with_the_extra_that_brings_it(tmp_path, monkeypatch, name, extra):
    (tmp_path / name).write_bytes(b"x")
    monkeypatch.setitem(sys.modules, {"zstd": "zstandard", "parquet": "pyarrow"}[extra], None)
    with pytest.raises(SpiralError, match=rf"pip install 'spiral_jax\[{extra}\]'"):
        read(tmp_path / name)


def test_empty_texts_and_files_are_no_documents(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines_of(["", "x", ""]))
    assert read(tmp_path / "a.jsonl") == ["x"]
    (tmp_path / "blank.jsonl").write_bytes(b"\n \r\n\n")
    assert read(tmp_path / "blank.jsonl") == []
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b""))
    assert read(tmp_path / "a.txt.gz") == []
    (tmp_path / "a.zst").write_bytes(zstandard.compress(b""))
    assert read(tmp_path / "a.zst") == []


def test_a_long_document_comes_in_stretches(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "_TEXT_BYTES", 100)
    text = "ein Wört nach dem ändern " * 100
    (tmp_path / "a.txt").write_text(text)
    found = [item for _, item in read_piece(Piece((source(tmp_path / "a.txt"),), 1), "text")]
    assert all(isinstance(item, Text) and len(item.text.encode()) < 210 for item in found)
    assert [item.ends for item in found] == [False] * (len(found) - 1) + [True]
    assert "".join(item.text for item in found) == text
