"""Code of the user's own that a run uses: imported when a command names it, and its hash kept with the run.

A run directory alone never makes code run: what its configuration names must be registered already, by the experiment
file or by --import.
"""

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from etils.epath import Path

from spiral_jax.data.examples import example_sources
from spiral_jax.data.json_files import read_json_object, write_json
from spiral_jax.data.storage import expanded
from spiral_jax.errors import SpiralError, Unreachable, guarded
from spiral_jax.model.pooling import poolings
from spiral_jax.model.spreading import spreadings
from spiral_jax.model.topology import topologies
from spiral_jax.registry import Registry
from spiral_jax.training.optimizers import optimizers
from spiral_jax.training.schedules import schedules

FILE = "own_code.json"
REGISTRIES: tuple[Registry, ...] = (topologies, poolings, spreadings, optimizers, schedules, example_sources)


def import_files(paths: Sequence[str]) -> None:
    """Executes Python files, for what they register.

    Raises:
      SpiralError: one that is missing or does not run to its end, or registers a name that is taken.
    """
    for number, given in enumerate(paths):
        path = expanded("--import", given).resolve()
        if not path.is_file():
            raise SpiralError(f"--import={given} does not exist; allowed: a Python file")
        spec = importlib.util.spec_from_file_location(f"spiral_jax_import_{number}_{path.stem}", path)
        if spec is None or spec.loader is None:
            raise SpiralError(f"--import={given} is no Python file; allowed: one that ends in .py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # as dataclasses and type hints of the file expect
        with guarded(f"--import={given}", str(path)):
            spec.loader.exec_module(module)


def own_code(config: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """For every field that names something the package did not register: the name, its file and the file's sha256.

    Args:
      config: `RunConfig.to_dict()`.
    """
    found = {}
    for registry in REGISTRIES:
        name = registry.chosen(config)
        if name == "":  # no examples
            continue
        code = registry.code(name)
        if not code.is_ours:
            found[registry.field] = {"name": name, "file": code.file, "sha256": code.sha256}
    return found


def hashes(config: Mapping[str, Any]) -> dict[str, str]:
    """The part of `own_code` that all processes of a run must share: they may have the file in different places."""
    return {field: code["sha256"] for field, code in own_code(config).items()}


def save(workdir: Path, config: Mapping[str, Any]) -> None:
    """Keeps what a run uses in its directory."""
    write_json(workdir / FILE, own_code(config))


def check_registered(workdir: Path, config: Mapping[str, Any]) -> None:
    """Whether the names in a run's configuration are registered.

    Args:
      workdir: of the run.
      config: what its `config.json` holds.

    Raises:
      SpiralError: naming the field, the file that the run had it from, and the flag.
    """
    saved = _read(workdir)
    for registry in REGISTRIES:
        name = registry.chosen(config)
        if isinstance(name, str) and name not in registry and registry.field in saved:
            file = saved[registry.field].get("file")
            raise SpiralError(
                f"{registry.field} is {name!r}, which the run in {workdir} has from {file}; allowed: with "
                f"--import={file} or where the file is now (in Python, import it first)"
            )


def changes(workdir: Path, config: Mapping[str, Any]) -> list[str]:
    """A line for everything that another file defines now than when the run was started last."""
    saved, lines = _read(workdir), []
    for field, code in own_code(config).items():
        before = saved.get(field, {}).get("sha256")
        if before is not None and before != code["sha256"]:
            lines.append(
                f"note: {field} {code['name']!r} is not what the run was last started with: "
                f"{code['file']} has sha256 {code['sha256'][:12]} now, {before[:12]} then"
            )
    return lines


def _read(workdir: Path) -> dict[str, dict[str, str]]:
    """What `save` kept; nothing where that is missing or broken."""
    try:
        saved = read_json_object(workdir / FILE)
    except Unreachable:
        raise
    except SpiralError:
        return {}
    entries = [code.values() if isinstance(code, dict) else [None] for code in saved.values()]
    return saved if all(isinstance(entry, str) for values in entries for entry in values) else {}
