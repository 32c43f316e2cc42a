"""Twenty seconds on all hosts at once that show what a run of days would only find out later.

Every host has the devices it should have, and a sum over all of them is right. That all have the same versions and code
is compared before (tpu/host/supervisor.py), without jax: hosts that differ may not even be able to join.
"""

import argparse
import collections
import os
import sys

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from spiral_jax.errors import SpiralError
from spiral_jax.parallel.join import join
from spiral_jax.parallel.process_flags import define_processes


def smoke(hosts: int, devices: int) -> str:
    """A line about what is there.

    Args:
      hosts: in the job.
      devices: of each.

    Raises:
      SpiralError: something is missing, or does not sum up.
    """
    values = flags.FlagValues()
    define_processes(values)
    values(["smoke"])
    join(values)
    if jax.process_count() != hosts:
        raise SpiralError(f"the number of hosts that joined is {jax.process_count()}; allowed: {hosts}")
    found = collections.Counter(device.process_index for device in jax.devices())
    short = [f"host {host} has {found[host]} of {devices} devices" for host in range(hosts) if found[host] != devices]
    if short:
        raise SpiralError("; ".join(short))
    mesh = Mesh(np.array(jax.devices()), ("all",))
    ones = jax.make_array_from_callback(
        (len(mesh.devices),), NamedSharding(mesh, PartitionSpec("all")), lambda index: np.ones(1, np.float32)
    )
    add = jax.shard_map(lambda x: jax.lax.psum(x, "all"), mesh=mesh, in_specs=PartitionSpec("all"),
                        out_specs=PartitionSpec())  # fmt: skip
    total = float(np.asarray(jax.jit(add)(ones).addressable_data(0))[0])
    if total != hosts * devices:
        raise SpiralError(f"the sum of a one from every device is {total:g}; allowed: {hosts * devices}")
    return f"smoke test: {hosts} x {devices} x {jax.devices()[0].device_kind}, jax {jax.__version__}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="smoke")
    parser.add_argument("--hosts", type=int, required=True)
    parser.add_argument("--devices", type=int, required=True)
    given = parser.parse_args()
    try:
        print(smoke(given.hosts, given.devices), flush=True)
    except SpiralError as error:
        # The others may wait for this process in a sum: jax would wait for them at a usual exit.
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(2)
