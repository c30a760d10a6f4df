"""What ``bench generate`` recorded, every cache beside the best of transformers' own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import ceil

from kvruntime.bench.engine.report import groups
from kvruntime.bench.harness.results import Row
from kvruntime.bench.harness.tables import kernels, ratio
from kvruntime.bench.kernels.report import done, size
from kvruntime.bench.model.report import heading, note
from kvsim.output.tables import plain

GIB = 1 << 30
FIRST_CALL = 8
"""New tokens of a first call."""
STOCK = ("transformers-dynamic", "transformers-static")
"""What an uncompressed cache costs: as it comes, and compiled by ``generate()``."""


def label(row: Row) -> str:
    """The cache, and how its steps run where there are several ways."""
    return f"{row['method']}, {row['runs']}" if row["runs"] else str(row["method"])


def best_stock(row: Row, rows: Iterable[Row]) -> Row | None:
    """The faster of transformers' own caches at the same size; None before one was measured."""
    same = ("kind", "model", "weights", "dtype", "batch_size", "num_tokens")
    own = [other for other in done(rows, row["kind"]) if other["method"] in STOCK]
    there = [other for other in own if all(other[name] == row[name] for name in same)]
    return min(there, key=seconds, default=None)


def seconds(row: Row) -> float:
    """Of a step, the median of the calls, or of a conversation.  Of the dynamic cache the fastest call: in the first,
    lengths are new to the process, and probably PyTorch plans its attention for each (:func:`new_lengths`)."""
    if row["kind"] != "generate":
        return float(row["seconds"])
    return float(row["seconds_per_step"][row["method"] == STOCK[0]])


def new_lengths(row: Row) -> float | None:
    """Seconds of a step of the dynamic cache at lengths that are new to the process: of its slowest call."""
    return float(row["seconds_per_step"][2]) if row["kind"] == "generate" and row["method"] == STOCK[0] else None


def tokens_per_second(row: Row) -> float:
    """Of all rows, by :func:`seconds`."""
    return float(row["batch_size"] / seconds(row))


def line(row: Row, rows: Sequence[Row]) -> str:
    """A row in a line, as soon as it is measured."""
    best = best_stock(row, rows)
    beside = "" if best is None or best is row or row["method"] in STOCK else f", {ratio(seconds(best) / seconds(row))}"
    if row["kind"] == "conversation":
        return f"    {label(row)}: {row['turns']} turns in {row['seconds']:.2f} s{beside}"
    return f"    {label(row)}: {1e3 * seconds(row):.2f} ms a step, first call {row['first_call_seconds']:.1f} s{beside}"


def tables(rows: Sequence[Row]) -> str:
    """A table a model, and what failed."""
    blocks = [generate_table(group) for group in groups(rows, "generate")]
    blocks += [conversation_table(group) for group in groups(rows, "conversation")]
    blocks += [note(row) for row in rows if "failed" in row]
    return "\n\n".join(blocks)


def pays_from(row: Row, rows: Iterable[Row]) -> str:
    """New tokens after which this cache's first call and steps have taken less time than any of transformers' own."""
    same = ("model", "weights", "dtype", "batch_size", "num_tokens")
    own = [one for one in done(rows, "generate") if one["method"] in STOCK]
    stock = [one for one in own if all(one[name] == row[name] for name in same)]
    if row["method"] in STOCK or not stock:
        return ""
    if any(seconds(one) <= seconds(row) for one in stock):
        return "never"
    behind = [(row["first_call_seconds"] - one["first_call_seconds"]) / (seconds(one) - seconds(row)) for one in stock]
    return f"{FIRST_CALL + max(0, ceil(max(behind))):,}"


def generate_table(group: Sequence[Row]) -> str:
    body = []
    for row in group:
        best = best_stock(row, group)
        share = "" if best is None or row["method"] in STOCK else ratio(seconds(best) / seconds(row))
        cells = [f"{row['batch_size']} x {size(row['num_tokens'])}", label(row), f"{1e3 * seconds(row):.2f}", share]
        cells += [f"{tokens_per_second(row):,.0f}", f"{1e3 * row['first_token_seconds'][0]:,.0f}"]
        peak = f"{row['peak_nbytes'] / GIB:.1f}" if "peak_nbytes" in row else ""
        new = new_lengths(row)
        cells.append("" if new is None else f"{1e3 * new:.2f}")
        body.append([*cells, f"{row['first_call_seconds']:.1f}", peak, pays_from(row, group)])
    head = ["prompt", "cache", "ms/step", "of best stock", "tok/s", "first token ms", "new lengths ms", "first call s"]
    head += ["peak GiB", "pays from"]
    return (
        heading("generate()", group[0], f"greedy, medians of {group[0]['repeats']}")
        + "\n"
        + plain(head, body)
        + kernels(group)
    )


def conversation_table(group: Sequence[Row]) -> str:
    body = []
    for row in group:
        best = best_stock(row, group)
        share = "" if best is None or row["method"] in STOCK else ratio(seconds(best) / seconds(row))
        body.append([size(row["num_tokens"]), label(row), f"{row['seconds']:.2f}", share])
    first = group[0]
    what = f"{first['turns']} turns on one cache, {first['tokens_a_turn']} tokens said and as many answered in each"
    return heading("conversation", first, what) + "\n" + plain(["prompt", "cache", "s", "of best stock"], body)
