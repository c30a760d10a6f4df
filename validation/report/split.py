"""Points of models split over ranks (``validation/results/ranks``): all-reduces, bytes of a rank, whole steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kvsim.hardware import find_hardware
from validation.latency.links import STOCK, all_reduce, parts, rank_nbytes, reduced
from validation.report.collection import Collection, Point

STEPS = {
    "engine": "engine, several cards",
    "engine without all-reduces": "engine, several cards, silent",
}
"""The claim of each way of which one is made."""


def split(file: dict[str, Any], name: str, found: Collection, _: object) -> None:
    """Rows of ``validation all-reduce`` and ``validation tensor-parallel``."""
    source = f"ranks/{name}"
    for row in file["rows"]:
        kind = f"{row['kind']} ({row['device']})"
        if "failed" in row:
            found.leave(kind, "the measurement failed")
        elif row["kind"] == "step":
            found.take(_step(row, source))
            if row["method"] == STOCK or row["way"] not in STEPS:
                found.leave(f"{kind}, {row['way']} with {row['method']}", "no claim is made of its time")
        elif row["way"] == "graph":
            factors = {"what": f"{row['nbytes']:,} B", "card": _card(row), "ranks": _ranks(row)}
            middle, low, high = row["seconds"]
            found.take([Point("all-reduces", all_reduce(row), middle, factors, source, {}, (low, high))])
        else:
            found.leave(f"{kind}, launched one by one", "kvsim predicts those of a step's graph")
    for row, seconds in reduced([row for row in file["rows"] if "failed" not in row]):
        predicted = parts(row)["communication"]
        found.points.append(Point("all-reduces of a step", predicted, seconds, _factors(row), source))


def _step(row: dict[str, Any], source: str) -> Iterator[Point]:
    """Bytes of this project's cache on a rank, and the step where a claim is made of it."""
    if row["method"] == STOCK:
        return
    factors = _factors(row)
    yield Point("bytes of a rank", float(rank_nbytes(row)), float(row["nbytes"]), factors, source)
    if row["way"] not in STEPS:
        return
    middle, low, high = row["seconds_per_step"]
    predicted = parts(row)
    yield Point(STEPS[row["way"]], sum(predicted.values()), middle, factors, source, predicted, (low, high))


def _factors(row: dict[str, Any]) -> dict[str, str]:
    return {
        "model": row["model"],
        "method": row["method"],
        "size": f"{row['batch_size']} x {row['num_tokens']:,}",
        "rows": f"{row['batch_size']} rows",
        "card": _card(row),
        "ranks": _ranks(row),
        "way": row["way"],
    }


def _card(row: dict[str, Any]) -> str:
    return find_hardware(row["device"]).id


def _ranks(row: dict[str, Any]) -> str:
    return f"{row['ranks']} ranks"
