"""The output of a job on its way to the bucket."""

import os
import time

import pytest

from tpu.bucket import Bucket, Unreachable
from tpu.host import report
from tpu.host.report import Reporter, Spool


@pytest.fixture
def bucket(bucket_url):
    return Bucket(bucket_url)


class Silent(Bucket):
    """One that does not answer while `down`."""

    down = False

    def _call(self, *arguments, **more):
        if self.down:
            raise Unreachable("no answer")
        return super()._call(*arguments, **more)


def parts(bucket) -> list[str]:
    return [part.name for part in bucket.list("logs/")]


def text(bucket) -> bytes:
    return b"".join(bucket.get(name)[0] for name in parts(bucket))


def test_parts_are_named_by_their_place(bucket, tmp_path):
    spool = Spool(bucket, "logs", tmp_path / "spool")
    spool.send()
    assert parts(bucket) == []
    for line in (b"one\n", b"and tw", b"o\n"):
        os.write(spool.file, line)
        spool.send()
    spool.send()
    assert parts(bucket) == [f"logs/{place:012d}.txt" for place in (0, 4, 10)]
    # Another one, of a supervisor that was started again, goes on where the bucket ends.
    again = Spool(bucket, "logs", tmp_path / "spool")
    again.note("again")
    again.send()
    assert text(bucket) == b"one\nand two\n[supervisor: again]\n"


def test_what_was_sent_takes_no_room(bucket, tmp_path):
    spool = Spool(bucket, "logs", tmp_path / "spool")
    written = b"".join(b"%07d\n" % n for n in range(400_000))
    os.write(spool.file, written)
    spool.send()
    assert len(parts(bucket)) == 4 and text(bucket) == written
    assert spool.size() == len(written) and os.fstat(spool.file).st_blocks * 512 < 200_000
    assert spool.tail(0).endswith("0399999\n")
    assert spool.tail(spool.size() - 8) == "0399999\n"


def test_a_bucket_that_is_silent_for_long(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "_KEPT", 1000)
    spool = Spool(bucket, "logs", tmp_path / "spool")
    os.write(spool.file, b"%0999d\n" % 1)
    spool.send()
    os.write(spool.file, b"%01499d\n" % 2)  # while nothing could be sent
    spool.send()
    assert (
        text(bucket) == b"%0999d\n" % 1 + (b"%01499d\n" % 2)[500:] + b"[supervisor: 500 bytes of output were dropped]\n"
    )


def test_a_reporter_outlives_its_bucket(bucket_url, tmp_path):
    bucket = Silent(bucket_url)
    spool = Spool(bucket, "logs", tmp_path / "spool")
    with Reporter(bucket, 7, 3, spool, 0.05) as reporter:
        bucket.down = True
        os.write(spool.file, b"while it is silent\n")
        reporter.say(state="running")
        time.sleep(0.3)
        bucket.down = False
        reporter.say(state="ended", status=0)
    assert text(bucket) == b"while it is silent\n"
    state = bucket.read("attempts/0007/host-3.json")
    assert (state["state"], state["status"]) == ("ended", 0) and abs(state["beat"] - time.time()) < 60


def test_the_first_exit_is_one_hosts(bucket, tmp_path):
    first, second = (Reporter(bucket, 1, host, Spool(bucket, "logs", tmp_path / f"{host}"), 1.0) for host in (4, 5))
    first.claim_first_exit(status=43)
    second.claim_first_exit(status=0)
    assert bucket.read("attempts/0001/first_exit.json") == {"host": 4, "status": 43}
