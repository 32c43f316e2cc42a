"""Blobs and where they are opened: paths, file://, memory://, parts joined end to end."""

import random
import subprocess
import sys

import pytest

from spiral_jax.data import bucket as real_bucket
from spiral_jax.data.blob import Blob, JoinedBlobs, LocalBlob
from spiral_jax.data.remote import blob, retry
from spiral_jax.data.storage import LOCAL, Storage, is_url, join
from spiral_jax.errors import SpiralError

CONTENT = random.Random(0).randbytes(10_000)


class Bytes(Blob):
    """A blob that is not local, as far as JoinedBlobs can tell."""

    def __init__(self, content: bytes):
        self.name, self.size, self._content = "bytes", len(content), content

    def read_many(self, ranges):
        assert all(0 <= start < stop <= self.size for start, stop in ranges)
        return [self._content[start:stop] for start, stop in ranges]


def random_ranges(size: int, count: int, seed: int = 1) -> list[tuple[int, int]]:
    """Short and long ranges, empty ones, the whole, and neighbours."""
    generator = random.Random(seed)
    starts = [generator.randrange(size + 1) for _ in range(count)]
    ranges = [(start, min(start + generator.choice((0, 1, 7, 100, 4096, 5000)), size)) for start in starts]
    return [*ranges, (0, size), (0, 0), (size, size), (5, 10), (10, 15), (size - 1, size)]


@pytest.mark.parametrize("kind", [Bytes, LocalBlob])
def test_joined_blobs_read_as_one(tmp_path, kind):
    cuts = [0, 0, 10, 11, 4000, 4000, 4000, 9999, 10_000, 10_000]
    parts = [CONTENT[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
    if kind is LocalBlob:
        for number, part in enumerate(parts):
            (tmp_path / str(number)).write_bytes(part)
        parts = [tmp_path / str(number) for number in range(len(parts))]
    joined = JoinedBlobs("joined", [kind(part) for part in parts])
    assert joined.size == len(CONTENT)
    ranges = [*random_ranges(len(CONTENT), 200), (9, 10), (9, 11), (10, 11), (3999, 4000), (4000, 4001), (3999, 4001)]
    assert [bytes(found) for found in joined.read_many(ranges)] == [CONTENT[a:b] for a, b in ranges]
    assert joined.read_many([]) == []


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_local_files(tmp_path, scheme):
    (tmp_path / "file").write_bytes(CONTENT)
    blob = LOCAL.open(f"{scheme}{tmp_path}/file")
    assert isinstance(blob, LocalBlob) and blob.size == len(CONTENT)
    assert bytes(blob.read(3, 9)) == CONTENT[3:9]
    assert LOCAL.read_file(f"{scheme}{tmp_path}/file") == CONTENT
    assert LOCAL.exists(f"{scheme}{tmp_path}/file") and not LOCAL.exists(f"{scheme}{tmp_path}/nothing")
    with pytest.raises(SpiralError, match="nothing does not exist"):
        LOCAL.open(f"{scheme}{tmp_path}/nothing")


def test_a_file_system_without_asyncio():
    fsspec = pytest.importorskip("fsspec")
    fsspec.filesystem("memory").pipe_file("/test_storage/file", CONTENT)
    blob = LOCAL.open("memory://test_storage/file")
    ranges = random_ranges(len(CONTENT), 50)
    assert blob.read_many(ranges) == [CONTENT[a:b] for a, b in ranges]
    assert LOCAL.read_file("memory://test_storage/file") == CONTENT
    assert LOCAL.exists("memory://test_storage/file")
    assert not LOCAL.exists("memory://test_storage") and not LOCAL.exists("memory://test_storage/nothing")
    for place, named in (("memory://test_storage", "is a folder"), ("memory://test_storage/no", "does not exist")):
        with pytest.raises(SpiralError, match=f"{place} {named}"):
            LOCAL.open(place)


@pytest.fixture
def bucket():
    """`bucket://file`, with asyncio and without HTTP; its reads give what is in the list, then CONTENT."""
    fsspec, asyn = pytest.importorskip("fsspec"), pytest.importorskip("fsspec.asyn")
    answers = []

    class Bucket(asyn.AsyncFileSystem):
        protocol, cachable = "bucket", False

        async def _info(self, path, **kwargs):
            return {"name": path, "size": len(CONTENT), "type": "file", "generation": 7}

        async def _cat_file(self, path, start=None, end=None, **kwargs):
            answer = answers.pop(0) if answers else CONTENT[start:end]
            if isinstance(answer, Exception):
                raise answer
            return answer

    fsspec.register_implementation("bucket", Bucket, clobber=True)
    return answers


class HttpError(Exception):
    """As gcsfs has it."""

    def __init__(self, code):
        self.code = code


def test_a_file_system_with_asyncio(bucket):
    blob = Storage(retry_seconds=20).open("bucket://file")
    assert blob.size == len(CONTENT) and blob.version == "7"
    for answer in (b"", CONTENT, b"short", OSError("reset"), TimeoutError(), HttpError("503"), HttpError(429)):
        bucket.append(answer)
        assert blob.read(10, 20) == CONTENT[10:20]
    assert bucket == []
    ranges = random_ranges(len(CONTENT), 50)
    assert blob.read_many(ranges) == [CONTENT[a:b] for a, b in ranges]
    for error, named in (
        (OSError("Forbidden: file\nof another project"), "access is denied .*Forbidden: file of another project"),
        (PermissionError("no"), "denied"),
        (HttpError("404"), "does not exist any more"),
        (FileNotFoundError("file"), "does not exist any more"),
        (ValueError("Bad Request"), "reading bytes 0:5 failed with: ValueError: Bad Request"),
    ):
        bucket.append(error)
        with pytest.raises(SpiralError, match=f"^bucket://file.* {named}"):
            blob.read(0, 5)
    bucket.append(TypeError("a defect"))
    with pytest.raises(TypeError):
        blob.read(0, 5)


def test_a_read_that_fails_for_long_says_so_now_and_then(bucket, monkeypatch, capsys):
    monkeypatch.setattr(retry, "_SILENCE", 0.2)
    bucket += [OSError("reset")] * 12
    assert Storage(retry_seconds=20).open("bucket://file").read_many([(0, 5), (5, 10), (10, 15)])
    # Reads of a test before this one may still be failing in its threads.
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bucket://file: ")]
    assert 1 <= len(errors) <= 30 and all("of 20 s, last with: OSError: reset" in error for error in errors)


def test_what_to_install(monkeypatch):
    pytest.importorskip("fsspec")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(SpiralError, match=r"s3://bucket/file needs .*s3fs.*pip install 'spiral_jax\[remote\]'"):
        LOCAL.open("s3://bucket/file")
    with pytest.raises(SpiralError, match=r"warp://file cannot be opened \(.*warp"):
        Storage().exists("warp://file")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(SpiralError, match=r"pip install 'spiral_jax\[remote\]'"):
        LOCAL.exists("https://host/file")


def test_importing_brings_no_fsspec_and_no_thread():
    program = (
        "import sys, threading, spiral_jax.data.storage, spiral_jax.data.remote.blob, spiral_jax.data.remote.cache\n"
        "assert 'fsspec' not in sys.modules and 'aiohttp' not in sys.modules and threading.active_count() == 1"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_places():
    assert is_url("gs://bucket/store") and not is_url("/a/store") and not is_url("C:/store")
    assert join("gs://bucket/store/", "train", "tokens.bin") == "gs://bucket/store/train/tokens.bin"
    assert join("/a/store/", "train") == "/a/store/train"


def test_a_bucket_is_asked_with_our_settings_wherever_it_is_asked(monkeypatch):
    """gcsfs would else look for another kind of bucket, for a minute, and print tracebacks of what it also raises."""
    done, core = [], pytest.importorskip("fsspec.core")
    monkeypatch.setattr(real_bucket, "prepare", lambda: done.append("prepared"))
    monkeypatch.setattr(core, "url_to_fs", lambda url: (done.append(url), ""))
    for url in ("gs://b/store", "https://h/store"):
        blob.file_system_of(url)
    assert done == ["prepared", "gs://b/store", "https://h/store"]
