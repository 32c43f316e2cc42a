"""A document as Markdown, as one HTML page that needs nothing else, and its tables as CSV."""

import base64
import csv
import html
import io
import re

from experiments.report.document import Block, Bullets, Document, Figure, Heading, Paragraph, Table, cells

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; }
body { margin: 2rem auto; max-width: 90rem; padding: 0 1rem; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.3rem; margin-top: 2.5rem; border-bottom: 1px solid #ccc; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.85rem; margin: 0.5rem 0; }
caption { text-align: left; font-weight: 600; padding: 0.3rem 0; white-space: nowrap; }
th, td { border: 1px solid #d5d5d5; padding: 0.25rem 0.5rem; text-align: left; vertical-align: top; }
th { background: #f3f3f3; vertical-align: bottom; } .number { text-align: right; font-variant-numeric: tabular-nums; }
.long { min-width: 15rem; overflow-wrap: anywhere; } td.short { white-space: nowrap; }
.missing { color: #a33; font-style: italic; }
figure { margin: 1rem 0 2rem; } img { max-width: 100%; height: auto; }
figcaption, .note { color: #555; font-size: 0.85rem; max-width: 60rem; }
code { font-size: 0.9em; background: #f3f3f3; padding: 0 0.2em; overflow-wrap: anywhere; }
"""


def markdown(document: Document) -> str:
    """For reading where the files lie; pictures and CSV files lie beside it."""
    parts = [f"# {document.title}"]
    for block in document.blocks:
        parts.append(_markdown(block))
    return "\n\n".join(parts) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Heading(text):
            return f"## {text}"
        case Paragraph(text):
            return text
        case Bullets(lines, empty):
            return "\n".join(f"- {line}" for line in lines) or empty
        case Figure():
            return f"![{block.title}]({block.name}.png)\n\n{block.title}. {block.note}".rstrip()
        case Table():
            heads = [_row([column.title for column in block.columns]), _row(["---"] * len(block.columns))]
            rows = [_row(cells(block, row)) for row in block.rows]
            parts = [f"**{block.title}** ([CSV]({block.name}.csv))", "", *heads, *rows, "", block.note]
            return "\n".join(parts).rstrip()


def _row(texts: list[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|").replace("\n", " ") for text in texts) + " |"


def page(document: Document) -> str:
    """One HTML page: style and pictures are in it, and nothing is fetched."""
    title = html.escape(document.title)
    body = "\n".join(_html(block) for block in document.blocks)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n{body}\n</body>\n</html>\n"
    )


def _html(block: Block) -> str:
    match block:
        case Heading(text):
            return f"<h2>{_inline(text)}</h2>"
        case Paragraph(text):
            return f"<p>{_inline(text)}</p>"
        case Bullets(lines, empty):
            points = "".join(f"<li>{_inline(line)}</li>" for line in lines)
            return f"<ul>{points}</ul>" if points else f"<p>{_inline(empty)}</p>"
        case Figure():
            source = f"data:image/png;base64,{base64.b64encode(block.png).decode('ascii')}"
            return (
                f'<figure><img src="{source}" alt="{html.escape(block.title)}">'
                f"<figcaption>{_inline(block.title)}. {_inline(block.note)}</figcaption></figure>"
            )
        case Table():
            return (
                f'<div class="wide"><table><caption>{_inline(block.title)}</caption>\n{_rows(block)}</table></div>\n'
                f'<p class="note">{_inline(block.note)}</p>'
            )


def _rows(table: Table) -> str:
    rows = [cells(table, row) for row in table.rows]
    kinds = [_kind([row[place] for row in rows]) for place in range(len(table.columns))]
    heads = "".join(
        f'<th class="{kind}">{_inline(column.title)}</th>' for kind, column in zip(kinds, table.columns, strict=True)
    )
    body = ""
    for row in rows:
        shown = zip(kinds, row, strict=True)
        body += f"<tr>{''.join(_cell(kind, text) for kind, text in shown)}</tr>\n"
    return f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}</tbody>"


def _kind(column: list[str]) -> str:
    """How a column is set: numbers to the right; long texts wrap, short ones do not."""
    said = [text for text in column if not text.startswith(("missing", "-")) or re.match(r"-\d", text)]
    if all(re.fullmatch(r"[-+]?[\d.,]+(e[-+]\d+)?", text) for text in said):
        return "number"
    return "long" if max(map(len, said)) > 30 else "short"


def _cell(kind: str, text: str) -> str:
    return f'<td class="{kind}{" missing" if text.startswith("missing") else ""}">{_inline(text)}</td>'


def _inline(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))


def table_csv(table: Table) -> str:
    """All cells of a table in full precision, those that are not shown as well; what is missing is empty."""
    file = io.StringIO()
    names = [column.key for column in table.columns]
    names += [name for row in table.rows for name in row if name not in names]
    writer = csv.DictWriter(file, list(dict.fromkeys(names)), restval="", lineterminator="\n")
    writer.writeheader()
    for row in table.rows:
        writer.writerow({name: "" if cell != cell else cell for name, cell in row.items()})
    return file.getvalue()
