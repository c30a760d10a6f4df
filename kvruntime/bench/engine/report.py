"""What ``bench engine`` recorded: steps over context, the lines through them, break-even, the largest batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvruntime.bench.harness.results import Row
from kvruntime.bench.harness.tables import BASE, kernels, ratio
from kvruntime.bench.kernels.report import done, size
from kvruntime.bench.model.report import heading, note
from kvsim.output.tables import plain

GIB = 1 << 30


@dataclass(frozen=True)
class Line:
    """``seconds(context) = start + slope * context`` of one method's steps in batch 1."""

    start: float
    slope: float


def fitted(points: Sequence[tuple[int, float]]) -> Line | None:
    """Least squares; None for fewer than three contexts."""
    if len({x for x, _ in points}) < 3:
        return None
    count = len(points)
    mean_x, mean_y = (sum(values) / count for values in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    return Line(mean_y - slope * mean_x, slope)


def break_even(ours: Sequence[tuple[int, float]], base: Sequence[tuple[int, float]]) -> float | None:
    """The context from which on ``ours`` is the faster at every measured point, straight between points.

    The least measured context where it is faster from there on; None where it is slower at the largest.
    """
    there = dict(base)
    gaps = [(x, y - there[x]) for x, y in sorted(ours) if x in there]
    if not gaps or gaps[-1][1] > 0:
        return None
    for (x0, gap0), (x1, gap1) in zip(reversed(gaps[:-1]), reversed(gaps[1:]), strict=True):
        if gap0 > 0:
            return x0 + (x1 - x0) * gap0 / (gap0 - gap1)
    return float(gaps[0][0])


def groups(rows: Iterable[Row], kind: str) -> list[list[Row]]:
    """Finished rows of one kind, by model, weights and type."""
    out: dict[tuple[str, ...], list[Row]] = {}
    for row in done(rows, kind):
        out.setdefault((row["model"], row["weights"], row["dtype"]), []).append(row)
    return list(out.values())


def baseline(row: Row, rows: Iterable[Row]) -> Row | None:
    """The same engine without compression at the same size, of the same commit."""
    names = ("kind", "model", "weights", "dtype", "batch_size", "num_tokens", "commit")
    own = (other for other in rows if other["method"] in BASE and other.get("package") == "kvruntime")
    return next((other for other in own if all(other.get(name) == row.get(name) for name in names)), None)


def speedup(row: Row, rows: Iterable[Row]) -> float | None:
    base = baseline(row, done(rows, row["kind"]))
    return None if base is None else base["seconds_per_step"][0] / row["seconds_per_step"][0]


def curve(group: Iterable[Row], method: str) -> list[tuple[int, float]]:
    """``(context, seconds a step)`` of our engine in batch 1, ascending."""
    own = (row for row in group if row["method"] == method and row["batch_size"] == 1 and row["package"] == "kvruntime")
    return sorted((row["num_tokens"], row["seconds_per_step"][0]) for row in own)


def line(row: Row, rows: Sequence[Row]) -> str:
    """One finished row as it comes."""
    if row["kind"] == "prefill":
        return f"    {1e3 * row['seconds'][0]:,.1f} ms to the first token"
    middle = f"    {1e3 * row['seconds_per_step'][0]:.3f} ms a step, {row['tokens_per_second'][0]:,.0f} tok/s"
    if row["kind"] == "largest":
        return f"{middle}, batch {row['batch_size']} of {row['predicted_batch']} predicted"
    return f"{middle}, {ratio(speedup(row, rows))} against 16-bit"


def tables(rows: Sequence[Row]) -> str:
    """Steps, lines over context, prefill, largest batches; what failed or is missing."""
    blocks = [table(group) for kind, table in TABLES.items() for group in groups(rows, kind)]
    blocks += [failure(row) for row in rows if "failed" in row]
    blocks += [note(row) for row in rows if row["kind"] == "missing"]
    return "\n\n".join(block for block in blocks if block)


def failure(row: Row) -> str:
    where = (
        f"batch {row['batch_size']} at {size(row['num_tokens'])}" if "batch_size" in row else size(row["num_tokens"])
    )
    return f"failed: {row['kind']} {row['model']} {row['method']} {where}: {row['failed']}"


def step_body(group: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Head and lines, batch by batch and context by context."""
    body = []
    places = sorted({(row["batch_size"], row["num_tokens"]) for row in group})
    for batch_size, context in places:
        for row in group:
            if (row["batch_size"], row["num_tokens"]) != (batch_size, context):
                continue
            middle, low, high = (1e3 * seconds for seconds in row["seconds_per_step"])
            cells = [str(batch_size), size(context), row["method"], f"{middle:.3f}", f"{low:.3f} to {high:.3f}"]
            cells += [f"{row['tokens_per_second'][0]:,.0f}", ratio(speedup(row, group))]
            body.append([*cells, f"{row['nbytes'] / GIB:.3f}" if "nbytes" in row else ""])
    return ["batch", "context", "cache", "ms/step", "min to max", "tok/s", "against 16-bit", "cache GiB"], body


def step_table(group: Sequence[Row]) -> str:
    head, body = step_body(group)
    blocks = [heading("steps", group[0], "greedy, up to the context named") + "\n" + plain(head, body) + kernels(group)]
    head, body = line_body(group)
    if body:
        blocks.append("batch 1 over context: ms/step = start + slope * tokens\n" + plain(head, body))
    return "\n\n".join(blocks)


def line_body(group: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """The fitted line of every method, its slope against float16's, and the break-even."""
    methods = list(dict.fromkeys(row["method"] for row in group if row["package"] == "kvruntime"))
    base = next((curve(group, method) for method in methods if method in BASE), [])
    whole = fitted(base)
    body = []
    for method in methods:
        points = curve(group, method)
        own = fitted(points)
        if own is None:
            continue
        cells = [method, f"{1e3 * own.start:.3f}", f"{1e3 * own.slope:.3g}"]
        if whole is not None and method not in BASE:
            even = break_even(points, base)
            first = even is not None and even <= points[0][0]
            cells += [f"{own.slope / whole.slope:.0%}", "none" if even is None else "<= " * first + f"{even:,.0f}"]
        body.append(cells)
    return ["cache", "start ms", "slope ms/token", "of 16-bit's slope", "break-even tokens"], body


def prefill_table(group: Sequence[Row]) -> str:
    body = []
    for row in group:
        base = baseline(row, group)
        beside = row.get("base_seconds")  # measured in turns with it
        if beside is None and base is not None:
            beside = base["seconds"]
        off = "" if beside is None else f"{row['seconds'][0] / beside[0] - 1:+.1%}"
        own = "" if beside is None else f"{1e3 * beside[0]:,.2f}"
        body.append([size(row["num_tokens"]), row["method"], f"{1e3 * row['seconds'][0]:,.2f}", own, off])
    head = ["prompt", "cache", "ms", "16-bit ms beside", "against 16-bit"]
    return heading("first token", group[0], "batch 1") + "\n" + plain(head, body)


def largest_table(group: Sequence[Row]) -> str:
    body = []
    for row in group:
        base = next((other for other in group if other["method"] in BASE), None)
        cells = [size(row["num_tokens"]), row["method"], str(row["predicted_batch"]), str(row["batch_size"])]
        cells += [f"{row['tokens_per_second'][0]:,.0f}", f"{row['nbytes'] / GIB:.2f}"]
        if base is not None:
            cells.append(ratio(row["batch_size"] / base["batch_size"]))
            cells.append(ratio(row["tokens_per_second"][0] / base["tokens_per_second"][0]))
        body.append(cells)
    head = [
        "context",
        "cache",
        "predicted batch",
        "measured",
        "tok/s",
        "cache GiB",
        "batch against 16-bit",
        "tok/s against 16-bit",
    ]
    return heading("largest batch", group[0], "in this card's memory") + "\n" + plain(head, body)


TABLES = {"step": step_table, "prefill": prefill_table, "largest": largest_table}
