"""A long table in a page that a reader sorts, searches and filters there, without a network.

It is all there without its script. On a narrow screen every row is a card with the columns' names in it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .document import escaped, isolated


@dataclass(frozen=True)
class Column:
    name: str
    width: int  # in per cent of the table
    text: bool = False


@dataclass(frozen=True)
class Row:
    """As many cells as there are columns: pieces of text, each of a direction of its own, or a number and its text."""

    kind: str  # to filter by
    cells: Sequence[Sequence[str] | tuple[float | None, str]]
    more: str = ""  # shown on a click, below the first text
    bad: bool = False  # to be seen at a glance


def listing(columns: Sequence[Column], rows: Sequence[Row], what: str) -> str:
    """The table with what sorts and filters it, as HTML for `Markup`; `what` are the rows' things, as "edits".

    The page needs `style(columns)` and SCRIPT.
    """
    kinds: dict[str, int] = {}
    for row in rows:
        kinds[row.kind] = kinds.get(row.kind, 0) + 1
    options = "".join(f'<option value="{escaped(k)}">{escaped(k)} ({count})</option>' for k, count in kinds.items())
    heads = "".join(
        f'<th scope="col"{_class(column)}><button type="button">{escaped(column.name)}</button></th>'
        for column in columns
    )
    body = "\n".join(_row(columns, row) for row in rows)
    return (
        '<form class="find" role="search">'
        '<label>Search <input type="search" id="words" autocomplete="off"></label> '
        f'<label>Show <select id="kind"><option value="">all ({len(rows)})</option>{options}</select></label> '
        f'<output id="shown" data-what="{escaped(what)}">{len(rows)} {escaped(what)}</output></form>\n'
        f'<table class="list">\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>'
    )


def style(columns: Sequence[Column]) -> str:
    """Of a page with such a table."""
    widths = "".join(f".list th:nth-child({i}) {{ width: {column.width}%; }}\n" for i, column in enumerate(columns, 1))
    names = "".join(
        f'.list td:nth-child({i})::before {{ content: "{column.name}"; }}\n' for i, column in enumerate(columns, 1)
    )
    return f"{_STYLE}{widths}@media (max-width: 60rem) {{\n{_NARROW}{names}}}\n"


def _row(columns: Sequence[Column], row: Row) -> str:
    cells = []
    more = f"<details><summary>more</summary>{isolated(row.more)}</details>" if row.more else ""
    for column, cell in zip(columns, row.cells, strict=True):
        match cell:
            case (float() | int() | None as value, str(text)):
                number = "" if value is None or not math.isfinite(value) else f"{value:.6g}"
                cells.append(f'<td data-v="{number}"{_class(column)}>{escaped(text)}</td>')
            case _:
                cells.append(f"<td{_class(column)}>{' '.join(isolated(str(part)) for part in cell)}{more}</td>")
                more = ""
    bad = ' class="bad"' if row.bad else ""
    return f'<tr data-kind="{escaped(row.kind)}"{bad}>{"".join(cells)}</tr>'


def _class(column: Column) -> str:
    return ' class="text"' if column.text else ""


_STYLE = """\
[hidden] { display: none !important; }
.find { display: flex; flex-wrap: wrap; gap: 0.5rem 1.5rem; align-items: baseline; margin: 1rem 0; }
input, select, .list button { font: inherit; color: inherit; background: var(--paper); }
input, select { border: 1px solid var(--rule); padding: 0.2rem 0.4rem; max-width: 100%; }
.list { table-layout: fixed; width: 100%; }
.list th, .list td { padding: 0.3rem 0.4rem; overflow-wrap: anywhere; }
.list .bad td:first-child { border-left: 4px solid var(--bad); }
.list td.text { white-space: pre-wrap; }
.list button { border: 0; padding: 0; font-weight: bold; text-align: inherit; cursor: pointer; }
.list button::after { content: " \\2195"; color: var(--faint); }
.list [aria-sort=ascending] button::after { content: " \\2191"; }
.list [aria-sort=descending] button::after { content: " \\2193"; }
"""

_NARROW = """\
.list, .list thead, .list tbody { display: block; }
.list thead tr { display: flex; flex-wrap: wrap; gap: 0.5rem; }
.list thead th { width: auto !important; border: 1px solid var(--line); }
.list tbody tr { display: grid; grid-template-columns: 1fr 1fr; padding: 0.5rem 0; }
.list tbody tr { border-bottom: 2px solid var(--rule); content-visibility: auto; contain-intrinsic-size: auto 22rem; }
.list td { border: 0; text-align: left; padding: 0.15rem 0.5rem; }
.list td.text { grid-column: 1 / 3; }
.list td::before { display: block; color: var(--faint); font-size: 0.75rem; }
"""

SCRIPT = """
const list = document.querySelector("table.list"), body = list.tBodies[0], rows = [...body.rows];
const heads = [...list.tHead.rows[0].cells], texts = new Map(), order = new Intl.Collator();
const [words, kind, shown] = ["words", "kind", "shown"].map(id => document.getElementById(id));
const fold = text => text.normalize("NFKC").toLowerCase();
const value = cell => cell.dataset.v === undefined ? cell.textContent : cell.dataset.v === "" ? null : +cell.dataset.v;
function compare(a, b, sign) {
  if (a === null || b === null) return (a === null) - (b === null);
  return sign * (typeof a === "string" ? order.compare(a, b) : a - b);
}
heads.forEach((head, i) => head.firstElementChild.addEventListener("click", () => {
  const down = head.getAttribute("aria-sort") === "ascending";
  heads.forEach(other => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const keyed = rows.map(row => [value(row.cells[i]), row]).sort(([a], [b]) => compare(a, b, down ? -1 : 1));
  body.append(...keyed.map(([, row]) => row));
}));
function filter() {
  const wanted = fold(words.value);
  let count = 0;
  for (const row of rows) {
    if (!texts.has(row)) texts.set(row, fold(row.textContent));
    row.hidden = (kind.value !== "" && row.dataset.kind !== kind.value) || !texts.get(row).includes(wanted);
    count += !row.hidden;
  }
  shown.value = `${count} of ${rows.length} ${shown.dataset.what}`;
}
words.addEventListener("input", filter);
kind.addEventListener("change", filter);
words.form.addEventListener("submit", event => event.preventDefault());
"""
"""What sorts and filters the table of a page; rows without a number come last, whichever way it is sorted."""
