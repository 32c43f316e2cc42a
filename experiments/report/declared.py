"""What a study says before it runs, as far as its report reads it."""

import dataclasses
from typing import Literal

from experiments.record import Entry

Matching = Literal["parameters", "flops", "seconds"]
MATCHINGS: tuple[Matching, ...] = ("parameters", "flops", "seconds")


@dataclasses.dataclass(frozen=True)
class Contrast:
    """Two arms that are compared.

    Attributes:
      ours: an arm; a difference is negative where it is better.
      theirs: the arm beside it, trained so that it is matched.
      matching: what both have or spend as much of; `parameters` goes with equal tokens.
    """

    ours: str
    theirs: str
    matching: Matching


@dataclasses.dataclass(frozen=True)
class PlannedArm:
    """An arm, whether its runs exist or not.

    Attributes:
      name: as `Record.arm`.
      factors: as `Record.factors`. `size` and `family` name a row of paper/main_table.csv, `change` one of
        paper/ablation.csv; `ratio` is a recurrence ratio and `budget` FLOPs; curves join arms that are equal but for
        the axis.
      config_hash: as `Record.config_hash`: records with another one are named and left out.
      learning_rates: the grid that is tried.
      seeds: that are paired.
      command: that makes its runs.
    """

    name: str
    factors: dict[str, Entry]
    config_hash: str
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    command: str


@dataclasses.dataclass(frozen=True)
class Declared:
    """A study's edition.

    Attributes:
      study, edition: as in `Record`.
      title: a line.
      question: what it asks and how, in a few sentences of Markdown.
      exploratory: whether nothing in it can be more than that.
      text: of the evaluation that contrasts are about, as "validation".
      primary: the contrast that may become `replicated`; empty where there is none, otherwise one.
      contrasts: all that are shown, in order; the primary one is among them.
      arms: in the order of the tables.
      slice: that seconds are predicted on; empty where seconds are measured ones.
    """

    study: str
    edition: str
    title: str
    question: str
    exploratory: bool
    text: str
    primary: tuple[Contrast, ...]
    contrasts: tuple[Contrast, ...]
    arms: tuple[PlannedArm, ...]
    slice: str = ""
