"""The page's pieces of HTML: tables to take along, figures, sections, lists."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from io import StringIO
from typing import Any, NamedTuple
from urllib.parse import quote

from kvsim.output.rows_file import to_csv

GIB, MIB = 1 << 30, 1 << 20
COPY = '<button type="button" class="copy">Copy</button>'


def amount(nbytes: float) -> str:
    """``1.25 GiB`` or ``3.1 MiB``."""
    if not nbytes:
        return "0"
    if nbytes < MIB / 10:
        return f"{nbytes / 1024:,.2f} KiB"
    return f"{nbytes / GIB:,.2f} GiB" if nbytes >= 1000 * MIB else f"{nbytes / MIB:,.2f} MiB"


def table(
    caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]], note: str = "", words: bool = False
) -> str:
    """An HTML table, on a narrow screen a card a row; the first column names the row.

    Below it a button that copies it, and the same as CSV and JSON, within the page.  ``words``: its cells are texts,
    flush left, and may be broken over lines.
    """
    rows = list(rows)
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heads)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(
            f'<td data-head="{escape(name)}">{escape(cell)}</td>' for name, cell in zip(heads[1:], row[1:], strict=True)
        )
        + "</tr>"
        for row in rows
    )
    after = f'<p class="note">{escape(note)}</p>' if note else ""
    title, kind = escape(caption), ' class="words"' if words else ""
    return (
        f'<div class="data"><div class="scroll" tabindex="0" role="region" aria-label="{title}">'
        f"<table{kind}><caption>{title}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        f"{_tools(caption, heads, rows)}</div>{after}"
    )


def _tools(caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The button, and links to the table as two files that lie in the page itself."""
    lines = StringIO()
    csv.writer(lines, lineterminator="\n").writerows([heads, *rows])
    records = [dict(zip(heads, row, strict=True)) for row in rows]
    return f'<div class="tools">{COPY}{_files(caption, lines.getvalue(), records)}</div>'


def _files(caption: str, as_csv: str, as_json: Any) -> str:
    name = re.sub(r"[^a-z0-9]+", "-", caption.lower()).strip("-") or "table"
    kinds = (("csv", "text/csv", as_csv), ("json", "application/json", json.dumps(as_json, indent=1)))
    return "".join(
        f'<a download="{name}.{kind}" href="data:{media};charset=utf-8,{quote(text)}">{kind.upper()}</a>'
        for kind, media, text in kinds
    )


def all_figures(caption: str, document: Mapping[str, Any]) -> str:
    """Links to an answer's rows in bytes and seconds (CSV), and to the whole answer (JSON)."""
    files = _files(caption, to_csv(document["rows"]), document)
    return f'<p class="tools">Every figure, unrounded: {files}</p>'


class Figure(NamedTuple):
    """A large figure, and what it is."""

    figure: str
    what: str


def answers(blocks: Sequence[tuple[str, Sequence[Figure]]], colours: Sequence[int] | None = None) -> str:
    """The first thing that is seen: a block a method with its large figures; ``colours``: as in the charts."""
    out = []
    for (name, figures), place in zip(blocks, colours or range(len(blocks)), strict=True):
        said = "".join(f"<p><b>{escape(figure)}</b>{escape(what)}</p>" for figure, what in figures)
        out.append(f'<div class="answer c{place % 8}"><h2>{escape(name)}</h2><div class="figures">{said}</div></div>')
    return f'<div class="answers">{"".join(out)}</div>'


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """What was asked, small."""
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(said)}</dd></div>" for name, said in pairs)
    return f'<dl class="facts">{items}</dl>'


def paragraph(words: str, kind: str) -> str:
    return f'<p class="{kind}">{escape(words)}</p>'


def listed(lines: Iterable[str]) -> str:
    """Notes as a list; nothing where there are none."""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<ul class="notes">{items}</ul>' if items else ""


def beside(one: str, other: str) -> str:
    """Two pieces side by side, where the screen is wide."""
    return f'<div class="pair"><div>{one}</div><div>{other}</div></div>'


def section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"
