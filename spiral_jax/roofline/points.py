"""Points that `aot` compiled and a repository keeps, and what a run near one of them should take. Without jax."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from spiral_jax.errors import SpiralError
from spiral_jax.hardware import Slice, parse_slice

if TYPE_CHECKING:
    from spiral_jax.model.config import ModelConfig

FOLDER = "tpu/predictions"


class Model(NamedTuple):
    """What a model's speed depends on.

    Attributes:
      notation: layers and resolutions, as `ModelConfig.notation`.
      topology: as `ModelConfig.topology`.
      parameters: all of them.
      head_width: of attention, which on matrix units of 128 or 256 decides what a small model can reach.
    """

    notation: str
    topology: str
    parameters: int
    head_width: int

    @classmethod
    def of(cls, config: "ModelConfig") -> "Model":
        """Of a configuration."""
        return cls(config.notation, config.topology, config.total_parameters, config.head_width)


class Point(NamedTuple):
    """A compiled step, as far as runs near it can be judged by it.

    Attributes:
      name: of its file.
      slice: that it was compiled for.
      model: that it trains.
      mfu: predicted; causal attention counts.
    """

    name: str
    slice: Slice
    model: Model
    mfu: float


def read_points(folder: str | Path = FOLDER) -> list[Point]:
    """The points of a folder with reports of `aot`.

    Raises:
      SpiralError: there are none, or one is not such a report.
    """
    points = []
    for path in sorted(Path(folder).glob("*.json")):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            model, mfu = Model(**found["model"]), float(found["prediction"]["mfu"])
            points.append(Point(path.stem, parse_slice(found["slice"]["topology"]), model, mfu))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SpiralError(f"{path} is damaged ({type(error).__name__}: {error})") from None
    if not points:
        raise SpiralError(f"{str(folder)!r} has no reports of aot; allowed: a checkout's folder {FOLDER}")
    return points


def nearest(points: Sequence[Point], generation: str, model: Model) -> Point | None:
    """The point to judge a model by: of the same chips, then head width, resolutions, topology, size; None without."""
    return min(
        (point for point in points if point.slice.generation.name == generation),
        key=lambda point: (
            abs(math.log(point.model.head_width / model.head_width)),
            _resolutions(point.model.notation) != _resolutions(model.notation),
            point.model.topology != model.topology,
            abs(math.log(point.model.parameters / model.parameters)),
        ),
        default=None,
    )


def chip_hours(flops: float, mfu: float, chips: Slice) -> float:
    """What `flops` of a model take, counted as `mfu` is, on however many of these chips."""
    return flops / (mfu * chips.generation.peak_flops) / 3600


def _resolutions(notation: str) -> str:
    found = re.search(r"\{.*\}", notation)
    return found[0] if found else ""
