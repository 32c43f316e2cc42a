"""Describes a configuration: parameters, FLOPs, schedule, memory per device. Trains nothing and needs no device.

python -m spiral_jax.describe --config=experiments/pile.py:1.4b,spiral_b
python -m spiral_jax.describe --config=experiments/pile.py:1.4b,spiral_b --devices=64 --config.mesh.fsdp=64 --json
"""

import json
from typing import Any

from absl import flags

from spiral_jax import command
from spiral_jax.errors import require
from spiral_jax.model.chunks import Level
from spiral_jax.run.config import RunConfig
from spiral_jax.training.costs import layout, memory

PREFILL_TOKENS = 4096


def define(values: flags.FlagValues) -> None:
    command.define_config(values)
    flags.DEFINE_integer("devices", 1, "devices of the mesh to give the memory for", flag_values=values)
    flags.DEFINE_bool("json", False, "print JSON only", flag_values=values)


def main(values: flags.FlagValues) -> None:
    config = command.config_of(values)
    require(values.devices >= 1, "--devices", values.devices, "1 or more")
    description = describe(config, values.devices)
    print(json.dumps(description, indent=2) if values.json else as_text(description))


def describe(config: RunConfig, num_devices: int) -> dict[str, Any]:
    """Everything the command reports.

    Args:
      config: the run.
      num_devices: devices of the mesh that the memory is given for.

    Raises:
      SpiralError: a mesh that does not fit the devices, the batch or the model.
    """
    model, length = config.model, config.train.sequence_length
    return {
        "model": {"notation": model.notation, "topology": model.topology, "d_model": model.d_model},
        "parameters": {
            "total": model.total_parameters,
            "non_embedding": model.non_embedding_parameters,
            "router": model.router_parameters,
            "scaler": model.scaler_parameters,
        },
        "flops": {
            "prefill": model.prefill_flops(PREFILL_TOKENS),
            "prefill_causal": model.prefill_flops(PREFILL_TOKENS, causal=True),
            "train_per_token": model.train_flops_per_token(length),
            "train_per_token_causal": model.train_flops_per_token(length, causal=True),
            "train_total": model.train_flops_per_token(length) * config.train.steps * config.train.tokens_per_step,
        },
        "train": {
            "steps": config.train.steps,
            "batch_size": config.train.batch_size,
            "sequence_length": length,
            "tokens": config.train.steps * config.train.tokens_per_step,
        },
        "schedule": schedule(config),
        "memory": layout(config, num_devices) | memory(config, num_devices),
    }


def schedule(config: RunConfig) -> list[dict[str, Any]]:
    """One entry per part of the model, in the order a token passes through."""
    model, length = config.model, config.train.sequence_length
    levels = [Level(1, 0, 0), *model.schedule, Level(1, 0, 0)]
    names = ["prelude", *(f"iteration {t}" for t in range(model.num_iterations)), "coda"]
    parts = []
    for name, level, (layers, n) in zip(names, levels, model.executed_layers(length), strict=True):
        resolution = "1" if level.chunk == 1 else f"1/{level.chunk}"
        parts.append({"part": name, "layers": layers, "resolution": resolution, **level._asdict(), "length": n})
    return parts


def as_text(description: dict[str, Any]) -> str:
    """The description for people."""
    model, parameters, flops = description["model"], description["parameters"], description["flops"]
    train, held = description["train"], description["memory"]
    lines = [
        f"{model['notation']}  topology {model['topology']}, width {model['d_model']}",
        "",
        f"parameters         {parameters['total']:>17,}",
        f"  non-embedding    {parameters['non_embedding']:>17,}",
        f"  routers          {parameters['router']:>17,}",
        f"  scalers          {parameters['scaler']:>17,}",
        "",
        f"prefill, {PREFILL_TOKENS} tokens          {flops['prefill'] / 1e12:>10.3f} TFLOP"
        f"   ({flops['prefill_causal'] / 1e12:.3f} counting causal attention)",
        f"training, per token           {flops['train_per_token'] / 1e9:>10.3f} GFLOP"
        f"   ({flops['train_per_token_causal'] / 1e9:.3f})",
        f"training, {train['steps']:,} steps of {train['batch_size']} x {train['sequence_length']} tokens: "
        f"{train['tokens'] / 1e9:.1f}B tokens, {flops['train_total']:.3e} FLOP",
        "",
        f"{'part':<13}{'layers':>7}{'resolution':>12}{'chunk':>7}{'offset':>8}{'shift':>7}{'length':>8}",
    ]
    for part in description["schedule"]:
        lines.append(
            f"{part['part']:<13}{part['layers']:>7}{part['resolution']:>12}{part['chunk']:>7}{part['offset']:>8}"
            f"{part['shift']:>7}{part['length']:>8}"
        )
    mesh = " x ".join(f"{axis} {size}" for axis, size in held["mesh"].items())
    lines += ["", f"memory per device on {held['devices']} ({mesh}), {held['sequences_per_device']} sequences each"]
    for name in ("parameters", "optimizer", "gradients", "core", "gathered_rest", "activations_kept", "logits_block"):
        lines.append(f"  {name.replace('_', ' '):<20}{held[name] / 2**20:>12,.1f} MiB")
    return "\n".join(lines)


if __name__ == "__main__":
    command.run("describe", __doc__, define, main)
