"""A report before it is Markdown, CSV or HTML: headings, paragraphs, lists, tables of values, figures."""

import dataclasses
import math

Cell = str | int | float


@dataclasses.dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
      key: in rows, and in the CSV file.
      title: what people read, with the unit.
      form: of numbers, as for `format`.
    """

    key: str
    title: str
    form: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of values. A cell that a row has not, or that is nan, is shown as missing.

    Attributes:
      name: of the CSV file.
      title: what it is.
      note: below it: how to read it, and the command that makes it.
      columns: in order; rows may hold more, which only the CSV file has.
      rows: cells by column.
    """

    name: str
    title: str
    note: str
    columns: tuple[Column, ...]
    rows: tuple[dict[str, Cell], ...]


@dataclasses.dataclass(frozen=True)
class Figure:
    """A picture.

    Attributes:
      name: of the file, without its ending.
      title: what it is; also what is read out in its place.
      note: below it.
      png: the file.
    """

    name: str
    title: str
    note: str
    png: bytes


@dataclasses.dataclass(frozen=True)
class Heading:
    """The title of a section."""

    text: str


@dataclasses.dataclass(frozen=True)
class Paragraph:
    """Sentences; what stands between backticks is code."""

    text: str


@dataclasses.dataclass(frozen=True)
class Bullets:
    """A list of such, or of nothing.

    Attributes:
      lines: its points.
      empty: what is said if there are none.
    """

    lines: tuple[str, ...]
    empty: str


Block = Heading | Paragraph | Bullets | Table | Figure


@dataclasses.dataclass(frozen=True)
class Document:
    """A whole report."""

    title: str
    blocks: tuple[Block, ...]


def shown(cell: Cell, form: str) -> str:
    """A cell as people read it."""
    if isinstance(cell, str):
        return cell or "-"
    return "missing" if math.isnan(cell) else format(cell, form)


def cells(table: Table, row: dict[str, Cell]) -> list[str]:
    """A row as people read it."""
    return [shown(row.get(column.key, math.nan), column.form) for column in table.columns]
