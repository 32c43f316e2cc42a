"""Checks what must hold for a configuration's operators and optimizer, your own above all. Needs no data and no TPU.

python -m spiral_jax.check --config=experiments/own_topology.py
python -m spiral_jax.check --config=experiments/pile.py:160m,spiral_b --import=mine.py --config.model.pooling=mine

On a small model with the same operators, schedule and optimizer, with random weights, on the CPU: no token sees a later
one, at several offsets and lengths; rows of a batch do not see each other; iterations in a scan, decoding with caches
and training on a mesh of eight devices give what the plain program gives.
"""

import contextlib
import os

import jax
from absl import flags

from spiral_jax import command
from spiral_jax.errors import SpiralError
from spiral_jax.evaluation import invariants
from spiral_jax.parallel.heap import keep_freed_memory
from spiral_jax.parallel.xla_flags import quick_flags
from spiral_jax.run import own_code

define = command.define_config


def main(values: flags.FlagValues) -> None:
    config = command.config_of(values)
    with contextlib.suppress(RuntimeError):  # jax has started already: in a test, or in a file of the user's own
        jax.config.update("jax_num_cpu_devices", 8)
        jax.config.update("jax_platforms", "cpu")
    saved = config.to_dict()
    own = own_code.own_code(saved)
    for registry in own_code.REGISTRIES:
        of = f" of {own[registry.field]['file']}" if registry.field in own else ""
        print(f"{registry.field:<18} {registry.chosen(saved)}{of}")
    print(flush=True)
    failed = []
    for finding in invariants.check(config):
        print(as_text(finding), flush=True)
        if not finding.ok:
            failed.append(f"{finding.name} ({finding.where})")
    if failed:
        names = ", ".join(f"{registry.field} {registry.chosen(saved)!r}" for registry in own_code.REGISTRIES)
        raise SpiralError(f"{names}: the check fails for {' and '.join(failed)}")


def as_text(finding: invariants.Finding) -> str:
    """A line for people."""
    if finding.difference is None:
        return f"skipped {finding.name:<10} {finding.compared}"
    line = f"{finding.name:<10} {finding.compared}: differ by {finding.difference:.1e} of their scale"
    if finding.ok:
        return f"ok      {line}"
    return f"FAILED  {line}, allowed {invariants.TOLERANCE:.0e}; {finding.where}"


if __name__ == "__main__":
    keep_freed_memory()
    os.environ["XLA_FLAGS"] = f"{quick_flags()} {os.environ.get('XLA_FLAGS', '')}".strip()  # the last one holds
    command.run("check", __doc__, define, main)
