"""The one printer of tables: aligned Markdown for a terminal, compact Markdown for documents."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from textwrap import wrap

NUMERAL = "+-0123456789"
"""What the text of a number begins with."""


def table(
    heads: Sequence[str], rows: Iterable[Sequence[str]], left: Collection[int] | None = (0,), most: int | None = None
) -> str:
    """A Markdown table with aligned columns: those numbered in ``left`` flush left, the others right.

    None sends columns that hold a number right.  Where the terminal, or ``most``, is narrower than the table, columns
    that have no room follow in further tables, each with the first column.
    """
    lines = _full(heads, rows)
    widths = [max(3, width) for width in _widths(lines)]
    right = _numbers(lines, any) if left is None else [column not in left for column in range(len(heads))]
    rule = ["-" * (width - flag) + ":" * flag for width, flag in zip(widths, right, strict=True)]
    padded = _padded([lines[0], rule, *lines[1:]], widths, right)
    return "\n\n".join(
        "\n".join("| " + " | ".join(cells[column] for column in columns) + " |" for cells in padded)
        for columns in _fitting(widths, min(filter(None, (most, terminal_width())), default=None))
    )


def terminal_width() -> int | None:
    """Columns of the terminal, or of ``COLUMNS``; ``None`` where the output goes to a file or a pipe."""
    told = os.environ.get("COLUMNS", "")
    if told.isdigit() and int(told):
        return int(told)
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def fitted(text: str) -> str:
    """A screen with its prose broken at the terminal's width, at words, further lines indented; tables stand."""
    width = terminal_width()
    if width is None:
        return text
    return "\n".join(line if line.startswith("|") else _broken(line, width) for line in text.split("\n"))


def _broken(line: str, width: int) -> str:
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    out = wrap(line, max(width, 20), subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return "\n".join(out) if len(line) > width else line


def _fitting(widths: Sequence[int], most: int | None) -> list[list[int]]:
    """Which columns stand in one table: as many as ``most`` characters hold, the first in every one."""
    if most is None or len(widths) < 2:
        return [list(range(len(widths)))]
    out = [[0, 1]]
    for column in range(2, len(widths)):
        if 4 + sum(widths[each] + 3 for each in (*out[-1], column)) - 3 > most:
            out.append([0])
        out[-1].append(column)
    return out


def compact(heads: Sequence[str], rows: Iterable[Sequence[str]], left: Collection[int] | None = None) -> str:
    """A Markdown table without padding: ``left`` as in :func:`table`; None sends columns of numbers alone right."""
    lines = _full(heads, rows)
    right = _numbers(lines, all) if left is None else [column not in left for column in range(len(heads))]
    rule = ["---:" if flag else "---" for flag in right]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [lines[0], rule, *lines[1:]])


def plain(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """:func:`table` of measurements: a column that holds a number goes right.  A row may end early."""
    return table(heads, rows, None)


def _full(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[list[str]]:
    """Head and rows, each as long as the head.  Raises ``ValueError`` for a longer row."""
    lines = [list(heads), *([*row, *[""] * (len(heads) - len(row))] for row in rows)]
    wrong = next((line for line in lines if len(line) > len(heads)), None)
    if wrong is not None:
        raise ValueError(f"a row of {len(wrong)} cells under {len(heads)} heads: {wrong}")
    return lines


def _widths(lines: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*lines, strict=True)]


def _numbers(lines: Sequence[Sequence[str]], how: Callable[[Iterable[bool]], bool]) -> list[bool]:
    """Of each column, whether ``how`` (any, all) many of its cells are numbers; empty cells say nothing."""
    return [
        len(lines) > 1 and how(cell[0] in NUMERAL for cell in column[1:] if cell) for column in zip(*lines, strict=True)
    ]


def _padded(lines: Iterable[Sequence[str]], widths: Sequence[int], right: Sequence[bool]) -> list[list[str]]:
    put = (str.ljust, str.rjust)
    return [[put[flag](cell, width) for cell, width, flag in zip(line, widths, right, strict=True)] for line in lines]
