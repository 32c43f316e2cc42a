"""Which files a place stands for: parts, prefixes, folders, URLs."""

import numpy as np
import pytest
from megatron_writer import assert_same, cut, preshuffled, refused, write, write_index

from spiral_jax.data.megatron import files as megatron_files
from spiral_jax.data.megatron.tokens import MegatronTokens, is_megatron
from spiral_jax.data.storage import Storage
from spiral_jax.errors import SpiralError


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
@pytest.mark.parametrize("last_is_a_count", [False, True])
def test_parts_cut_anywhere_are_one_stream(tmp_path, dtype, last_is_a_count):
    rng = np.random.default_rng(2)
    for trial in range(6):
        folder = tmp_path / str(trial)
        tokens, *_ = write(folder, dtype, documents=100, seed=trial, highest=2**15)
        whole = MegatronTokens.open(str(folder))
        before = whole.fingerprint, whole.locate(50).partition(":")[2].partition(" (")[0]
        size = len(tokens) * np.dtype(dtype).itemsize
        cuts = sorted([1, size - 1, *rng.integers(0, size + 1, size=10).tolist()])  # empty parts among them
        cut(folder, cuts, last=len(cuts) + last_is_a_count)
        places = [
            folder,
            folder / "data",
            folder / "data.idx",
            *folder.glob("data-00003-of-*.bin"),
            folder / "data.bin",
        ]
        for place in places:
            source = MegatronTokens.open(str(place))
            assert is_megatron(str(place)) and source.name == str(folder / "data.idx")
            assert_same(source, tokens, rng)
            assert (source.fingerprint, source.locate(50).partition(":")[2].partition(" (")[0]) == before
        for position in (0, 50, len(tokens) - 1):
            byte = position * np.dtype(dtype).itemsize
            part = max(i for i, start in enumerate([0, *cuts]) if start <= byte)
            name, _, rest = source.locate(position).partition(": ")
            assert name == source.parts[part].name and rest.endswith(f"(byte {byte - [0, *cuts][part]} of the file)")
        source.verify()


def test_a_missing_part_is_named(tmp_path):
    tokens, *_ = write(tmp_path, documents=100)
    size = 2 * len(tokens)
    cut(tmp_path, [size * i // 12 for i in range(1, 12)])  # 12 parts, numbered to 11
    parts = {number: tmp_path / f"data-{number:05}-of-00011.bin" for number in range(12)}
    contents = {number: path.read_bytes() for number, path in parts.items()}
    for gone in ([3], [0], [3, 7]):
        for number in gone:
            parts[number].unlink()
        error = refused(tmp_path, "do not exist; allowed: all parts of .*data.bin")
        assert [path.name for path in parts.values() if path.name in error] == [parts[number].name for number in gone]
        for number in gone:
            parts[number].write_bytes(contents[number])
    parts[11].unlink()  # or else 11 would be the number of parts, but then the size were right
    refused(
        tmp_path,
        r"data-00000-of-00011.bin to .*data-00010-of-00011.bin has \d+ bytes .*-00011-of-00011.bin does not",
    )
    parts[11].write_bytes(contents[11])
    parts[5].write_bytes(contents[5][:-1])
    refused(tmp_path, rf"data-00000-of-00011.bin to .* has {size - 1} bytes; allowed: {size}, ")
    for number in range(6):
        parts[number].unlink()
    refused(tmp_path, "data-00000-of-00011.bin, .* and 2 more do not exist")


def test_parts_of_two_sets_are_refused_unless_one_is_meant(tmp_path):
    tokens, *_ = write(tmp_path, documents=100)
    content = (tmp_path / "data.bin").read_bytes()
    cut(tmp_path, [100])
    (tmp_path / "data.bin").write_bytes(content)
    assert MegatronTokens.open(str(tmp_path)).locate(0).startswith(str(tmp_path / "data.bin"))  # the single file wins
    cut(tmp_path, [50, 100])
    refused(tmp_path, r"data.bin has parts of 2 sets \(-of-00001, -of-00002\)")
    source = MegatronTokens.open(str(tmp_path / "data-00001-of-00002.bin"))
    assert len(source.parts) == 3
    assert_same(source, tokens, np.random.default_rng(0))
    (tmp_path / "other-00000-of-00007.bin").write_bytes(b"")  # another dataset's
    for path in tmp_path.glob("*-of-00001.bin"):
        path.unlink()
    assert len(MegatronTokens.open(str(tmp_path)).parts) == 3


def test_a_dataset_whose_own_name_looks_like_a_part(tmp_path):
    tokens, *_ = write(tmp_path, name="train-00000-of-00002")
    write(tmp_path, name="train-00001-of-00002", seed=1)
    source = MegatronTokens.open(str(tmp_path / "train-00000-of-00002.bin"))
    assert_same(source, tokens, np.random.default_rng(0))


def test_places_that_hold_no_dataset(tmp_path):
    write(tmp_path, name="a")
    write(tmp_path, name="b", seed=1)
    assert is_megatron(str(tmp_path))
    refused(tmp_path, rf"{tmp_path} holds {tmp_path}/a.idx, {tmp_path}/b.idx; allowed: a folder with one .idx")
    tokens, *_ = write(tmp_path, name="c", seed=2)
    assert_same(MegatronTokens.open(str(tmp_path / "c")), tokens, np.random.default_rng(0))
    refused(tmp_path / "nothing", "nothing holds no Megatron dataset; allowed: ")
    refused(tmp_path / "nothing.idx", "nothing.idx does not exist")
    refused(tmp_path / "nothing.bin", "nothing.idx does not exist; allowed: a .bin, or its parts, beside its .idx")
    (tmp_path / "a.bin").unlink()
    refused(tmp_path / "a.idx", r"a.bin does not exist; allowed: it, or the parts .*a-00000-of-NNNNN.bin")
    assert not is_megatron(str(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    assert not is_megatron(str(tmp_path / "empty"))


@pytest.fixture
def remote():
    """The URL of an empty folder in fsspec's memory."""
    fsspec = pytest.importorskip("fsspec")
    files = fsspec.filesystem("memory")
    files.mkdir("/megatron")
    yield "memory://megatron"
    files.rm("/megatron", recursive=True)


def upload(folder, url):
    fsspec = pytest.importorskip("fsspec")
    fsspec.filesystem("memory").put([str(path) for path in folder.iterdir()], url)


@pytest.mark.parametrize("parts", [False, True])
def test_urls(tmp_path, remote, parts):
    tokens, *_ = write(tmp_path, documents=100)
    here = MegatronTokens.open(str(tmp_path))
    if parts:
        cut(tmp_path, [33, 333])
    upload(tmp_path, remote)
    for place in (remote, f"{remote}/data", f"{remote}/data.idx", f"{remote}/data{'-00001-of-00002' * parts}.bin"):
        source = MegatronTokens.open(place)
        assert is_megatron(place) and source.fingerprint == here.fingerprint and len(source.parts) == 1 + 2 * parts
        assert_same(source, tokens, np.random.default_rng(0))
        assert source.locate(100).startswith(f"{remote}/data{'-00001-of-00002' * parts}.bin: document ")
    assert source.verify() == here.verify()
    assert not is_megatron(f"{remote}/nothing")


def test_urls_that_cannot_be_listed(tmp_path, remote, monkeypatch):
    tokens = preshuffled(tmp_path)
    cut(tmp_path, [33, 66], name="document")
    upload(tmp_path, remote)
    monkeypatch.setattr(megatron_files, "_list", lambda folder: [])
    source = MegatronTokens.open(f"{remote}/document-00000-of-00002.bin")
    assert source.sequence_tokens == 9
    assert_same(source, tokens, np.random.default_rng(0))
    assert is_megatron(remote)
    refused(remote, r"document\.bin does not exist; allowed: .*-00000-of-NNNNN\.bin, or the URL of one of them")


def test_a_host_or_bucket_is_a_folder(monkeypatch):
    asked = []

    class Recording(Storage):
        def exists(self, place):
            asked.append(place)
            return False

    monkeypatch.setattr(megatron_files, "_list", lambda folder: [])
    assert not is_megatron("gs://bucket", Recording()) and not is_megatron("http://host:80/", Recording())
    assert asked == ["gs://bucket/document.idx", "http://host:80/document.idx"]


def test_a_relative_prefix(tmp_path, monkeypatch):
    tokens, *_ = write(tmp_path)
    cut(tmp_path, [9])
    monkeypatch.chdir(tmp_path)
    for place in (".", "data", "data.idx", "data-00000-of-00001.bin"):
        assert_same(MegatronTokens.open(place), tokens, np.random.default_rng(0))


def test_a_folder_as_file_url(tmp_path):
    tokens, *_ = write(tmp_path, documents=20)
    cut(tmp_path, [10])
    assert_same(MegatronTokens.open(f"file://{tmp_path}"), tokens, np.random.default_rng(0))


def test_elsewhere_verify_finds_what_the_sample_at_opening_leaves_out(tmp_path, remote):
    sequences = 2**17
    np.zeros(4 * sequences, "<u2").tofile(tmp_path / "a.bin")
    sizes, pointers = np.full(sequences, 4), np.arange(sequences) * 8
    sizes[5000:5002] = 3, 5  # with the right beginnings, and out of the sample
    pointers[5001] -= 2
    write_index(tmp_path / "a.idx", "uint16", sizes, range(sequences + 1), pointers)
    assert MegatronTokens.open(str(tmp_path)).sequence_tokens is None
    upload(tmp_path, remote)
    source = MegatronTokens.open(remote)
    assert source.sequence_tokens == 4
    with pytest.raises(SpiralError, match=r"a\.idx has sequences that differ in length; allowed: 4"):
        source.verify()
    sizes[[0, 5000, 5001]] = 3, 5, 4  # the sample has a shorter one, and the sum is still that of equal ones
    write_index(tmp_path / "a.idx", "uint16", sizes, range(sequences + 1))
    upload(tmp_path, remote)
    assert MegatronTokens.open(remote).sequence_tokens is None
    sizes[[0, 5000, 5001]], pointers[5001] = [4, 3, 5], 5001 * 8
    write_index(tmp_path / "a.idx", "uint16", sizes, range(sequences + 1), pointers)
    refused(tmp_path, "sequence 5000 has 3 tokens")
    upload(tmp_path, remote)
    with pytest.raises(SpiralError, match=r"a\.idx: sequence 5000 has 3 tokens from byte 40000 on"):
        MegatronTokens.open(remote).verify()
