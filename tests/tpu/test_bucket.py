"""tpu/bucket.py against the emulator, and against a server that fails as the real one does."""

import http.server
import json
import socket
import struct
import threading
import time

import pytest

from spiral_jax.errors import SpiralError
from tpu.bucket import Bucket, Conflict, Unreachable


@pytest.fixture
def bucket(bucket_url):
    return Bucket(f"{bucket_url}/some/folder")


def test_objects(bucket, bucket_url):
    assert bucket.get("a/b c%2F") is None
    generation = bucket.put("a/b c%2F", b"text \xff\n")
    assert bucket.get("a/b c%2F") == (b"text \xff\n", generation)
    assert bucket.put("a/z", {"x": [1, None]}) != generation
    assert bucket.read("a/z") == {"x": [1, None]} and bucket.read("a/none") is None
    bucket.put("ab", b"")
    assert [(o.name, o.size) for o in bucket.list("a/")] == [("a/b c%2F", 7), ("a/z", 26)]
    # The folder is part of every name, and of nothing that is given back.
    assert [o.name for o in Bucket(bucket_url).list()] == [f"some/folder/{name}" for name in ("a/b c%2F", "a/z", "ab")]
    bucket.delete("a/z")
    bucket.delete("a/z")
    assert bucket.get("a/z") is None
    assert bucket.location() == "us-central1"


def test_a_large_object(bucket):
    content = bytes(range(256)) * 5000
    generation = bucket.put("large", content)
    assert bucket.get("large") == (content, generation)


def test_of_two_writers_one_is_told(bucket):
    first = bucket.put("claim", b"one", if_generation_match=0)
    with pytest.raises(Conflict):
        bucket.put("claim", b"two", if_generation_match=0)
    second = bucket.put("claim", b"one, again", if_generation_match=first)
    with pytest.raises(Conflict):
        bucket.put("claim", b"two", if_generation_match=first)
    assert bucket.get("claim") == (b"one, again", second)


def test_a_bucket_that_is_not_there(bucket):
    other = Bucket("gs://not-there-at-all")
    for call in (lambda: other.get("x"), other.list, other.location, lambda: other.put("x", b"")):
        with pytest.raises(SpiralError, match=r"^--bucket is gs://not-there-at-all; allowed: a bucket that is there"):
            call()


@pytest.mark.parametrize(
    "url", ["", "bucket", "gs://", "s3://bucket", "gs://Bucket", "gs://b/../x y", "gs://bucket;rm", "gs://bucket//x"]
)
def test_urls(url):
    with pytest.raises(SpiralError, match=r"--bucket is .*; allowed: gs://BUCKET or gs://BUCKET/FOLDER"):
        Bucket(url)


@pytest.fixture
def scripted(monkeypatch):
    """A list of answers, and the requests that came.

    An answer is (status, body), with a third number a body that breaks off so many bytes before its end, or None for a
    connection that is cut.
    """
    answers, seen = [], []

    class Handler(http.server.BaseHTTPRequestHandler):
        def handle_any(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            seen.append((self.command, self.path, self.headers.get("Authorization"), body))
            answer = answers.pop(0)
            if answer is None:
                self.connection.close()
                return
            self.send_response(answer[0])
            self.send_header("Content-Length", str(len(answer[1]) + sum(answer[2:])))
            self.send_header("x-goog-generation", "7")
            self.end_headers()
            self.wfile.write(answer[1])
            if answer[2:]:
                threading.Event().wait(0.2)  # until it has been read
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
                self.connection.close()

        do_GET = do_POST = do_DELETE = handle_any

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    host = f"127.0.0.1:{server.server_port}"
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", host)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    yield answers, seen, host
    server.shutdown()
    server.server_close()


def test_what_fails_for_a_moment_is_tried_again(scripted):
    answers, seen, _ = scripted
    answers += [(429, b""), (503, b"busy"), None, (408, b""), (200, b"content")]
    assert Bucket("gs://bucket").get("x") == (b"content", 7)
    assert len(seen) == 5


def test_an_error_whose_text_breaks_off_is_that_error(scripted):
    answers, seen, _ = scripted
    answers += [(503, b"bu", 2), (200, b"cont", 3), (200, b"content")]
    assert Bucket("gs://bucket").get("x") == (b"content", 7) and len(seen) == 3
    answers.append((403, b'{"error": ', 80))
    with pytest.raises(SpiralError, match=r"gcloud auth list.*\(403 Forbidden: "):
        Bucket("gs://bucket").get("x")


def test_a_connection_that_hangs_leaves_patience_for_another(monkeypatch):
    """A server that takes connections, and answers only the second."""
    server = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"127.0.0.1:{server.getsockname()[1]}")
    held = []

    def serve():
        held.append(server.accept())
        connection, _ = server.accept()
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nx-goog-generation: 3\r\n\r\nok")
        held.append(connection)

    threading.Thread(target=serve, daemon=True).start()
    assert Bucket("gs://bucket", patience=4).get("x") == (b"ok", 3)
    server.close()


def test_an_end_to_patience(scripted):
    answers, _, _ = scripted
    answers += [(503, b"")] * 1000
    with pytest.raises(Unreachable, match=r"allowed: one that answers within 0.2 seconds \(503"):
        Bucket("gs://bucket", patience=0.2).list()


def test_a_write_whose_answer_was_lost_is_no_conflict(scripted):
    answers, seen, _ = scripted
    answers += [None, (412, b""), (200, b"mine")]
    assert Bucket("gs://bucket").put("claim", b"mine", if_generation_match=0) == 7
    assert [command for command, *_ in seen] == ["POST", "POST", "GET"]
    answers += [None, (412, b""), (200, b"of another")]
    with pytest.raises(Conflict):
        Bucket("gs://bucket").put("claim", b"mine", if_generation_match=0)


def test_no_permission_is_one_line(scripted):
    answers, seen, _ = scripted
    answers.append((403, json.dumps({"error": {"message": "me@x has no\nstorage.objects.get access"}}).encode()))
    with pytest.raises(SpiralError, match=r"gcloud auth list.*\(403 Forbidden: me@x has no storage.objects.get acc"):
        Bucket("gs://bucket").get("x")
    assert len(seen) == 1


def test_the_token_of_a_host(scripted, monkeypatch):
    answers, seen, host = scripted
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    monkeypatch.setenv("GCE_METADATA_HOST", host)
    bucket = Bucket("gs://bucket", on_host=True)
    bucket._api = f"http://{host}"
    tokens = [(200, json.dumps({"access_token": f"t{n}", "expires_in": 3599}).encode()) for n in (1, 2)]
    # One that was revoked early is asked for again, once.
    answers += [tokens[0], (200, b"a"), (401, b""), tokens[1], (200, b"b"), (401, b""), tokens[1], (401, b"")]
    assert bucket.get("x")[0] + bucket.get("y")[0] == b"ab"
    assert [token for _, path, token, _ in seen if "/storage/" in path] == ["Bearer t1", "Bearer t1", "Bearer t2"]
    with pytest.raises(SpiralError, match="401"):
        bucket.get("z")


@pytest.mark.parametrize("script", ["echo token-of-gcloud", "echo 'no account is\n active' >&2; exit 1"])
def test_the_token_of_gcloud(script, tmp_path, scripted, monkeypatch, capfd):
    answers, seen, host = scripted
    (tmp_path / "gcloud").write_text(f'#!/bin/sh\ntest "$*" = "auth print-access-token --quiet" || exit 3\n{script}\n')
    (tmp_path / "gcloud").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    monkeypatch.setenv("GCE_METADATA_HOST", "nowhere")  # a small VM of the cloud is no TPU's host
    bucket = Bucket("gs://bucket")
    bucket._api = f"http://{host}"
    if "exit 1" in script:
        with pytest.raises(SpiralError, match=r"allowed: an account \(`gcloud auth login`; no account is active\)"):
            bucket.get("x")
    else:
        answers += [(200, b"a"), (200, b"b")]
        bucket.get("x"), bucket.get("x")
        assert [token for _, _, token, _ in seen] == ["Bearer token-of-gcloud"] * 2
    assert capfd.readouterr() == ("", "")
