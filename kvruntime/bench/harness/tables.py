"""Rows as plain tables."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from kvruntime.bench.harness.results import Row

BASE = ("fp16", "bf16", "fp32")


def groups(rows: Iterable[Row], kind: str) -> list[list[Row]]:
    """The finished rows of one kind, those of one model, weights, dtype, seed and setting together."""
    setting = ("prompt_tokens", "decode_tokens", "text_sha256", "window", "chunk", "num_windows")
    names = ("model", "weights", "model_sha256", "dtype", "seed", *setting)
    out: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["kind"] == kind and "failed" not in row:
            out.setdefault(tuple(row.get(name) for name in names), []).append(row)
    return list(out.values())


def baseline(row: Row, group: Iterable[Row], *same: str) -> Row | None:
    """The uncompressed row of ``group`` that agrees with ``row`` in the fields ``same``."""
    return next((b for b in group if b["method"] in BASE and all(b[name] == row[name] for name in same)), None)


def ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def aligned(head: list[str], body: list[list[str]]) -> str:
    """Columns two blanks apart, text to the left, numbers to the right."""
    lines = [head, *([*cells, *[""] * (len(head) - len(cells))] for cells in body)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    numbers = [any(line[column][:1] in DIGITS for line in lines[1:] if line[column]) for column in range(len(head))]

    def put(cell: str, width: int, number: bool) -> str:
        return cell.rjust(width) if number else cell.ljust(width)

    return "\n".join("  ".join(map(put, line, widths, numbers)).rstrip() for line in lines)


DIGITS = "+-0123456789"
