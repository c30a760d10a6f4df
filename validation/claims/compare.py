"""Rows and kvsim side by side: predicted | measured | error, and what no longer agrees with today's predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from validation.claims.predict import measured_trace, predict, predicted_trace

Row = dict[str, Any]


COUNTERS = {"live": "live tensors", "allocated": "allocator's blocks", "requested": "asked of the allocator"}
"""What a counter counts, in a table's words."""


@dataclass(frozen=True)
class Line:
    """Rows of one claim together.  ``weighings``: how many figures were compared; ``low``, ``high``: their errors."""

    claim: str
    rows: int
    weighings: int
    low: float
    high: float
    worst_nbytes: int


def deviations(row: Row) -> list[int]:
    """``measured - predicted`` in the row's unit at everything that it compares, by today's predictions."""
    if "trace" in row:
        pairs = zip(measured_trace(row), predicted_trace(row), strict=True)
        return [measured - predicted for (_, measured), (_, predicted) in pairs]
    predicted = predict(row)
    return [] if predicted is None else [row["measured"] - predicted]


def claim(row: Row) -> str:
    """The words that a table has for the row's kind."""
    where = {"layers": "layers alone", "generate": "generate()"}.get(row.get("way", ""), "")
    if row["kind"] == "memory":
        return f"bytes held, unique storages, {where}"
    what = "bytes held" if row["kind"] == "held" else f"peak during {row['phase']}"
    return f"{what}, {COUNTERS[row['counter']]}, {where}"


def summary(rows: Sequence[Row]) -> list[Line]:
    """One line a claim over the rows that have a prediction."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row["predicted"] is not None:
            groups.setdefault(claim(row), []).append(row)
    out = []
    for name, group in groups.items():
        off = [deviation for row in group for deviation in deviations(row)]
        errors = [row["error"] for row in group]
        out.append(Line(name, len(group), len(off), min(errors), max(errors), max(off, key=abs)))
    return out


def stale(rows: Sequence[Row]) -> list[str]:
    """One line for every row that today's kvsim predicts otherwise, or whose cache does not hold what it predicts."""
    out = []
    for row in rows:
        predicted = predict(row)
        if predicted != row["predicted"]:
            out.append(f"{row['task']}: recorded prediction {row['predicted']}, today {predicted}: measure it again")
        elif row["kind"] == "memory":
            wrong = [off for off in deviations(row) if off]
            if wrong:
                out.append(f"{row['task']}: {len(wrong)} weighings off, by up to {max(wrong, key=abs):+,} B")
    return out
