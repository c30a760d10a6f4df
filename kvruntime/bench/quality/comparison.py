"""Methods compared from rows: bytes a token, quality and speed, who is beaten, what it supports, and the ablation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import log1p, prod

from kvruntime.bench.harness.results import Row
from kvruntime.bench.harness.tables import BASE, groups
from kvruntime.bench.model.report import heading, note
from kvruntime.bench.quality.report import CONTROL, change, uncompressed
from kvruntime.bench.quality.windows import KIND
from kvsim.layout import Method
from kvsim.methods import make_method
from kvsim.methods.defaults import COMPRESSED
from kvsim.output.tables import plain

ABLATION = "ablation"
"""The kind of the ablation's rows: windows of text, as :data:`KIND`."""
GRID: dict[str, tuple[int, ...]] = {
    "nbits": (2, 4),
    "group_size": (32, 64),
    "residual_length": (64, 128),
    "sink_length": (0, 4),
}
"""Option -> values: the ablation's methods are all combinations."""
TOLERANCES = (0.005, 0.01, 0.03, 0.1)
"""Shares of perplexity for which a method is recommended."""


@dataclass(frozen=True)
class Entry:
    """A method: bytes a token of a long sequence (of one that is bounded, at the window), perplexity against the
    uncompressed cache's with its interval (shares), KL in nats, tokens a second (None where not measured)."""

    method: str
    token_nbytes: float
    change: float
    low: float
    high: float
    kl: float
    speed: float | None = None
    speed_ratio: float | None = None


def ablation_methods() -> list[Method]:
    """Every combination of :data:`GRID` that has a layout."""
    combinations = [dict(zip(GRID, values, strict=True)) for values in product(*GRID.values())]
    return [make_method(COMPRESSED, **options) for options in combinations]


def entries(windows: Sequence[Row], speeds: Sequence[Row] = ()) -> list[Entry]:
    """A group's methods with the speeds that were measured, the fewest bytes first; the uncompressed is among them."""
    base = uncompressed(windows)
    rates = {row["method"]: row["tokens_per_second"][0] for row in speeds if "failed" not in row}
    plain_rate = next((rates[name] for name in rates if name in BASE), None)
    out = []
    for row in windows:
        off = (0.0, 0.0, 0.0) if row is base else change(row, base)
        if off is None:
            continue
        nbytes = (row["bits"] or row["held_bits"]) * row["elements"] / 8
        rate = rates.get(row["method"])
        ratio = None if rate is None or not plain_rate else rate / plain_rate
        out.append(Entry(row["method"], nbytes, *off, row["kl"], rate, ratio))
    return sorted(out, key=lambda entry: entry.token_nbytes)


def frontier(found: Sequence[Entry]) -> list[Entry]:
    """The methods that no other beats: none has as few bytes and as small a change, and one of the two smaller."""
    return [
        one
        for one in found
        if not any(
            other.token_nbytes <= one.token_nbytes
            and other.change <= one.change
            and (other.token_nbytes < one.token_nbytes or other.change < one.change)
            for other in found
        )
    ]


def recommended(found: Sequence[Entry], tolerance: float) -> Entry | None:
    """The fewest bytes of those whose interval ends within ``tolerance``; None where none of them does."""
    within = [entry for entry in found if entry.method not in BASE and entry.high <= tolerance]
    return min(within, key=lambda entry: entry.token_nbytes, default=None)


def tables(rows: Sequence[Row]) -> str:
    """One table of all methods a length of window, what it recommends, and the ablation."""
    blocks = []
    for group in groups(rows, KIND):
        found = entries(group, speeds_of(rows, group))
        blocks += [comparison_table(group, found, speeds_of(rows, group)), recommendation(found)]
    for group in groups(rows, ABLATION):
        blocks.append(ablation_table(group))
    blocks += [note(row) for row in rows if row["kind"] == "missing" or "failed" in row]
    return "\n\n".join(blocks)


def speeds_of(rows: Sequence[Row], group: Sequence[Row]) -> list[Row]:
    """The speeds of the group's model, of the first setting that has any."""
    same = ("model", "model_sha256", "dtype")
    for found in groups(rows, "speed"):
        if all(found[0].get(name) == group[0].get(name) for name in same):
            return [row for row in found if row["batch_size"] == found[0]["batch_size"]]
    return []


def comparison_cells(found: Sequence[Entry]) -> tuple[list[str], list[list[str]]]:
    """Head and cells of the table of all methods, fewest bytes first."""
    best = {entry.method for entry in frontier(found)}
    body = []
    for entry in found:
        off = "" if entry.method in BASE else f"{entry.change:+.2%}"
        span = "" if entry.method in BASE else f"{entry.low:+.2%} to {entry.high:+.2%}"
        cells = [entry.method, f"{entry.token_nbytes:,.0f}", off, span, f"{entry.kl:.5f}"]
        cells += ["" if entry.speed is None else f"{entry.speed:,.1f}"]
        cells += ["" if entry.speed_ratio is None else f"{entry.speed_ratio:.2f}x"]
        body.append([*cells, "*" * (entry.method in best)])
    return ["method", "B a token", "perplexity", "95 % interval", "KL, nats", "tok/s", "of fp16", "best"], body


def comparison_table(group: Sequence[Row], found: Sequence[Entry], speeds: Sequence[Row]) -> str:
    first = group[0]
    what = f"{first['text']}, {first['num_windows']} windows of {first['window']:,}, {first['chunk']} a step"
    if speeds:
        what += f"; speed: batch {speeds[0]['batch_size']}, {speeds[0]['prompt_tokens']} prompt tokens"
    mark = "*: no other method has as few bytes and as good a perplexity"
    return "\n".join([heading("compare", first, what), plain(*comparison_cells(found)), f"{mark}. {CONTROL}"])


def recommendation(found: Sequence[Entry]) -> str:
    """What these rows support, a line a tolerance."""
    lines = ["the fewest bytes whose interval ends within a bound on perplexity:"]
    base = next((entry for entry in found if entry.method in BASE), None)
    for tolerance in TOLERANCES:
        chosen = recommended(found, tolerance)
        if chosen is None:
            lines.append(f"  {tolerance:.1%}: none of these; the uncompressed cache")
            continue
        smaller = "" if base is None else f", {base.token_nbytes / chosen.token_nbytes:.2f}x fewer bytes than fp16"
        speed = "" if chosen.speed_ratio is None else f", {chosen.speed_ratio:.2f}x its speed"
        lines.append(f"  {tolerance:.1%}: {chosen.method} ({chosen.change:+.2%}{smaller}{speed})")
    return "\n".join(lines)


def effects(group: Sequence[Row]) -> list[tuple[str, int, float, float]]:
    """``(option, value, mean bits, mean change of perplexity)`` of every value of :data:`GRID` that is there, over the
    combinations that have it; changes are averaged as logarithms.

    Nothing unless every combination of these values is there: means over unlike others compare nothing.  An option that
    has one value is left out.
    """
    base = uncompressed(group)
    held = {row["method"]: row for row in group}
    there = {method: held[method.name] for method in ablation_methods() if method.name in held}
    values = {
        option: [value for value in GRID[option] if any(getattr(method, option) == value for method in there)]
        for option in GRID
    }
    if base is None or len(there) != prod(map(len, values.values())):
        return []
    out = []
    for option, several in values.items():
        for value in several if len(several) > 1 else ():
            rows = [row for method, row in there.items() if getattr(method, option) == value]
            offs = [off[0] for row in rows if (off := change(row, base)) is not None]
            mean = sum(map(log1p, offs)) / len(offs)
            out.append((option, value, sum(row["bits"] for row in rows) / len(rows), mean))
    return out


def ablation_cells(group: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Head and cells of every combination with its bits and perplexity."""
    base = uncompressed(group)
    body = []
    for row in sorted(group, key=lambda row: row["bits"]):
        off = change(row, base)
        if off is not None:
            body.append([row["method"], f"{row['bits']:.3f}", f"{off[0]:+.2%}", f"{off[1]:+.2%} to {off[2]:+.2%}"])
    return ["method", "bits", "perplexity", "95 % interval"], body


def effect_cells(group: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Head and cells of what each option does in the mean over all others."""
    body = [[option, f"{value}", f"{bits:.3f}", f"{mean:+.4f}"] for option, value, bits, mean in effects(group)]
    return ["option", "value", "bits", "log perplexity"], body


def ablation_table(group: Sequence[Row]) -> str:
    """Every combination, and what each option does in the mean."""
    first = group[0]
    what = f"{COMPRESSED}: bits x groups x residual x sinks, {first['text']}, {first['num_windows']} windows of"
    what += f" {first['window']:,}, {first['chunk']} a step"
    parts = [heading("ablation", first, what), plain(*ablation_cells(group))]
    if effects(group):
        parts += ["what an option does in the mean over all others (log of perplexity against fp16):"]
        parts += [plain(*effect_cells(group))]
    return "\n".join(parts)
