"""Rows as tables: a head and cells, for :mod:`kvsim.output.tables` to print."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from validation.claims.compare import summary

Row = dict[str, Any]
Table = tuple[list[str], list[list[str]]]


def claims_table(rows: Sequence[Row]) -> Table:
    """predicted | measured | error, one line a claim."""
    head = ["claim", "rows", "figures compared", "worst, B", "error, lowest", "error, highest"]
    body = [
        [
            line.claim,
            f"{line.rows}",
            f"{line.weighings:,}",
            f"{line.worst_nbytes:+,}",
            percent(line.low),
            percent(line.high),
        ]
        for line in summary(rows)
    ]
    return head, body


def memory_table(rows: Sequence[Row]) -> Table:
    """The largest cache of each method that a model was weighed with."""
    head = ["model", "method", "layers", "tokens", "predicted B", "measured B", "error"]
    seen: dict[tuple[Any, ...], list[str]] = {}
    for row in rows:
        if row["kind"] == "memory" and row["way"] == "layers" and row["provided"] == "exactly":
            cells = [row["model"], title(row["method"]), f"{row['num_layers']}", f"{row['num_tokens']:,}"]
            seen[cells[0], cells[1]] = [*cells, f"{row['predicted']:,}", f"{row['measured']:,}", percent(row["error"])]
    return head, list(seen.values())


def peak_table(rows: Sequence[Row]) -> Table:
    """Every peak."""
    head = ["model", "method", "phase", "counter", "tokens", "predicted B", "measured B", "error"]
    body = [
        [row["model"], title(row["method"]), row["phase"], row["counter"], f"{row['num_tokens']:,}",
         f"{row['predicted']:,}", f"{row['measured']:,}", percent(row["error"])]
        for row in rows if row["kind"] == "peak"
    ]  # fmt: skip
    return head, body


def speed_table(rows: Sequence[Row]) -> Table:
    """Prefill and decode of each method and batch size."""
    head = ["model", "weights", "method", "batch", "phase", "median", "lowest", "highest", "unit"]
    body = [
        [row["model"], row["weights"], title(row["method"]), f"{row['batch_size']}", row["phase"],
         *(f"{row[name]:.4g}" for name in ("measured", "low", "high")), row["unit"]]
        for row in rows if row["kind"] == "speed"
    ]  # fmt: skip
    return head, body


def quality_table(rows: Sequence[Row]) -> Table:
    """Perplexity of each method, and how far it is from the uncompressed cache's."""
    head = ["model", "weights", "text", "method", "perplexity", "against uncompressed", "tokens"]
    chosen = [row for row in rows if row["kind"] == "quality"]
    body = []
    for row in chosen:
        same = [
            other
            for other in chosen
            if all(
                other[name] == row[name] for name in ("model", "text_sha256", "window", "chunk", "num_tokens", "device")
            )
        ]
        plain = next((other for other in same if other["method"]["type"] == "Full"), None)
        off = "" if plain is None else percent(row["measured"] / plain["measured"] - 1)
        cells = [row["model"], row["weights"], row["text"], title(row["method"]), f"{row['measured']:.4f}", off]
        body.append([*cells, f"{row['num_tokens']:,}"])
    return head, body


def title(method: Row) -> str:
    """The method's name, with its type of exact tokens where that is not float16."""
    dtype = method.get("dtype", "float16")
    return method["name"] if method["type"] == "Full" or dtype == "float16" else f"{method['name']} {dtype}"


def percent(value: float) -> str:
    """``+0.03 %``; an exact zero has no sign."""
    return "0" if value == 0 else f"{100 * value:+.3g} %"
