"""What a run was made of: parameters, software, hardware, source."""

import json
import platform
import re
import subprocess
import sys
from importlib import metadata
from typing import Any

import jax
import numpy as np
from etils.epath import Path
from jax.sharding import Mesh

from spiral_jax.data import atomic
from spiral_jax.data.json_files import read_json, write_json
from spiral_jax.data.prepared import PreparedData
from spiral_jax.errors import SpiralError, Unreachable
from spiral_jax.run import own_code
from spiral_jax.run.config import RunConfig
from spiral_jax.run.directory import save_data

PACKAGES = ("spiral_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def save_start(workdir: Path, config: RunConfig, data: PreparedData, abstract_params: Any, mesh: Mesh) -> None:
    """Writes what a start of a run is made of into its directory.

    Args:
      workdir: of the run.
      config: of this start.
      data: what it reads.
      abstract_params: as for `parameter_table`.
      mesh: the devices.
    """
    config.save(workdir / "config.json")
    own_code.save(workdir, config.to_dict())
    save_data(workdir, data)
    atomic.write_text(workdir / "parameters.txt", parameter_table(abstract_params))
    write_environment(workdir / "environment.json", mesh)


def parameter_table(abstract_params) -> str:
    """One line per array: path, shape, dtype, mesh axes, parameters; then the total.

    Args:
      abstract_params: tree of ShapeDtypeStructs that carry NamedShardings.
    """
    rows = [("parameter", "shape", "dtype", "mesh axes", "count")]
    total = 0
    for path, x in jax.tree_util.tree_leaves_with_path(abstract_params):
        name = "/".join(key.key for key in path)
        count = int(np.prod(x.shape))
        total += count
        rows.append((name, str(list(x.shape)), str(x.dtype), str(tuple(x.sharding.spec)), f"{count:,}"))
    rows.append(("total", "", "", "", f"{total:,}"))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines) + "\n"


def write_environment(path: Path, mesh: Mesh) -> None:
    """Appends this start of the run (a resume is a start too) to a JSON list at `path`."""
    starts = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    write_json(path, [*starts, environment(mesh)])


def environment(mesh: Mesh) -> dict[str, Any]:
    """What this start runs on: command, versions, devices."""
    devices = mesh.devices.flatten()
    return {
        "command": sys.argv,
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "devices": f"{devices.size} x {devices[0].device_kind}",
        "processes": jax.process_count(),
        "mesh": dict(mesh.shape),
    }


def processor() -> str:
    """The name of this machine's."""
    cpus = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"model name\s*: (.*)", cpus)
    return model[1] if model else platform.processor() or platform.machine()


def description(config: RunConfig, mesh: Mesh) -> dict[str, Any]:
    """What a run is, for a tracker of experiments: every field of its configuration, its size, what it runs on."""
    counts = {
        "parameters": config.model.total_parameters,
        "non_embedding_parameters": config.model.non_embedding_parameters,
    }
    return config.to_dict() | counts | {"environment": environment(mesh)}


def last_start(path: Path) -> dict[str, Any] | None:
    """What `write_environment` recorded last; None where that is missing or broken."""
    try:
        start = read_json(path)[-1]
        return start if {"packages", "git_commit"} <= start.keys() else None
    except Unreachable:
        raise
    except (SpiralError, LookupError, AttributeError, TypeError):
        return None


def git_commit() -> str | None:
    """Commit of this source tree, with `-dirty` if files differ from it; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=10, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
