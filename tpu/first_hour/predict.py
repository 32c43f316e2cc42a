"""Predicts the points of one chip for every generation: python -m tpu.first_hour.predict [GENERATION/POINT...]

Compiles each step for one chip that is not there (libtpu, no TPU; minutes each) and puts memory and seconds into
predictions.json, which `--compare` reads. It cannot be made on a TPU host: there libtpu is the chip's.
"""

import dataclasses
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

from spiral_jax.data import atomic
from spiral_jax.errors import SpiralError
from spiral_jax.hardware import GENERATIONS, Generation, Slice
from spiral_jax.parallel.mesh import make_mesh
from spiral_jax.roofline import hlo, work
from spiral_jax.roofline.compiling import compile_described
from spiral_jax.roofline.predict import FITTED, compact, constants_of, cost, places_of, total, written
from spiral_jax.roofline.slices import describe_devices
from spiral_jax.training.step import make_program
from tpu.first_hour.points import POINTS, step_config

OUTPUT = Path(__file__).with_name("predictions.json")


def main(names: list[str]) -> None:
    """Predicts these points, each named GENERATION/POINT, all by default; others are kept as they are."""
    every = {f"{generation.name}/{point}": (generation, point) for generation in GENERATIONS for point in POINTS}
    for name in names:
        if name not in every:
            raise SpiralError(f"the point is {name!r}; allowed: {', '.join(every)}")
    for name in names or every:
        generation, point = every[name]
        made = predict_point(generation, point)
        print(f"{name}: {made}", flush=True)
        # Read again each time: another process may make another point.
        kept = json.loads(OUTPUT.read_text(encoding="utf-8"))["points"] if OUTPUT.exists() else {}
        kept.setdefault(generation.name, {})[point] = made
        constants = {name: dataclasses.asdict(of) for name, of in FITTED.items()}
        found = {"format": 1, "constants": constants, "points": kept}
        atomic.write_text(OUTPUT, json.dumps(found, indent=1) + "\n")


def predict_point(generation: Generation, point: str) -> dict[str, Any]:
    """Of one device of the generation's smallest slice."""
    chips = Slice(generation, generation.shapes[0])
    devices = describe_devices(chips)[:1]
    config = step_config(point, "full")
    program = make_program(config, make_mesh(config.mesh, devices))
    compiled, text = compile_described(program.lowered())
    places = places_of(devices)
    counted = compact(cost(operation, chips, places) for operation in work.operations(hlo.parse(text)))
    found = total(counted, constants_of(chips))
    analysis: Any = compiled.memory_analysis()
    return {
        "step_seconds": found.step_seconds,
        "bound": found.bound,
        "costs": written(counted),
        "peak_bytes": analysis.peak_memory_in_bytes,
        "usable_bytes": generation.hbm_bytes,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "libtpu")},
    }


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except SpiralError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
