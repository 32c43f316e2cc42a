"""docs/config.md follows the dataclasses."""

import dataclasses
import typing
from pathlib import Path
from typing import Literal

import pytest

from spiral_jax import reference
from spiral_jax.run.config import MUTABLE, RunConfig

DOCUMENT = Path(__file__).parents[1] / "docs" / "config.md"


@dataclasses.dataclass(frozen=True)
class Documented:
    """Two lines
    of summary.

    Attributes:
      kind: <|end|> or `a|b<c>`;
        continued: here.
      low, high: both ends.

    What follows is: no attribute.
    """

    kind: Literal["a", "b"] | None = None
    low: int = 0
    high: tuple[float, ...] = (1e-8,)


def test_document_is_current():
    assert DOCUMENT.read_text(encoding="utf-8") == reference.markdown(), (
        "run python -m spiral_jax.reference > docs/config.md"
    )


def test_every_field_has_a_row():
    rows = [line.split("`")[1] for line in reference.markdown().splitlines() if line.startswith("| `")]
    expected = [name for name in typing.get_type_hints(RunConfig) if not dataclasses.is_dataclass(type_of(name))]
    for room in typing.get_type_hints(RunConfig):
        if dataclasses.is_dataclass(type_of(room)):
            expected += [f"{room}.{field.name}" for field in dataclasses.fields(type_of(room))]
    assert rows == expected
    assert len(rows) > 50


def type_of(name: str):
    return typing.get_type_hints(RunConfig)[name]


def test_mutable_fields_are_named():
    text = reference.markdown()
    _, _, resume = text.partition("## What may change on resume")
    resume, _, _ = resume.partition("\n## ")
    for entry in MUTABLE:
        assert f"`{entry}*`" in resume if entry.endswith(".") else f"`{entry}`" in resume
    assert "`train.steps`" in resume
    assert text.count("May change on resume.") == sum(entry.endswith(".") for entry in MUTABLE)


def test_cells():
    """Pipes are escaped, in code as well; angle brackets outside code are no HTML; an entry may cover two fields."""
    assert reference.table(Documented, "room.").splitlines() == [
        "| field | type | default | meaning |",
        "|---|---|---|---|",
        r'| `room.kind` | `"a" \| "b" \| None` | `None` '
        r"| &lt;\|end\|&gt; or `a\|b<c>`; continued: here. |",
        "| `room.low` | `int` | `0` | both ends. |",
        "| `room.high` | `tuple[float, ...]` | `(1e-08,)` | both ends. |",
    ]


def test_undocumented_field_is_named():
    undocumented = dataclasses.make_dataclass("Undocumented", [("new", int, 0)], bases=(Documented,), frozen=True)
    undocumented.__doc__ = Documented.__doc__
    with pytest.raises(ValueError, match=r"Undocumented\.new\b"):
        reference.table(undocumented)


@pytest.mark.parametrize("doc", [None, "No attributes.", "Summary.\n\nAttributes:\n  new:\n"])
def test_field_without_a_meaning_is_named(doc):
    bare = dataclasses.make_dataclass("Bare", [("new", int, 0)])
    bare.__doc__ = doc
    with pytest.raises(ValueError, match=r"Bare\.new\b"):
        reference.table(bare)


def test_documented_name_that_is_no_field_is_named():
    stale = dataclasses.make_dataclass("Stale", [("new", int, 0)])
    stale.__doc__ = "Summary.\n\nAttributes:\n  new: here.\n  old: gone."
    with pytest.raises(ValueError, match=r"Stale\.old\b"):
        reference.table(stale)
