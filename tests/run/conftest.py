"""A bucket for the tests of runs on one."""

import itertools

import bucket
import pytest

_NUMBERS = itertools.count()


@pytest.fixture(scope="session")
def emulator_url():
    """An emulator for this process, which all its libraries ask from here on."""
    for package in ("gcsfs", "google.cloud.storage"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    with bucket.emulator() as url:
        bucket.make_bucket(url, bucket.BUCKET)
        bucket.put_into_environment(url)
        yield url


@pytest.fixture
def place(emulator_url):
    """A folder on the bucket in which there is nothing yet."""
    from spiral_jax.data.bucket import bucket_path

    return bucket_path("--workdir", f"gs://{bucket.BUCKET}/test-{next(_NUMBERS)}")
