"""The cache of remote blobs: what it keeps, how much of it, and that nothing wrong ever comes out of it."""

import concurrent.futures
import errno
import os
import random
import subprocess
import sys

import pytest
from range_server import RangeServer

from spiral_jax.data.blob import Blob
from spiral_jax.data.remote.cache import CachedBlob, cached
from spiral_jax.data.storage import Storage

BLOCK = 4096
CONTENT = random.Random(0).randbytes(100 * BLOCK + 123)
INDEX_BYTES = 4 * 101


class Source(Blob):
    """A blob that remembers what was asked of it."""

    name = "source"

    def __init__(self, content=CONTENT):
        self.size, self.content, self.asked = len(content), content, []

    def read_many(self, ranges):
        self.asked += ranges
        assert all(0 <= start < stop <= self.size for start, stop in ranges)
        return [self.content[start:stop] for start, stop in ranges]


def open_cached(folder, source, key=("source", "first version"), max_bytes=10**9):
    return cached(source, folder, key, max_bytes)


def check(blob, ranges, content=CONTENT):
    assert [bytes(found) for found in blob.read_many(ranges)] == [content[start:stop] for start, stop in ranges]


def windows(seed, size=2 * BLOCK):
    """An epoch: each window once, in random order, overlapping in two bytes."""
    starts = [*range(0, len(CONTENT) - size - 2, size)]
    random.Random(seed).shuffle(starts)
    return [(start, start + size + 2) for start in starts]


def random_ranges(seed, count=100):
    generator = random.Random(seed)
    starts = [generator.randrange(len(CONTENT)) for _ in range(count)]
    ranges = [(start, min(start + generator.choice((0, 1, 100, BLOCK, 20_000)), len(CONTENT))) for start in starts]
    return [*ranges, (0, len(CONTENT)), (len(CONTENT), len(CONTENT)), (len(CONTENT) - 1, len(CONTENT))]


def data_file(folder):
    (file,) = folder.glob("*.data")
    return file


def used(folder):
    return sum(file.stat().st_blocks * 512 for file in folder.iterdir())


def test_random_ranges_from_four_threads(tmp_path):
    source = Source()
    blob = open_cached(tmp_path / "cache", source)
    assert isinstance(blob, CachedBlob) and blob.size == len(CONTENT) and blob.name == "source"
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda seed: check(blob, random_ranges(seed, 20)), range(40)))
    source.asked.clear()
    check(blob, random_ranges(99))
    check(blob, [])
    assert source.asked == []


def test_runs_of_missing_blocks_are_one_request(tmp_path):
    source = Source()
    blob = open_cached(tmp_path / "cache", source)
    check(blob, [(5 * BLOCK + 10, 5 * BLOCK + 20)])
    check(blob, [(3 * BLOCK + 1, 8 * BLOCK - 1), (8 * BLOCK, 8 * BLOCK + 1), (20 * BLOCK, 20 * BLOCK)])
    assert source.asked == [(5 * BLOCK, 6 * BLOCK), (3 * BLOCK, 5 * BLOCK), (6 * BLOCK, 9 * BLOCK)]


def test_the_second_epoch_asks_for_nothing_also_in_a_later_process(tmp_path):
    source = Source()
    blob = open_cached(tmp_path / "cache", source)
    for window in windows(1):
        check(blob, [window])
    source.asked.clear()
    for window in windows(2):
        check(blob, [window])
    assert source.asked == []
    del blob
    blob = open_cached(tmp_path / "cache", source)
    check(blob, windows(3))
    assert source.asked == []


@pytest.mark.parametrize("blocks", [0, 1, 25, 50])
def test_hit_rate_of_a_bounded_cache(tmp_path, blocks):
    source = Source()
    blob = open_cached(tmp_path / "cache", source, max_bytes=blocks * BLOCK + INDEX_BYTES)
    rates = []
    for epoch in range(4):
        source.asked.clear()
        for window in windows(epoch):
            check(blob, [window])
        assert used(tmp_path / "cache") <= blocks * BLOCK + 2 * BLOCK  # the lock and the index take whole blocks
        rates.append(1 - len(source.asked) / len(windows(epoch)))
    # Windows are two blocks and two bytes of a third; every epoch hits the windows that were read whole.
    assert rates[1] == rates[2] == rates[3] >= blocks / 100 - 0.15
    assert (rates[1] > 0.15) == (blocks >= 25)
    # What is not kept is fetched as it is, not in whole blocks.
    assert all(stop - start == 2 * BLOCK + 2 for start, stop in source.asked)


def test_the_bound_is_of_all_blobs_together_and_of_what_an_earlier_process_left(tmp_path):
    bound = 60 * BLOCK + 2 * INDEX_BYTES
    first, second = Source(), Source()
    check(open_cached(tmp_path / "cache", first, ("first", ""), bound), [(0, 40 * BLOCK)])
    blobs = [open_cached(tmp_path / "cache", source, (name, ""), bound)
             for source, name in ((first, "first"), (second, "second"))]  # fmt: skip
    check(blobs[1], [(0, 50 * BLOCK)])
    assert 55 * BLOCK <= used(tmp_path / "cache") <= 62 * BLOCK
    first.asked.clear(), second.asked.clear()
    check(blobs[0], [(0, 40 * BLOCK)])
    check(blobs[1], [(0, 10 * BLOCK)])
    assert first.asked == second.asked == []


def test_a_higher_bound_lets_a_full_folder_fill_up_further(tmp_path):
    source = Source()
    blobs = []  # while one of them lives, the folder stays open
    for blocks in (10, 60):
        blobs.append(open_cached(tmp_path / "cache", source, max_bytes=blocks * BLOCK + INDEX_BYTES + BLOCK))
        check(blobs[-1], [(0, 50 * BLOCK)])
    source.asked.clear()
    check(blobs[-1], [(0, 50 * BLOCK)])
    assert source.asked == []


def test_blobs_that_nobody_uses_make_room_and_other_versions_go_at_once(tmp_path):
    folder, bound = tmp_path / "cache", 60 * BLOCK + 2 * INDEX_BYTES
    for name, version in (("old store", ""), ("store", "first version")):
        check(open_cached(folder, Source(), (name, version), bound), [(0, 28 * BLOCK)])
    changed = bytes(reversed(CONTENT))
    source = Source(changed)
    blob = open_cached(folder, source, ("store", "second version"), bound)
    assert len([*folder.glob("*.data")]) == 2 and used(folder) < 35 * BLOCK
    check(blob, [(0, 20 * BLOCK)], changed)
    assert len([*folder.glob("*.data")]) == 2  # there was room
    check(blob, [(20 * BLOCK, 55 * BLOCK)], changed)
    assert len([*folder.glob("*.data")]) == len([*folder.glob("*.index")]) == 1
    source.asked.clear()
    check(blob, [(0, 55 * BLOCK)], changed)
    assert source.asked == []


@pytest.mark.parametrize("damage", ["flipped data", "zeroed data", "random index", "short data", "short index"])
def test_damaged_blocks_are_fetched_again(tmp_path, damage):
    source = Source()
    check(open_cached(tmp_path / "cache", source), [(0, len(CONTENT))])
    data = data_file(tmp_path / "cache")
    index = data.with_suffix(".index")
    if damage == "flipped data":
        with open(data, "r+b") as file:
            file.seek(10 * BLOCK + 17)
            file.write(bytes([CONTENT[10 * BLOCK + 17] ^ 1]))
    elif damage == "zeroed data":  # a power cut: the index was on disk, the data was not yet
        with open(data, "r+b") as file:
            file.seek(10 * BLOCK)
            file.write(bytes(BLOCK))
    elif damage == "random index":
        index.write_bytes(random.Random(1).randbytes(index.stat().st_size))
    else:
        os.truncate(data if damage == "short data" else index, 10)
    source.asked.clear()
    blob = open_cached(tmp_path / "cache", source)
    check(blob, random_ranges(5))
    assert source.asked == ([(10 * BLOCK, 11 * BLOCK)] if damage.endswith("ed data") else [(0, len(CONTENT))])
    source.asked.clear()
    check(blob, random_ranges(6))
    assert source.asked == []


CHILD = """
import random, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/../.."]  # range_server is in tests/
from test_cache import Source, open_cached, random_ranges
from pathlib import Path
blob = open_cached(Path(sys.argv[2]), Source())
print(type(blob).__name__, flush=True)
for seed in range(10**9):
    for window in random_ranges(seed, 50)[:50]:
        blob.read_many([window])
    print(seed, flush=True)
    if len(sys.argv) > 3:
        sys.stdin.readline()
"""


def child(folder, *arguments):
    command = [sys.executable, "-c", CHILD, os.path.dirname(__file__), str(folder), *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_process_that_is_killed_leaves_nothing_wrong(tmp_path):
    for _ in range(2):
        process = child(tmp_path / "cache")
        assert process.stdout.readline().strip() == "CachedBlob"
        process.stdout.readline()
        process.kill()
        process.communicate()
        source = Source()
        blob = open_cached(tmp_path / "cache", source)
        check(blob, random_ranges(7))
        assert sum(stop - start for start, stop in source.asked) < len(CONTENT) / 2
        del blob


def test_a_second_process_goes_without(tmp_path, capsys):
    process = child(tmp_path / "cache", "wait")
    process.stdout.readline(), process.stdout.readline()
    try:
        source = Source()
        for _ in range(2):
            blob = open_cached(tmp_path / "cache", source)
            assert blob is source
        errors = capsys.readouterr().err
        assert errors.count("\n") == 1 and f"{tmp_path}/cache is in use as the cache of another process" in errors
    finally:
        process.kill()
        process.communicate()
    assert isinstance(open_cached(tmp_path / "cache", source), CachedBlob)


def test_a_full_disk_ends_the_filling_and_nothing_else(tmp_path, monkeypatch, capsys):
    write, left = os.pwrite, [50 * BLOCK]

    def full(descriptor, content, offset):
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = min(left[0], len(content))  # the last write before is a part of what was asked
        left[0] -= count
        return write(descriptor, content[:count], offset)

    monkeypatch.setattr(os, "pwrite", full)
    source = Source()
    blob = open_cached(tmp_path / "cache", source)
    for epoch in range(3):
        check(blob, windows(epoch))
        for window in windows(epoch):
            check(blob, [window])
    assert left == [0]
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and "No space left on device; the cache stays as it is" in errors


def test_a_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").touch()
    source = Source()
    assert open_cached(tmp_path / "file/cache", source) is source
    assert "file/cache cannot be used as a cache" in capsys.readouterr().err


def test_storage_puts_the_cache_in_front_of_remote_files_only(tmp_path):
    pytest.importorskip("aiohttp")
    (tmp_path / "files").mkdir()
    (tmp_path / "files/one").write_bytes(CONTENT)
    storage = Storage(5.0, str(tmp_path / "cache"), 0.01)
    with RangeServer(tmp_path / "files") as server:
        place = f"{server.url}/one"
        check(storage.open(place), windows(0))
        server.log.clear()
        check(storage.open(place), windows(1))
        assert [request.method for request, _ in server.log] == ["HEAD"]
        # Another version, of the same length.
        (tmp_path / "files/one").write_bytes(CONTENT[::-1])
        check(storage.open(place), windows(1), CONTENT[::-1])
        assert not isinstance(storage.open(tmp_path / "files/one"), CachedBlob)
        assert not isinstance(Storage(5.0, str(tmp_path / "cache"), 0.0).open(place), CachedBlob)
