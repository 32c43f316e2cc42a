"""What a host knows of itself, from a metadata server as TPU VMs have it, or from GKE's environment."""

import http.server
import threading

import pytest

from tpu.host import machine


@pytest.fixture
def attributes(monkeypatch):
    """What the metadata server says, by attribute."""
    said = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.headers["Metadata-Flavor"] == "Google"
            text = said.get(self.path.removeprefix("/computeMetadata/v1/instance/attributes/"))
            self.send_response(404 if text is None else 200)
            self.end_headers()
            self.wfile.write((text or "").encode())

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server_port}")
    for name in ("TPU_WORKER_ID", "MEGASCALE_SLICE_ID"):
        monkeypatch.delenv(name, raising=False)
    yield said
    server.shutdown()
    server.server_close()


def test_index_on_a_tpu_vm(attributes):
    attributes |= {"agent-worker-number": "3", "tpu-env": "ACCELERATOR_TYPE: 'v5p-32'\nWORKER_ID: '3'\n"}
    assert machine.index(4) == 3
    attributes["tpu-env"] += "MEGASCALE_NUM_SLICES: '3'\nMEGASCALE_SLICE_ID: '2'\n"
    assert machine.index(4) == 11


def test_index_on_gke(monkeypatch):
    monkeypatch.setenv("TPU_WORKER_ID", "1")
    assert machine.index(4) == 1
    monkeypatch.setenv("MEGASCALE_SLICE_ID", "2")
    assert machine.index(4) == 9


def test_the_kernels_lines(tmp_path, monkeypatch):
    lines = [
        "[1] python[7]: segfault at 0 ip 0 in libtpu.so",
        "[2] eth0: link up",
        "[3] Out of memory: Killed process 7",
    ]
    (tmp_path / "dmesg").write_text("#!/bin/sh\ncat <<END\n" + "\n".join(lines) + "\nEND\n")
    (tmp_path / "dmesg").chmod(0o755)
    (tmp_path / "sudo").write_text("#!/bin/sh\necho 'a password is required' >&2\nexit 1\n")
    (tmp_path / "sudo").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert machine.kernel_lines() == [lines[0], lines[2]]
