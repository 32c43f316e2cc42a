"""Devices of TPU slices, described without being there."""

import contextlib
import importlib.util
import os

import jax
from jax.experimental.compilation_cache import compilation_cache

from spiral_jax.errors import SpiralError
from spiral_jax.hardware import Slice


def describe_devices(chips: Slice, num_slices: int = 1) -> list[jax.Device]:
    """Devices to compile for that need not be there.

    The TPU compiler is loaded into this process, which afterwards must not use TPUs of its own.

    Args:
      chips: the slice.
      num_slices: how many of it, connected by the data-center network; then every device has a `slice_index`.

    Raises:
      SpiralError: libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise SpiralError("--topology needs libtpu, which is not installed; allowed: pip install 'spiral_jax[tpu]'")
    from jax.experimental import topologies

    for name, value in {
        # Other processes may have loaded it, and nobody is to be asked which TPU this is.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        # What the answer would have been; else there are errors on stderr that mean nothing.
        "TPU_ACCELERATOR_TYPE": chips.accelerator_type,
        "TPU_WORKER_HOSTNAMES": "localhost",
    }.items():
        os.environ.setdefault(name, value)
    options: dict[str, str | int | list[int]] = {}
    if chips.hosts == 1:
        # Unless told, the compiler takes hosts of four: two for a slice of eight, and for one chip it knows none.
        options["chips_per_host_bounds"] = [*chips.shape, 1][:3]
    if chips.generation.name == "v4":
        options["chip_config_name"] = "megacore"
    if num_slices > 1:
        options["num_slices"] = num_slices
    return topologies.get_topology_desc(str(chips), "tpu", **options).devices


@contextlib.contextmanager
def no_compilation_cache():
    """Turns off the persistent cache: of programs for devices that are not there it takes what it cannot give back."""
    enabled = jax.config.jax_enable_compilation_cache

    def enable(value: bool):
        jax.config.update("jax_enable_compilation_cache", value)
        # jax looks at the setting once, when it first compiles, unless told to look again.
        compilation_cache.reset_cache()

    enable(False)
    try:
        yield
    finally:
        enable(enabled)
