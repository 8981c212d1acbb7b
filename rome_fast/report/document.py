"""A document of headings, text, tables and pictures, and its two forms: Markdown, and HTML in one file."""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from ..runs.terminal import visible

_STYLE = """\
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: 0.875rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.75rem; text-align: right; border-bottom: 1px solid #ddd; vertical-align: top; }
th { vertical-align: bottom; border-bottom: 2px solid #888; }
.text { text-align: left; }
figure { margin: 1.5rem 0; } figcaption { color: #555; font-size: 0.875rem; }
img { display: block; width: 100%; min-width: 640px; }
details .wide { max-height: 80vh; }
details th { position: sticky; top: 0; background: #fff; }
details td { white-space: nowrap; }
summary { cursor: pointer; }"""


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Bullets:
    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]  # as many cells each as there are columns; "" where nothing was measured
    texts: int = 1  # that many columns, from the left, hold text; the others hold numbers


@dataclass(frozen=True)
class Picture:
    file: str  # relative to the document
    png: bytes
    caption: str


@dataclass(frozen=True)
class Folded:
    """A table that is too long for Markdown, and that HTML shows on a click."""

    title: str
    table: Table


Block = Heading | Text | Bullets | Table | Picture | Folded


def to_markdown(title: str, blocks: Sequence[Block]) -> str:
    """The document with its pictures as links to their files, and without what is folded."""
    parts = [f"# {_plain(title)}", *(_markdown(block) for block in blocks if not isinstance(block, Folded))]
    return "\n\n".join(parts) + "\n"


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """The document as one file that needs no other, with everything in it escaped."""
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_escaped(title)}</title>",
            f"<style>\n{_STYLE}\n</style>",
            f"<h1>{_escaped(title)}</h1>",
            *(_html(block) for block in blocks),
            "</html>\n",
        ]
    )


def _markdown(block: Block) -> str:
    match block:
        case Heading(text):
            return f"## {_plain(text)}"
        case Text(text):
            return _plain(text)
        case Bullets(items):
            return "\n".join(f"- {_plain(item)}" for item in items)
        case Picture(file, _, caption):
            return f"![{_plain(caption)}]({file})\n\n{_plain(caption)}"
        case Table(columns, rows, texts):
            rule = ["---" if i < texts else "---:" for i in range(len(columns))]
            cells = [[_plain(cell) for cell in row] for row in (columns, *rows)]
            return "\n".join(f"| {' | '.join(line)} |" for line in (cells[0], rule, *cells[1:]))
        case Folded():
            return ""


def _plain(text: str) -> str:
    """Text on one line, with nothing in it that Markdown would take for markup."""
    return re.sub(r"([\\`*_<>|\[\]#&~$])", r"\\\1", visible(" ".join(text.split())))


def _html(block: Block) -> str:
    match block:
        case Heading(text):
            return f"<h2>{_escaped(text)}</h2>"
        case Text(text):
            return f"<p>{_escaped(text)}</p>"
        case Bullets(items):
            return "<ul>\n" + "\n".join(f"<li>{_escaped(item)}</li>" for item in items) + "\n</ul>"
        case Picture(_, png, caption):
            data = base64.b64encode(png).decode("ascii")
            image = f'<div class="wide"><img src="data:image/png;base64,{data}" alt="{_escaped(caption)}"></div>'
            return f"<figure>\n{image}\n<figcaption>{_escaped(caption)}</figcaption>\n</figure>"
        case Table(columns, rows, texts):
            head = _html_row("th", columns, texts)
            body = "\n".join(_html_row("td", row, texts) for row in rows)
            return f'<div class="wide"><table>\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'
        case Folded(title, table):
            return f"<details>\n<summary>{_escaped(title)}</summary>\n{_html(table)}\n</details>"


def _escaped(text: str) -> str:
    return escape(visible(text))


def _html_row(tag: str, cells: Sequence[str], texts: int) -> str:
    shown = (
        f'<{tag} class="text">{_escaped(cell)}</{tag}>' if i < texts else f"<{tag}>{_escaped(cell)}</{tag}>"
        for i, cell in enumerate(cells)
    )
    return f"<tr>{''.join(shown)}</tr>"
