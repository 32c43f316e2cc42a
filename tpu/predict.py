"""Compiles points of the papers' table for slices that people rent, and keeps what the compiled programs say.

    pip install -e '.[tpu]'
    python -m tpu.predict                 those of POINTS whose report is missing; killed, it goes on where it was
    python -m tpu.predict 410m-v5p-4x4x4-vanilla ...
    python -m tpu.predict --again         all, by the constants as they are now: nothing is compiled

Needs no TPU; about four minutes a compilation on two cores. A searched point is the faster, by its compiled program, of
the two layouts that closed forms put first (`aot --search --max_compilations=2`), which experiments/pile.py starts
from. The others have a layout that they are given.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from spiral_jax.data import atomic
from spiral_jax.errors import SpiralError
from spiral_jax.roofline.report import prediction

FOLDER = Path(__file__).parent / "predictions"
SEARCH = ("--search", "--max_compilations=2")
WHOLE = ("--config.model.remat=keep_all", "--config.train.gather_core=step", "--config.train.accumulation=2")
FRUGAL = ("--config.model.remat=keep_inputs",)


def _name(size: str, topology: str, family: str) -> str:
    return f"{size}-{topology.replace(':', '-')}-{family}"


# Name to (size, family, slice, flags of aot).
POINTS: dict[str, tuple[str, str, str, tuple[str, ...]]] = {
    _name(size, topology, family): (size, family, topology, flags)
    for sizes, families, topology, flags in (
        (("160m", "410m", "1b", "1.4b"), ("vanilla", "spiral_b"), "v5p:4x4x4", SEARCH),
        (("160m", "410m"), ("spiral_b",), "v6e:8x8", SEARCH),
        (("1.4b",), ("mesh", "spiral_l"), "v5p:4x4x4", WHOLE),
        (("160m",), ("vanilla", "mesh", "spiral_b", "spiral_l"), "v5e:4x4", (*FRUGAL, "--config.train.accumulation=4")),
        (("1.4b",), ("vanilla", "mesh", "spiral_b", "spiral_l"), "v6e:8x8", (*FRUGAL, "--config.train.accumulation=2")),
    )
    for size in sizes
    for family in families
}


def main(names: list[str]) -> None:
    """Makes these points, by default all that are missing; or predicts those that are there again."""
    if names == ["--again"]:
        for path in sorted(FOLDER.glob("*.json")):
            predict_again(path)
        return
    for name in names:
        if name not in POINTS:
            raise SpiralError(f"the point is {name!r}; allowed: {', '.join(POINTS)}")
    FOLDER.mkdir(exist_ok=True)
    for name in names or POINTS:
        output = FOLDER / f"{name}.json"
        if names or not output.exists():
            compile_point(*POINTS[name], output)


def predict_again(path: Path) -> None:
    """Writes what the constants make of a report's costs."""
    found = json.loads(path.read_text(encoding="utf-8"))
    found["prediction"] |= prediction(found, found["prediction"]["costs"])
    atomic.write_text(path, json.dumps(found, indent=1) + "\n")


def compile_point(size: str, family: str, topology: str, flags: tuple[str, ...], output: Path) -> None:
    """Runs `aot`; a fault ends everything.

    Without the flags that hosts give the compiler (`tpu.hosts.libtpu_arguments`): with them programs do the same work,
    but gathers made of sums lose their names, and the report could not tell them from sums of gradients.
    """
    arguments = (f"--config=experiments/pile.py:{size},{family}", f"--topology={topology}", *flags)
    variables = {"JAX_PLATFORMS": "cpu", "LIBTPU_INIT_ARGS": ""}
    subprocess.run(
        [sys.executable, "-m", "spiral_jax.aot", *arguments, f"--output={output}"],
        check=True,
        cwd=FOLDER.parents[1],
        env=os.environ | variables,
    )


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except SpiralError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
