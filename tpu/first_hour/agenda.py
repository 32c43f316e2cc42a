"""What the first hour consists of, in order, and how long each part should take."""

from typing import NamedTuple

SIZES = ("tiny", "full")


class Section(NamedTuple):
    """A part that runs in a process of its own, so that its crash, and its peak of memory, are its own.

    Attributes:
      name: in the file that is sent back.
      module: of this package, with a function `run(findings, size, workdir, argument)`.
      argument: what `run` is given of it, for modules that are used several times.
      full_seconds: that it should take on a TPU; it is not begun with less time left. Guessed: none has run on one.
      tiny_seconds: the same of a rehearsal on CPU.
    """

    name: str
    module: str
    argument: str
    full_seconds: float
    tiny_seconds: float

    def seconds(self, size: str) -> float:
        return self.full_seconds if size == "full" else self.tiny_seconds


# Those of most worth first: the last ones are what a short budget loses.
SECTIONS = (
    Section("device", "device", "", 30, 5),
    Section("attention", "attention", "", 150, 10),
    Section("training", "training", "", 300, 20),
    Section("point-160m-vanilla", "points", "160m-vanilla", 90, 8),
    Section("point-160m-spiral_b", "points", "160m-spiral_b", 120, 10),
    Section("checkpoint", "checkpoint", "", 60, 8),
    Section("decoding", "decoding", "", 120, 12),
    Section("point-410m-spiral_b", "points", "410m-spiral_b", 150, 10),
    Section("speed", "speed", "", 60, 5),
)
