"""What machine this is."""

import importlib.metadata
import os
import platform

import jax

from spiral_jax.hardware import usable_cores
from tpu.first_hour.findings import Findings, generation_of

PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "numpy", "spiral_jax")
# What changes how programs are compiled; no other variable is looked at, as some hold secrets.
VARIABLES = (
    "JAX_PLATFORMS", "XLA_FLAGS", "LIBTPU_INIT_ARGS", "TPU_ACCELERATOR_TYPE", "TPU_CHIPS_PER_HOST_BOUNDS",
    "TPU_LIBRARY_PATH", "TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES", "TPU_SKIP_MDS_QUERY",
)  # fmt: skip


def run(findings: Findings, size: str, workdir: str, argument: str) -> None:
    """Devices, versions and what may differ between machines."""
    device = jax.devices()[0]
    generation = generation_of(device)
    findings.measured |= {
        "platform": device.platform,
        "device_kind": device.device_kind,
        "platform_version": device.client.platform_version,  # the library that runs, which may be another
        "generation": generation.name if generation else None,
        "devices": len(jax.devices()),
        "memory_stats": device.memory_stats(),
        "versions": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "cores": usable_cores(),
        "host_memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }
    # An addition: the device answers.
    findings.at_most("error of 1 + 1", abs(float(jax.jit(lambda x: x + 1)(1.0)) - 2), 0)
    findings.say(f"{len(jax.devices())} x {device.device_kind}")
    if device.platform != "tpu":
        findings.say(f"NOT A TPU: a rehearsal on {device.platform}, which says nothing about one")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
