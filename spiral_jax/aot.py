"""Compiles a run's train step for TPU slices that are not there, and says what it would need and how fast it should be.

python -m spiral_jax.aot --config=experiments/pile.py:1.4b,spiral_b --topology=v5p-128
python -m spiral_jax.aot --config=experiments/pile.py:160m,spiral_b --topology=v5e:4x4 --config.train.accumulation=4
python -m spiral_jax.aot --config=experiments/pile.py:160m,spiral_b --topology=v5e:4x4 --search

Needs libtpu (extra `tpu`) and no TPU. Memory, matrix work and communication are read from the compiled program; times
are predictions by a roofline whose constants follow from six measured runs of other models (tpu/calibration.py).
Nothing of this has run on a chip.
"""

import importlib.metadata
import json
import os
import shlex
import sys
from typing import Any

from absl import flags

from spiral_jax import __version__, command
from spiral_jax.data import atomic
from spiral_jax.data.storage import local_path
from spiral_jax.errors import SpiralError
from spiral_jax.hardware import GIB, Slice, parse_slice
from spiral_jax.roofline.report import DoesNotFit, compile_step, report
from spiral_jax.roofline.search import flags_of, nearest_that_fits, search
from spiral_jax.run.config import RunConfig


def define(values: flags.FlagValues) -> None:
    command.define_config(values)
    flags.DEFINE_string("topology", None, "TPU slice, as in v5p-128 or v5p:4x4x4", flag_values=values)
    flags.DEFINE_integer("num_slices", 1, "how many of them; mesh.data lies across", 1, flag_values=values)
    flags.DEFINE_bool("search", False, "find the layout that should be fastest", flag_values=values)
    flags.DEFINE_integer("max_compilations", 8, "--search: of minutes each", 1, flag_values=values)
    flags.DEFINE_string("output", "", "file to write the report to, as JSON", flag_values=values)
    flags.DEFINE_bool("json", False, "print JSON only", flag_values=values)


def main(values: flags.FlagValues) -> None:
    config = command.config_of(values)
    if not values.topology:
        raise SpiralError("--topology is missing; allowed: a TPU slice, as in v5p-128 or v5p:4x4x4")
    chips = parse_slice(values.topology)
    output = local_path("--output", values.output) if values.output else None
    if output is not None and (output.is_dir() or not os.access(output.parent, os.W_OK)):
        raise SpiralError(f"--output is {str(output)!r}; allowed: a file in a folder that exists and can be written to")

    found = run(config, chips, values)
    found |= {
        "command": shlex.join(["python", "-m", "spiral_jax.aot", *sys.argv[1:]]),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu", "flax")}
        | {"spiral_jax": __version__},
    }
    if output is not None:
        atomic.write_text(output, json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=2) if values.json else as_text(found))


def run(config: RunConfig, chips: Slice, values: flags.FlagValues) -> dict[str, Any]:
    """The report of the configuration, or of the best that a search finds."""
    if values.search:
        found = search(config, chips, values.num_slices, values.max_compilations, _say)
        if found.best is None or found.config is None:
            more = f", or --max_compilations above {values.max_compilations}" if found.left else ""
            raise SpiralError(
                f"--topology is {str(chips)!r}, which none of the {len(found.tried)} layouts compiled fits, and "
                f"{found.left} were not tried; allowed: a larger slice{more}"
            )
        return found.best | {"flags": flags_of(found.config), "tried": found.tried, "not_tried": found.left}
    try:
        return report(config, chips, values.num_slices, compile_step(config, chips, values.num_slices, _say))
    except DoesNotFit as error:
        nearest = nearest_that_fits(config, chips, values.num_slices, _say)
        raise SpiralError(
            f"--topology is {str(chips)!r}, of which a device {error}; allowed: "
            + (
                f"a larger slice, or the nearest that fits: {nearest}"
                if nearest
                else "a larger slice; nothing near fits"
            )
        ) from None


def as_text(found: dict[str, Any]) -> str:
    """The report for people."""
    where, step, held, flops = found["slice"], found["step"], found["memory"], found["flops"]
    unwanted = found["scores_and_logits_in_memory"]
    guess, mesh = found["prediction"], " x ".join(f"{axis} {size}" for axis, size in step["mesh"].items())
    slices = f"{where['slices']} x " if where["slices"] > 1 else ""
    lines = [
        f"{found['model']['notation']} {found['model']['topology']} on {slices}{where['topology']} "
        f"({where['accelerator_type']}, {where['chips']} chips), compiled in {found['compile_seconds']:.0f} s; "
        "not run on a chip",
        f"mesh {mesh}, {step['sequences_per_device']} sequences of {step['sequence_length']} a device x "
        f"{step['accumulation']} micro-batches, remat {step['remat']}, core gathered per {step['gather_core']}",
        "",
        f"memory per device     {held['peak_bytes'] / GIB:8.2f} GiB of {held['usable_bytes'] / GIB:.2f} "
        f"({held['share']:.0%}), of which at the peak (by a simulation that comes to "
        f"{held['simulated_peak_bytes'] / GIB:.2f})",
    ]
    lines += [f"  {name:<20}{size / GIB:8.2f}" for name, size in list(held["held_at_the_peak"].items())[:8]]
    if unwanted:
        lines.append(f"in memory: L x L scores or all logits, {len(unwanted)} arrays, among them {unwanted[0]}")
    lines += [
        "",
        f"matrix products       {flops['dense_executed']:.4e} FLOP a step, {flops['dense_executed_over_model']:.3f} x "
        f"the model's {flops['dense_model']:.4e}; attention {flops['attention_model_causal']:.3e} (causal)",
        "communication per device and step (whole arrays)",
    ]
    sent = found["communication_per_device"]
    for what in ("gathered", "summed"):
        size, form = sent[f"{what}_bytes"], sent["closed_form"][f"{what}_bytes"]
        lines.append(f"  {what:<20}{size / GIB:8.3f} GiB, by the closed form {form / GIB:.3f}")
    lines += [
        f"  {kind:<20}{one['count']:>8}, {one['bytes'] / GIB:.3f} GiB" for kind, one in sent["collectives"].items()
    ]
    if where["slices"] > 1:
        lines.append(f"  between slices      {found['bytes_between_slices'] / GIB:8.3f} GiB")
    alone = ", ".join(f"{name.replace('_', ' ')} {seconds:.3f}" for name, seconds in guess["seconds_alone"].items())
    lines += [
        "",
        f"prediction            {guess['step_seconds']:.3f} s a step, "
        f"{guess['tokens_per_second_per_chip']:,.0f} tokens/s a chip, MFU {guess['mfu']:.1%} "
        f"({guess['mfu_full_attention']:.1%} counting attention in full)",
        f"  most of it limited by {guess['bound']}; seconds alone: {alone}",
    ]
    if "flags" in found:
        lines += [
            "",
            f"fastest of {len(found['tried'])} compiled ({found['not_tried']} more not tried):",
            found["flags"],
        ]
    return "\n".join(lines)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    command.run("aot", __doc__, define, main)
