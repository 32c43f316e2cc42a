"""Range reads over HTTP from a server that fails on purpose."""

import concurrent.futures
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter

import numpy as np
import pytest
from range_server import RangeServer, random_faults

from spiral_jax.data.blob import JoinedBlobs
from spiral_jax.data.pipeline import WindowOrder, WindowReader, train_batches
from spiral_jax.data.remote import blob as remote
from spiral_jax.data.remote.blob import RemoteBlob
from spiral_jax.data.storage import LOCAL, Storage
from spiral_jax.data.store import TokenStore
from spiral_jax.data.store_writer import StoreWriter
from spiral_jax.data.tokenizers import ByteTokenizer
from spiral_jax.data.windows import num_windows
from spiral_jax.errors import SpiralError, Unreachable

pytest.importorskip("aiohttp")

CONTENT = random.Random(0).randbytes(300_000)
PASSING = ["500", "503", "429", "408", "reset", "truncated", "hang", "html", "whole", "shifted", "changed"]


@pytest.fixture
def server(tmp_path):
    (tmp_path / "file").write_bytes(CONTENT)
    with RangeServer(tmp_path) as server:
        yield server


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("remote") / "store"
    with StoreWriter(folder, ByteTokenizer()) as writer:
        for number in range(20):
            tokens_N = np.random.default_rng(number).integers(256, size=1000)
            writer.add(tokens_N, utf8_bytes=1000)
    return folder


def open_file(server, retry_seconds=20.0, first_timeout=10.0):
    # Long, so that a busy machine is not taken for a hanging server where requests are counted.
    return RemoteBlob(f"{server.url}/file", retry_seconds, first_timeout)


def random_ranges(seed, count):
    generator = random.Random(seed)
    starts = [generator.randrange(len(CONTENT)) for _ in range(count)]
    ranges = [(start, min(start + generator.choice((0, 1, 100, 8194, 20_000)), len(CONTENT))) for start in starts]
    return [*ranges, (0, 0), (0, len(CONTENT)), (len(CONTENT) - 1, len(CONTENT)), (5, 10), (10, 15), (7, 12)]


def gets(server):
    return [request for request, _ in server.log if request.method == "GET"]


def test_four_threads_read_through_a_failing_server_what_is_in_the_file(server):
    faults = random_faults(0.1, seed=3)
    server.fault = lambda request: faults(request).replace("hang", "reset")
    blob = open_file(server)
    assert (blob.size, blob.name) == (len(CONTENT), f"{server.url}/file") and blob.version
    server.log.clear()
    asked = [random_ranges(seed, 60) for seed in range(12)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for ranges, found in zip(asked, pool.map(blob.read_many, asked), strict=True):
            assert found == [CONTENT[start:stop] for start, stop in ranges]
    # Each range is asked for once, and once more per failure; nothing else is asked for.
    faults = [request for request, fault in server.log if fault]
    wanted = Counter((start, stop) for ranges in asked for start, stop in ranges if start < stop)
    wanted += Counter((request.start, request.stop) for request in faults)
    assert len(faults) > 30
    assert Counter((request.start, request.stop) for request in gets(server)) == wanted
    assert {request.method for request, _ in server.log} == {"GET"}


@pytest.mark.parametrize("fault", PASSING)
def test_what_passes_is_tried_again_range_by_range(server, fault):
    blob = open_file(server, first_timeout=0.3 if fault == "hang" else 10)
    server.log.clear()
    seen = Counter()

    def fails_twice(request):
        seen[request] += 1
        return fault if seen[request] <= 2 and request.start == 1000 else ""

    server.fault = fails_twice
    ranges = [(0, 1000), (1000, 2000), (2000, 3000)]
    assert blob.read_many(ranges) == [CONTENT[start:stop] for start, stop in ranges]
    asked = Counter(request.start for request in gets(server))
    assert asked == {0: 1, 1000: 3, 2000: 1} or (fault == "hang" and asked[1000] >= 3)


@pytest.mark.parametrize("fault", PASSING)
def test_what_does_not_pass_is_an_error_when_the_time_is_over(server, fault):
    blob = open_file(server, retry_seconds=0.2, first_timeout=0.1 if fault == "hang" else 10)
    server.fault = lambda request: fault if request.start == 1000 else ""
    with pytest.raises(Unreachable) as caught:  # one process of several may be the only one that meets it
        blob.read_many([(0, 1000), (1000, 2000)])
    message = str(caught.value)
    assert message.startswith(f"{server.url}/file: reading bytes 1000:2000 failed ") and "\n" not in message
    requests = sum(request.start == 1000 for request in gets(server))
    attempts = int(re.search(r"failed (\d+) times in .*data.retry_seconds is 0.2", message)[1])
    if fault == "reset":  # aiohttp itself asks again, once, on a connection that was closed before an answer
        assert attempts <= requests <= 2 * attempts
    else:
        assert attempts == requests
    if fault.isdigit():
        assert fault in message


@pytest.mark.parametrize("fault", ["401", "403", "404", "410", "416", "405"])
def test_what_cannot_pass_is_an_error_at_once(server, fault):
    blob = open_file(server)
    server.fault = lambda request: fault
    server.log.clear()
    with pytest.raises(SpiralError) as caught:
        blob.read(1000, 2000)
    assert len(server.log) == 1
    assert re.match(rf"{server.url}/file(: | cannot | does )", str(caught.value)) and "\n" not in str(caught.value)
    named = {"404": "does not exist any more", "410": "does not exist any more", "401": "denied", "403": "denied"}
    assert named.get(fault, fault) in str(caught.value)


def test_opening_and_existing(server, tmp_path):
    patient, hasty = Storage(retry_seconds=20), Storage(retry_seconds=0.2)
    assert hasty.exists(f"{server.url}/file") and not hasty.exists(f"{server.url}/nothing")
    with pytest.raises(SpiralError, match="/nothing does not exist"):
        hasty.open(f"{server.url}/nothing")
    assert patient.read_file(f"{server.url}/file") == CONTENT
    (tmp_path / "empty").touch()
    assert hasty.read_file(f"{server.url}/empty") == b""
    for fault, named in (("403", "denied"), ("500", "failed . times"), ("reset", "failed . times")):
        server.fault = lambda request, fault=fault: fault
        for use in (hasty.exists, hasty.open, hasty.read_file):
            with pytest.raises(SpiralError, match=named):
                use(f"{server.url}/file")
    failures = iter(["500", "503", "reset", "500"])  # fsspec asks again with GET where HEAD fails
    server.fault = lambda request: next(failures, "")
    assert patient.exists(f"{server.url}/file")
    failures = iter(["reset", "500", "503"])
    assert patient.open(f"{server.url}/file").size == len(CONTENT)


def test_a_server_that_is_down(server):
    blob = open_file(server, retry_seconds=0.3)
    url, port = f"{server.url}/file", server.port
    server.stop()
    try:
        hasty = Storage(retry_seconds=0.2)
        for use in (hasty.exists, hasty.open, lambda url: blob.read(0, 10)):
            with pytest.raises(SpiralError, match=rf"^{url}: .* failed \d+ times in .*connect"):
                use(url)
    finally:
        server.start(port)
    assert blob.read(0, 10) == CONTENT[:10]


def test_a_server_that_comes_back(server):
    blob = open_file(server)
    server.stop()
    back = threading.Timer(0.5, server.start, [server.port])
    back.start()
    try:
        assert blob.read_many([(0, 10), (10, 20)]) == [CONTENT[:10], CONTENT[10:20]]
    finally:
        back.join()


@pytest.mark.parametrize("etag", ["ETag", "X-None"])
@pytest.mark.parametrize(
    "content", [bytes(len(CONTENT)), CONTENT + b"more", CONTENT[:-1]], ids=["other", "more", "less"]
)
def test_a_file_that_changes_under_a_running_job(server, tmp_path, content, etag):
    if etag != "ETag" and len(content) == len(CONTENT):
        return  # then nothing tells them apart
    server.etag_header = etag
    blob = open_file(server, retry_seconds=0.2)
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(SpiralError, match="changed since it was opened"):
        blob.read(10, 20)


def test_requests_in_flight(server):
    blob = open_file(server)
    server._latency_seconds = 1.5  # all that may be in flight have to arrive within it, on a busy machine too
    blob.read_many([(n, n + 10) for n in range(40)])
    assert server.most_at_once == 40
    blob.read_many([(n, n + 10) for n in range(100)])
    assert server.most_at_once == remote._IN_FLIGHT


def test_a_long_range_is_read_in_pieces(server, monkeypatch):
    monkeypatch.setattr(remote, "_PIECE", 30_000)
    blob = open_file(server)
    server.log.clear()
    found = blob.read_many([(10, 65_000), (0, 30_000), (5, 5), (0, len(CONTENT))])
    assert found == [CONTENT[10:65_000], CONTENT[:30_000], b"", CONTENT]
    assert len(gets(server)) == 3 + 1 + 0 + 10


def test_ranges_outside_the_file_are_a_defect_of_ours(server):
    blob = open_file(server)
    for outside in ((-1, 5), (5, 4), (0, len(CONTENT) + 1)):
        with pytest.raises(IndexError):
            blob.read(*outside)


def test_remote_parts_joined(server, tmp_path):
    (tmp_path / "second").write_bytes(CONTENT[::-1])
    parts = [LOCAL.open(f"{server.url}/{name}") for name in ("file", "second")]
    joined, whole = JoinedBlobs("both", parts), CONTENT + CONTENT[::-1]
    ranges = [(0, 10), (len(CONTENT) - 5, len(CONTENT) + 5), (len(CONTENT), len(CONTENT) + 1), (0, len(whole))]
    assert joined.read_many(ranges) == [whole[start:stop] for start, stop in ranges]
    server.fault = lambda request: "404" if request.path == "/second" else ""
    with pytest.raises(SpiralError, match="second does not exist any more"):
        joined.read_many(ranges)


def batches(source, **kwargs):
    order = WindowOrder([num_windows(source, 16)], batch_size=8, seed=1)
    return train_batches(WindowReader([source], sequence_length=16, vocab_size=257), order, **kwargs)


def test_training_batches_are_the_local_ones_and_nothing_but_tokens_is_asked_for(store):
    with RangeServer(store.parent) as server:
        # Reads ahead of the last batch fail when the server ends: not for so long that they say so in another test.
        source = TokenStore.open(f"{server.url}/store", Storage(retry_seconds=8))
        server.log.clear()
        server.fault = random_faults(0.0, seed=1)
        with batches(source, read_threads=4) as remote_ones, batches(TokenStore.open(store)) as local_ones:
            for _ in range(200):
                np.testing.assert_array_equal(next(remote_ones), next(local_ones))
        assert {(request.method, request.path) for request, _ in server.log} == {("GET", "/store/tokens.bin")}
        assert {request.stop - request.start for request, _ in server.log} == {34}


def test_training_stops_when_the_server_does(store):
    server = RangeServer(store.parent)
    with server:
        source = TokenStore.open(f"{server.url}/store", Storage(retry_seconds=0.3))
        stream = batches(source)
        next(stream)
    with pytest.raises(SpiralError, match=r"tokens.bin: reading bytes .* failed"), stream:
        for _ in range(1000):
            next(stream)


def test_the_program_ends_while_a_thread_tries_again(server):
    program = (
        "import sys\nfrom concurrent.futures import ThreadPoolExecutor\n"
        "from spiral_jax.data.remote.blob import RemoteBlob\n"
        "blob = RemoteBlob(sys.argv[1], 300)\nprint(flush=True)\nsys.stdin.readline()\n"
        "ThreadPoolExecutor().submit(blob.read, 0, 5)"
    )
    command = [sys.executable, "-c", program, f"{server.url}/file"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    server.fault = lambda request: "500"
    begin = time.monotonic()
    process.communicate("go\n", timeout=60)
    assert time.monotonic() - begin < 60 and gets(server)
