"""Describes a configuration: parameters, FLOPs, schedule, memory per device. Trains nothing and needs no device.

python -m spiral_jax.describe --config=experiments/pile.py:1.4b,spiral_b
python -m spiral_jax.describe --config=experiments/pile.py:1.4b,spiral_b --devices=64 --config.mesh.fsdp=64 --json
python -m spiral_jax.describe --config=experiments/quickstart.py --data
python -m spiral_jax.describe --costs

`--data` opens what the run would read, too. `--costs`, in a checkout, gives the chip-hours of the papers' main table:
model FLOPs at the MFU predicted for the point of tpu/predictions that is nearest.
"""

import csv
import json
import runpy
from pathlib import Path
from typing import Any

from absl import flags

from spiral_jax import command
from spiral_jax.corpus.sources import find_sources
from spiral_jax.data.prepared import open_stores
from spiral_jax.errors import SpiralError, require
from spiral_jax.model.chunks import Level
from spiral_jax.roofline.points import Model, chip_hours, nearest, read_points
from spiral_jax.run.config import RunConfig
from spiral_jax.run.inputs import check_data, open_examples, window_order
from spiral_jax.training.costs import flops, layout, memory

PREFILL_TOKENS = 4096
MAIN_TABLE, EXPERIMENT = "experiments/paper/main_table.csv", "experiments/pile.py"


def define(values: flags.FlagValues) -> None:
    command.define_config(values)
    flags.DEFINE_integer("devices", 1, "devices of the mesh to give the memory for", flag_values=values)
    flags.DEFINE_bool("data", False, "open the data as well", flag_values=values)
    flags.DEFINE_bool("costs", False, "chip-hours of the papers' main table, instead", flag_values=values)
    flags.DEFINE_bool("json", False, "print JSON only", flag_values=values)


def main(values: flags.FlagValues) -> None:
    if values.costs:
        rows = costs()
        print(json.dumps(rows, indent=2) if values.json else costs_as_text(rows))
        return
    config = command.config_of(values)
    require(values.devices >= 1, "--devices", values.devices, "1 or more")
    description = describe(config, values.devices)
    if values.data:
        description["data"] = open_data(config)
    print(json.dumps(description, indent=2) if values.json else as_text(description))


def describe(config: RunConfig, num_devices: int) -> dict[str, Any]:
    """Everything the command reports.

    Args:
      config: the run.
      num_devices: devices of the mesh that the memory is given for.

    Raises:
      SpiralError: a mesh that does not fit the devices, the batch or the model.
    """
    model, length, steps = config.model, config.train.sequence_length, config.train.steps
    return {
        "model": {
            "notation": model.notation,
            "topology": model.topology,
            "d_model": model.d_model,
            "head_width": model.head_width,
        },
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
            "evaluations": -(-steps // (config.evaluation.every_steps or steps)),  # the last step is always one
            "tokens_per_evaluation": config.evaluation.batches * config.train.tokens_per_step,
        },
        "reads": reads(config),
        "extras": extras(config),
        "schedule": schedule(config),
        "memory": layout(config, num_devices) | memory(config, num_devices),
    }


def reads(config: RunConfig) -> dict[str, list[str]]:
    """Files and folders that the configuration names, by field."""
    data = config.data
    named = {
        "data.stores": data.stores,
        "data.validation_store": (data.validation_store,),
        "data.paths": () if data.stores else data.paths,
        "data.validation_paths": () if data.stores else data.validation_paths,
        "data.tokenizer": () if data.tokenizer in ("bytes", "bpe") else (data.tokenizer,),
        "upcycle.source": (config.upcycle.source,),
        "evaluation.tasks_data": (config.evaluation.tasks_data,),
    }
    return {field: found for field, places in named.items() if (found := [place for place in places if place])}


def extras(config: RunConfig) -> dict[str, str]:
    """Packages of optional extras that a run of the configuration imports, by the field that asks for each."""
    wanted = {
        "logging.tensorboard": ("tensorboardx", config.logging.tensorboard),
        "logging.wandb": ("wandb", config.logging.wandb),
        "summary.plot": ("matplotlib", config.summary.plot),
        "evaluation.tasks": ("lm-eval", config.evaluation.tasks),
    }
    return {field: package for field, (package, is_wanted) in wanted.items() if is_wanted}


def open_data(config: RunConfig) -> dict[str, Any]:
    """What is there of the data that a run would read: stores are opened, files of text are found.

    Raises:
      SpiralError: data that is missing or damaged, or that does not suit the run.
    """
    if config.data.examples:
        examples = open_examples(config).source.num_examples
        return {"examples": examples, "epochs": config.train.steps * config.train.batch_size / examples}
    if not config.data.stores:
        files = find_sources(config.data.paths, config.data.exclude, format=config.data.format)
        return {"files": len(files), "file_bytes": sum(file.size for file in files)}
    data = open_stores(config.data)
    check_data(config, data)
    return {
        "tokens": sum(source.num_tokens for source in data.train),
        "epochs": window_order(config, data).epoch(config.train.steps),
        "validation_tokens": data.validation.num_tokens if data.validation else 0,
    }


def costs() -> list[dict[str, Any]]:
    """Chip-hours of each row of the papers' main table, per slice that points were compiled for.

    Raises:
      SpiralError: this is no checkout of the repository.
    """
    for file in (MAIN_TABLE, EXPERIMENT):
        if not Path(file).is_file():
            raise SpiralError(f"{file} does not exist; allowed: --costs in a checkout's folder")
    points = read_points()
    slices = sorted({str(point.slice): point.slice for point in points}.items())
    get_config, rows = runpy.run_path(EXPERIMENT)["get_config"], []
    for row in csv.DictReader(Path(MAIN_TABLE).read_text(encoding="utf-8").splitlines()):
        family = {"spiral_b_anchor": "spiral_b"}.get(row["family"], row["family"])
        values = get_config(f"{row['size']},{family}")
        if family != row["family"]:
            values.model.topology = "anchor"
        config = RunConfig.from_dict(values.to_dict())
        model, needed = config.model, flops(config)
        total, found = (needed.dense + needed.attention_causal) * config.train.steps, {}
        key = Model.of(model)
        for name, chips in slices:
            point = nearest(points, chips.generation.name, key)
            assert point is not None, "slices are those of points"
            found[name] = {
                "chip_hours": chip_hours(total, point.mfu, chips),
                "mfu": point.mfu,
                "point": point.name,
                "own_point": point.model == key,
            }
        rows.append({"size": row["size"], "family": row["family"], "notation": model.notation, "flops": total} | found)
    return rows


def costs_as_text(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table; `~` where the MFU is a neighbour's."""
    slices = [name for name in rows[0] if ":" in name]
    lines = [
        f"| run | model FLOP | {' | '.join(f'{name}, chip-hours' for name in slices)} |",
        "|---" * (2 + len(slices)) + "|",
    ]
    for row in rows:
        cells = [f"{'' if row[name]['own_point'] else '~ '}{row[name]['chip_hours']:,.0f}" for name in slices]
        lines.append(f"| {row['size']} {row['family']} | {row['flops']:.3e} | {' | '.join(cells)} |")
    sums = [f"{sum(row[name]['chip_hours'] for row in rows):,.0f}" for name in slices]
    lines.append(f"| all {len(rows)} | {sum(row['flops'] for row in rows):.3e} | {' | '.join(sums)} |")
    lines += [
        "",
        "~ at the MFU predicted for the nearest point of tpu/predictions; nothing has run on a TPU. Training alone.",
    ]
    return "\n".join(lines)


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
    for name, number in description.get("data", {}).items():
        lines.append(f"{name.replace('_', ' '):<20}{number:>12,.{2 if isinstance(number, float) else 0}f}")
    return "\n".join(lines)


if __name__ == "__main__":
    command.run("describe", __doc__, define, main)
