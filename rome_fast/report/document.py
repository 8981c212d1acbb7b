"""A document of headings, text, tables and pictures, and its two forms: Markdown, and HTML in one file."""

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from ..runs.terminal import visible

_STYLE = """\
:root { color-scheme: light dark; --ink: #222; --paper: #fff; --faint: #555; --line: #ddd; --rule: #888; }
@media (prefers-color-scheme: dark) {
:root { --ink: #e4e4e4; --paper: #17191c; --faint: #aaa; --line: #3a3d42; --rule: #777; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); }
body { max-width: 1100px; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; }
h1, p, li, summary { overflow-wrap: anywhere; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: 0.875rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.75rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top; }
th { vertical-align: bottom; border-bottom: 2px solid var(--rule); }
.text { text-align: left; }
figure { margin: 1.5rem 0; } figcaption { color: var(--faint); font-size: 0.875rem; }
img { display: block; width: 100%; min-width: 640px; background: #fff; }
details .wide { max-height: 80vh; }
details th { position: sticky; top: 0; background: var(--paper); }
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


@dataclass(frozen=True)
class Markup:
    """HTML made elsewhere, with everything in it escaped there; Markdown goes without it."""

    html: str


Block = Heading | Text | Bullets | Table | Picture | Folded | Markup


def to_markdown(title: str, blocks: Sequence[Block]) -> str:
    """The document with its pictures as links to their files, and without what is folded or of HTML only."""
    parts = [f"# {_plain(title)}", *(_markdown(block) for block in blocks if not isinstance(block, Folded | Markup))]
    return "\n\n".join(parts) + "\n"


def to_html(title: str, blocks: Sequence[Block], *, style: str = "", script: str = "") -> str:
    """The document as one file that needs no other, with everything in it escaped.

    `style` comes behind that of all documents, `script` runs when all is there. With a script, the page lets the
    browser run no other, nor fetch anything, whatever else it were to hold.
    """
    css = f"\n{_STYLE}\n{style}"
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            '<meta charset="utf-8">',
            *([_policy(css, script)] if script else []),
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escaped(title)}</title>",
            f"<style>{css}</style>",
            "<main>",
            f"<h1>{escaped(title)}</h1>",
            *(_html(block) for block in blocks),
            "</main>",
            *([f"<script>{script}</script>"] if script else []),
            "</html>\n",
        ]
    )


def escaped(text: str) -> str:
    """Text for HTML, also for attributes, with what would turn the direction of what follows spelled out."""
    return escape(visible(text))


def isolated(text: str) -> str:
    """The same as an element of its own direction, for text in any script beside other text."""
    return f"<bdi>{escaped(text)}</bdi>"


def _policy(style: str, script: str) -> str:
    """What the browser may use: this style and this script, to the byte, and pictures in the page itself."""
    hashes = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii") for text in (style, script))
    allowed = "default-src 'none'; img-src data:; style-src 'sha256-{}'; script-src 'sha256-{}'".format(*hashes)
    return f'<meta http-equiv="Content-Security-Policy" content="{allowed}">'


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
        case Folded() | Markup():
            return ""


def _plain(text: str) -> str:
    """Text on one line, with nothing in it that Markdown would take for markup."""
    return re.sub(r"([\\`*_<>|\[\]#&~$])", r"\\\1", visible(" ".join(text.split())))


def _html(block: Block) -> str:
    match block:
        case Heading(text):
            return f"<h2>{escaped(text)}</h2>"
        case Text(text):
            return f"<p>{escaped(text)}</p>"
        case Bullets(items):
            return "<ul>\n" + "\n".join(f"<li>{escaped(item)}</li>" for item in items) + "\n</ul>"
        case Picture(_, png, caption):
            data = base64.b64encode(png).decode("ascii")
            image = f'<img src="data:image/png;base64,{data}" alt="{escaped(caption)}">'
            return f"<figure>\n{_wide(image)}\n<figcaption>{escaped(caption)}</figcaption>\n</figure>"
        case Table(columns, rows, texts):
            head = _html_row("th", columns, texts)
            body = "\n".join(_html_row("td", row, texts) for row in rows)
            return _wide(f"<table>\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>\n</table>")
        case Markup(html):
            return html
        case Folded(title, table):
            return f"<details>\n<summary>{escaped(title)}</summary>\n{_html(table)}\n</details>"


def _wide(html: str) -> str:
    """What may be wider than the page, in a box that scrolls, also by the keyboard."""
    return f'<div class="wide" tabindex="0">{html}</div>'


def _html_row(tag: str, cells: Sequence[str], texts: int) -> str:
    shown = (
        f'<{tag} class="text">{escaped(cell)}</{tag}>' if i < texts else f"<{tag}>{escaped(cell)}</{tag}>"
        for i, cell in enumerate(cells)
    )
    return f"<tr>{''.join(shown)}</tr>"
