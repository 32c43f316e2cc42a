"""Hosts of a slice on this machine: a folder each, with the programs that a TPU VM has, or doubles of them.

Whatever ssh would run on a host runs in its folder by /bin/sh, as real processes.
"""

import contextlib
import hashlib
import io
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

from tpu.bucket import Bucket

ROOT = Path(__file__).parents[1]
CODE = "0123abc-clean"
UV = """#!/bin/sh
# As uv does with an environment: a folder whose Python has packages. They are those of VERSIONS.
echo "$@" >> $HOME/uv.log
for folder; do :; done
case "$1 $2" in
  venv*)
    mkdir -p $folder/bin $folder/lib/python3.11/site-packages
    echo "version_info = 3.11.7" > $folder/pyvenv.cfg
    printf '#!/bin/sh\\nexec PYTHON "$@"\\n' > $folder/bin/python
    chmod +x $folder/bin/python ;;
  "pip install")
    test ! -e $HOME/no_network || { echo "error: no network" >&2; exit 1; }
    while read name version; do
      into=$(dirname $(dirname $5))/lib/python3.11/site-packages/$name-$version.dist-info
      mkdir -p $into
      printf 'Metadata-Version: 2.1\\nName: %s\\nVersion: %s\\n' $name $version > $into/METADATA
    done < $HOME/packages ;;
esac
"""
DMESG = """#!/bin/sh
echo "[Thu Nov 26 18:00:00 2026] usb 1-1: new device"
echo "[Thu Nov 26 18:00:01 2026] Out of memory: Killed process 123 (python)"
"""


def tarball() -> bytes:
    """The code as it travels: what hosts need of this tree."""
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w:gz") as tar:
        for folder in ("spiral_jax", "tpu", "experiments"):
            tar.add(ROOT / folder, folder, filter=lambda info: None if "__pycache__" in info.name else info)
        if not (ROOT / "tpu/lock.txt").exists():
            tar.addfile(tarfile.TarInfo("tpu/lock.txt"))
    return written.getvalue()


class Host:
    """One host."""

    def __init__(self, folder: Path, number: int, variables: dict[str, str]):
        self.folder, self.number = folder, number
        (folder / "bin").mkdir(parents=True)
        (folder / "packages").write_text("jax 0.10.2\nlibtpu 0.0.42.1\n")
        # The system's Python has none of our packages, as on a TPU VM; that of the environment has them.
        system = getattr(sys, "_base_executable", sys.executable)
        doubles = {"python3": f'#!/bin/sh\nexec {system} "$@"\n', "uv": UV.replace("PYTHON", sys.executable),
                   "sudo": '#!/bin/sh\nshift\nexec "$@"\n', "dmesg": DMESG, "sleep": "#!/bin/sh\n"}  # fmt: skip
        for name, text in doubles.items():
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
        self.variables = {
            "HOME": str(folder),
            "PATH": f"{folder}/bin:/usr/bin:/bin",
            "TPU_WORKER_ID": str(number),
            "SPIRAL_JAX_DEVICES": f"{folder}/accel*",
            **variables,
        }

    def ssh(self, command: str, timeout: float = 60) -> subprocess.CompletedProcess:
        """What a login that runs a command does."""
        return subprocess.run(["/bin/sh", "-c", command], cwd=self.folder, env=self.variables, text=True,
                              capture_output=True, timeout=timeout, stdin=subprocess.DEVNULL)  # fmt: skip

    def processes(self) -> dict[int, str]:
        """Processes of this host, number to command line."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if f"HOME={self.folder}\0".encode() in (path / "environ").read_bytes():
                    command = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    if command:
                        found[int(path.name)] = command
        return found

    def pid(self, what: str) -> int:
        """The one process whose command line has this in it."""
        return wait_for(lambda: [pid for pid, command in self.processes().items() if what in command])[0]

    def kill(self) -> None:
        """The host is gone."""
        for _ in range(3):
            for pid in self.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


class Slice:
    """Some hosts, their bucket, and what a launcher does with them."""

    def __init__(self, folder: Path, url: str, storage: str, count: int = 2, code: bytes = b""):
        self.url, self.bucket = f"{url}/job", Bucket(f"{url}/job")
        self.hosts = [Host(folder / f"host{n}", n, {"STORAGE_EMULATOR_HOST": storage}) for n in range(count)]
        self.sha256 = hashlib.sha256(code).hexdigest()
        self.bucket.put(f"code/{CODE}.tar.gz", code)

    def write(self, attempt: int, argv: list[str], **changed) -> None:
        """The plan of an attempt."""
        plan = {"attempt": attempt, "argv": argv, "smoke": ["-c", ""], "env": {}, "code": CODE, "sha256": self.sha256,
                "hosts": len(self.hosts), "slices": 1, "started": time.time(), "seconds": 0.2, "grace": 0.5,
                "stop_seconds": 5.0}  # fmt: skip
        self.bucket.put(f"attempts/{attempt:04d}/job.json", plan | changed)

    def start(self, attempt: int, argv: list[str], **changed) -> None:
        self.write(attempt, argv, **changed)
        for host in self.hosts:
            done = self.tell(host, attempt)
            assert done.returncode == 0, done.stderr

    def command(self, attempt: int) -> str:
        script = str(ROOT / "tpu/host/setup.sh")
        return shlex.join(["bash", script, "start", self.url, CODE, self.sha256, f"--attempt={attempt}"])

    def tell(self, host: Host, attempt: int) -> subprocess.CompletedProcess:
        return host.ssh(self.command(attempt))

    def state(self, attempt: int, host: int) -> dict:
        return self.bucket.read(f"attempts/{attempt:04d}/host-{host}.json") or {"state": ""}

    def wait(self, attempt: int, state: str = "ended", hosts=None, seconds: float = 30.0) -> list[dict]:
        """The states of hosts once they all are so far."""
        numbers = range(len(self.hosts)) if hosts is None else hosts

        def arrived():
            states = [self.state(attempt, n) for n in numbers]
            return states if all(s["state"] == state for s in states) else None

        return wait_for(arrived, lambda: [self.state(attempt, n) for n in numbers] + [self.log(attempt, 0)], seconds)

    def log(self, attempt: int, host: int) -> str:
        folder = f"attempts/{attempt:04d}/logs/host-{host}/"
        return b"".join(self.bucket.get(part.name)[0] for part in self.bucket.list(folder)).decode()


def wait_for(what, told=lambda: "", seconds: float = 30.0):
    """What `what()` gives once it gives something."""
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, told()
        time.sleep(0.05)
    return found


class Ssh:
    """Runs what gcloud would: `execute` of tpu/gcloud.py, with hosts of a `Slice` behind ssh and scp.

    Attributes:
      commands: what was run, as argument lists.
      broken: per host, how many times ssh to it ends with 255 before it does anything.
      skipped: hosts that `--worker=all` leaves out without a word, as gcloud does.
    """

    def __init__(self, slice_: Slice):
        self.slice, self.commands, self.broken, self.skipped = slice_, [], {}, set()

    def __call__(self, arguments, timeout: float) -> tuple[int, str, str]:
        self.commands.append(list(arguments))
        flags = dict(a[2:].partition("=")[::2] for a in arguments if a.startswith("--"))
        everyone = flags["worker"] == "all"
        hosts = [host for host in self.slice.hosts if everyone or str(host.number) == flags["worker"]]
        for host in hosts:
            if everyone and host.number in self.skipped:
                continue
            if self.broken.get(host.number, 0):
                self.broken[host.number] -= 1
                return 1, "", "ERROR: (gcloud.compute.tpus.tpu-vm.ssh) [/usr/bin/ssh] exited with return code [255]."
            if "scp" in arguments:
                source, target = [a for a in arguments[arguments.index("scp") + 1 :] if not a.startswith("--")]
                (host.folder / target.partition(":")[2]).write_bytes(Path(source).read_bytes())
            else:
                done = host.ssh(flags["command"])
                if done.returncode:
                    return 1, "", f"{done.stderr}\nERROR: (gcloud.compute.tpus.tpu-vm.ssh) exited [{done.returncode}]."
        return 0, "", ""
