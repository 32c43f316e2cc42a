"""What a host knows of itself: which one it is, who holds its chips, what is installed, what its kernel said."""

import contextlib
import glob
import hashlib
import importlib.metadata
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tpu.bucket import metadata

# What a process holds open while it has chips. Set otherwise in tests.
DEVICES = os.environ.get("SPIRAL_JAX_DEVICES", "/dev/accel*:/dev/vfio/*").split(":")
_TOLD = re.compile(
    r"segfault|general protection|traps:|out of memory|oom-kill|killed process|machine check|i/o error", re.I
)
_PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "numpy")


def index(hosts_per_slice: int) -> int:
    """Which host of the job this is, as jax counts them: by slice, then by worker.

    GKE says it in the environment, a TPU VM in its metadata.
    """
    worker = os.environ.get("TPU_WORKER_ID") or metadata("attributes/agent-worker-number")
    slice_id = os.environ.get("MEGASCALE_SLICE_ID")
    if slice_id is None and "TPU_WORKER_ID" not in os.environ:
        found = re.search(r"^MEGASCALE_SLICE_ID: *'?(\d+)", metadata("attributes/tpu-env"), re.M)
        slice_id = found and found[1]
    return int(slice_id or 0) * hosts_per_slice + int(worker)


def versions(environment: Path, code: Path) -> dict[str, str]:
    """What has to be the same on all hosts: Python, the packages that compute, the code's files as they are now."""
    found = {"code": _digest(code)}
    for line in (environment / "pyvenv.cfg").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition("=")
        if name.strip() in ("version", "version_info"):
            found["python"] = value.strip()
    folders = [str(path) for path in environment.glob("lib/python*/site-packages")]
    for distribution in importlib.metadata.distributions(path=folders):
        if distribution.metadata["Name"] in _PACKAGES:
            found[distribution.metadata["Name"]] = distribution.version
    return dict(sorted(found.items()))


def _digest(folder: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            total.update(f"{path.relative_to(folder)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()[:16]


def holders() -> set[int]:
    """Processes, other than this one, that hold a device."""
    files = {file for pattern in DEVICES for file in glob.glob(pattern)}
    found = set()
    for link in glob.glob("/proc/[0-9]*/fd/*") if files else ():
        try:
            if os.readlink(link) in files:
                found.add(int(link.split("/")[2]))
        except OSError:  # it has ended, or is another user's
            continue
    return found - {os.getpid()}


def free(seconds: float) -> bool:
    """Ends whoever holds a device: asks (SIGTERM), waits for up to `seconds`, kills. Whether all are free then."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in holders():
            send(pid, number)
        if wait_until(lambda: not holders(), seconds):
            return True
    return False


def send(pid: int, number: int, group: bool = False) -> None:
    """Sends a signal to a process, or its group, that may have ended."""
    with contextlib.suppress(OSError):
        (os.killpg if group else os.kill)(pid, number)


def wait_until(done: Callable[[], bool], seconds: float, every: float = 0.1) -> bool:
    """Whether it was done within so many seconds."""
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(every)
    return True


def kernel_lines() -> list[str]:
    """The last things the kernel said that explain a death without a traceback."""
    for command in ("sudo -n dmesg --ctime", "dmesg --ctime", "journalctl --dmesg --lines=1000 --no-pager"):
        try:
            done = subprocess.run(command.split(), capture_output=True, timeout=20, stdin=subprocess.DEVNULL)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if done.returncode == 0:
            lines = done.stdout.decode(errors="replace").splitlines()
            return [line[:300] for line in lines if _TOLD.search(line)][-10:]
    return []
