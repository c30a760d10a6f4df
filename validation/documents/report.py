"""The report: Markdown with pictures beside it, and one HTML file with everything in it."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from html import escape
from typing import Any

from kvsim.output.tables import compact
from validation.claims.compare import stale
from validation.documents import tables

Row = dict[str, Any]

SECTIONS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("claims", "Predicted against measured", ("agreement",)),
    ("memory", "Bytes held, by method", ("lengths",)),
    ("peak", "Peaks", ("peaks",)),
    ("speed", "Speed (recorded, not predicted)", ("speed",)),
    ("quality", "Quality (recorded, not predicted)", ("quality",)),
)

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; font-size: 13px }
td, th { padding: .2rem .6rem; border-bottom: 1px solid #ddd; text-align: left }
td.number { text-align: right; font-variant-numeric: tabular-nums }
img { max-width: 100%; display: block; margin: 1rem 0 }
.scroll { overflow-x: auto } .bad { color: #a00 }
"""


def markdown(rows: Sequence[Row], pictures: Sequence[str]) -> str:
    """The report as Markdown, with links to ``<picture>.png``."""
    out = ["# Validation", *(f"* {line}" for line in machines(rows)), verdict(rows)]
    for name, heading, shown in SECTIONS:
        table = table_of(name, rows)
        if table[1]:
            out += [f"## {heading}", *(f"![{picture}]({picture}.png)" for picture in shown if picture in pictures)]
            out.append(compact(*table))
    return "\n\n".join(out) + "\n"


def html(rows: Sequence[Row], pictures: dict[str, bytes]) -> str:
    """The report as one HTML page that loads nothing."""
    bad = ' class="bad"' if stale(rows) else ""
    items = "".join(f"<li>{escape(line)}</li>" for line in machines(rows))
    out = [f"<h1>Validation</h1><ul>{items}</ul><p{bad}>{escape(verdict(rows))}</p>"]
    for name, heading, shown in SECTIONS:
        table = table_of(name, rows)
        if table[1]:
            out.append(f"<h2>{escape(heading)}</h2>")
            for picture in shown:
                if picture in pictures:
                    out.append(
                        f'<img alt="{picture}" src="data:image/png;base64,{b64encode(pictures[picture]).decode()}">'
                    )
            out.append(html_table(table))
    head = f'<meta charset="utf-8"><title>Validation</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(out)}</body></html>\n'


def html_table(table: tables.Table) -> str:
    """A table that scrolls by itself."""

    def cell(text: str) -> str:
        number = ' class="number"' if text[:1] in "0123456789+-" and text else ""
        return f"<td{number}>{escape(text)}</td>"

    head, body = table
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = "".join(f"<tr>{''.join(map(cell, line))}</tr>" for line in body)
    return f'<div class="scroll"><table><tr>{top}</tr>{lines}</table></div>'


def table_of(name: str, rows: Sequence[Row]) -> tables.Table:
    """The section's table."""
    make = {
        "claims": tables.claims_table,
        "memory": tables.memory_table,
        "peak": tables.peak_table,
        "speed": tables.speed_table,
        "quality": tables.quality_table,
    }
    return make[name](rows)


def machines(rows: Sequence[Row]) -> list[str]:
    """One line a device, version set and commit."""
    out: dict[str, None] = {}
    for row in rows:
        versions = ", ".join(f"{name} {value}" for name, value in row["versions"].items())
        driver = f", driver {row['driver']}" if row.get("driver") else ""
        out[f"{row['device_name']}{driver}; {versions}; commit {(row['commit'] or 'unknown')[:12]}"] = None
    return list(out)


def verdict(rows: Sequence[Row]) -> str:
    """One sentence on whether today's kvsim still says what was recorded."""
    problems = stale(rows)
    if not problems:
        return f"All {len(rows)} recorded rows agree with today's predictions."
    return f"{len(problems)} of {len(rows)} recorded rows do not agree with today's predictions: " + "; ".join(
        problems[:5]
    )
