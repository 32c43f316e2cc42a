"""What launchers say in the environment about this process among those of its run, where jax would not take it so.

jax reads the variables of Slurm and Open MPI, too. It would give a process the GPU whose number is its own on the node,
also where it is alone there with eight of them, and it would join a single process over a port of the cluster's.
"""

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path

from spiral_jax.errors import require

_OF_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_OF_TPU_PODS = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")
# What CUDA and ROCm read, the first that is set.
_VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")

Environment = Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Launched:
    """A process as its launcher counts it.

    Attributes:
      launcher: what started it.
      count: processes of the run.
      id: which one this is, from 0.
      local_id: which one of those on its node.
      on_node: how many those are; 0 if that is not known.
      bound: whether the launcher has given each process GPUs of its own.
    """

    launcher: str
    count: int
    id: int
    local_id: int
    on_node: int
    bound: bool = False


def launched(environment: Environment) -> Launched | None:
    """What Slurm or Open MPI says; None of a process that neither has started.

    Raises:
      SpiralError: a variable that is no number.
    """
    if "OMPI_COMM_WORLD_SIZE" in environment:
        names = ("SIZE", "RANK", "LOCAL_RANK", "LOCAL_SIZE")
        count, number, local_id, on_node = (_number(environment, f"OMPI_COMM_WORLD_{name}") for name in names)
        return Launched("Open MPI", count, number, local_id, on_node)
    if not all(name in environment for name in _OF_SLURM):
        return None
    # An interactive step is a single task; SLURM_NTASKS is then what the job was asked for.
    count = _number(environment, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS")
    bound = "SLURM_GPUS_PER_TASK" in environment or "gpu" in environment.get("SLURM_TRES_PER_TASK", "")
    return Launched(
        "Slurm",
        count,
        _number(environment, "SLURM_PROCID"),
        _number(environment, "SLURM_LOCALID"),
        _tasks_on_node(environment, count),
        bound,
    )


def visible_gpus(environment: Environment, devices: Path = Path("/dev")) -> int:
    """How many GPUs this process may see, without asking a driver.

    Args:
      environment: of the process.
      devices: the folder of device files.
    """
    chosen = next((environment[name] for name in _VISIBLE if name in environment), None)
    if chosen is not None:
        numbers = [number.strip() for number in chosen.split(",")]
        return next((n for n, number in enumerate(numbers) if number in ("", "-1", "NoDevFiles")), len(numbers))
    nvidia = sum(bool(re.fullmatch(r"nvidia\d+", path.name)) for path in devices.glob("nvidia*"))
    return nvidia or (len(list(devices.glob("dri/renderD*"))) if (devices / "kfd").exists() else 0)


def gpus_of_process(process: Launched | None, visible: int) -> tuple[list[int], str]:
    """Which GPUs a process is to use.

    Args:
      process: as its launcher counts it; None without a launcher that does.
      visible: how many GPUs it sees.

    Returns:
      Their numbers among those it sees, empty for all of them; and what to say about those that nobody uses, or "".
    """
    if process is None or process.on_node == 1 or process.count == 1 or process.bound:
        return [], ""
    if process.local_id >= visible or process.on_node > visible:
        return [], ""  # fewer than one each: they are not the same ones
    note = ""
    if 0 < process.on_node < visible:
        note = (
            f"note: 1 of {visible} GPUs used by each of {process.on_node} processes on this node; {visible} processes "
            "there, or a single one, use them all, or JAX_LOCAL_DEVICE_IDS says which are whose"
        )
    return [process.local_id], note


def is_alone(environment: Environment) -> bool:
    """Whether this process cannot be one of several, though jax would ask a cluster for the others.

    A pod of Kubernetes that is none of an indexed job, which jax knows; or a notebook's host with one TPU, which names
    itself as the only one, and has nobody to ask for an address.
    """
    if "KUBERNETES_SERVICE_HOST" in environment:
        return not any(name in environment for name in ("JOB_COMPLETION_INDEX", *_OF_TPU_PODS))
    hosts = environment.get("TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES", ""))
    return len(hosts.split(",")) == 1 and hosts != "" and not any(name.startswith("MEGASCALE") for name in environment)


def address_of_process_0(launcher: Launched) -> str | None:
    """Where jax will have process 0 of a launcher's listen; None if that cannot be told before."""
    try:
        from jax._src import clusters  # which has no public door

        kinds = {"Slurm": clusters.SlurmCluster, "Open MPI": clusters.OmpiCluster}
        return kinds[launcher.launcher].get_coordinator_address(1, os.environ.get("JAX_COORDINATOR_PORT"))
    except Exception:  # of another version of jax
        return None


def _tasks_on_node(environment: Environment, count: int) -> int:
    """Tasks of the step on this node; 0 if that is not known."""
    if environment.get("SLURM_STEP_NUM_NODES") == "1" or count == 1:
        return count
    # As in "4(x2),3": four on each of two nodes, three on the next.
    counts: list[int] = []
    for entry in environment.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        if found := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", entry):
            counts += [int(found[1])] * int(found[2] or 1)
    node = environment.get("SLURM_NODEID", "")
    return counts[int(node)] if node.isdigit() and int(node) < len(counts) else 0


def _number(environment: Environment, name: str) -> int:
    text = environment.get(name, "")
    require(text.isascii() and text.isdigit(), name, text, "a whole number, as its launcher sets it")
    return int(text)
