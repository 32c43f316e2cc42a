"""A bucket of the emulator, and what is put between it and its user."""

import bucket
import loopback
import pytest

from tests.tpu.world import World
from tpu import hosts


@pytest.fixture(scope="session")
def storage():
    """The address of a Cloud Storage emulator; its buckets are made by `bucket.make_bucket`."""
    with bucket.emulator() as address:
        yield address


@pytest.fixture
def bucket_url(storage, monkeypatch, request) -> str:
    """gs:// of a new bucket, where STORAGE_EMULATOR_HOST points to."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", storage)
    name = f"b{abs(hash(request.node.nodeid)):x}"
    bucket.make_bucket(storage, name)
    return f"gs://{name}"


@pytest.fixture
def world(monkeypatch) -> World:
    """A job of 5,000 seconds, whose hosts are started in virtual time."""
    world = World({"jobs": [{"runs": 5000, "status": 0}]})
    monkeypatch.setattr(hosts, "bring_up", lambda *given, seconds: world.bring_up(given[2], seconds))
    return world


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
