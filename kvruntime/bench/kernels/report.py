"""What ``bench kernels`` recorded, as tables: time, bandwidth, its share of what the card reads, ratio to float16."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kvruntime.bench.harness.results import Row
from kvruntime.bench.harness.tables import ratio
from kvsim.output.tables import plain

Shape = tuple[str, int, int]
"""Model, rows, tokens."""


def layouts_asked() -> dict[str, Mapping[Shape, float]]:
    """What was set out for, as the rooms say it: layout (a method's name without its residual) -> shape -> ratio to
    float16 on an H100."""
    from kvruntime.methods import LAYERS

    rooms = [room.measures for room in LAYERS.values() if room.measures is not None]
    return {layout: ratios for own in rooms for layout, ratios in getattr(own, "ASKED", {}).items()}


def done(rows: Iterable[Row], kind: str) -> list[Row]:
    """The finished rows of one kind."""
    return [row for row in rows if row["kind"] == kind and "failed" not in row]


def ceiling(rows: Iterable[Row], what: str) -> float | None:
    """Bytes a second: ``read`` or ``copy``."""
    return next((row["bandwidth"] for row in done(rows, "ceiling") if row["what"] == what), None)


def baseline(row: Row, rows: Iterable[Row]) -> Row | None:
    """The fastest uncompressed attention over as many tokens, heads and type alike; for ragged rows, over even ones.

    Only of the same commit: a file that is resumed or measured anew may hold rows of several.
    """
    names = ("model", "num_q_heads", "num_kv_heads", "head_dim", "batch_size", "num_tokens", "dtype")
    alike = [other for other in done(rows, "sdpa") if all(other[name] == row[name] for name in names)]
    same = [other for other in alike if other.get("commit") == row.get("commit")]
    return min(same, key=lambda other: other["seconds"][0], default=None)


def speedup(row: Row, rows: Iterable[Row]) -> float | None:
    """Times faster than the baseline."""
    base = baseline(row, rows)
    return None if base is None else base["seconds"][0] / row["seconds"][0]


def asked(row: Row) -> float | None:
    """The ratio that was set out for."""
    layout = row["method"].rpartition("-r")[0]
    wanted = layouts_asked().get(layout, {}).get((row["model"], row["batch_size"], row["num_tokens"]))
    plain = not row.get("ragged") and not row.get("portable") and row["dtype"] == "float16"
    return wanted if plain else None


def share(value: float, whole: float | None) -> str:
    return "" if not whole else f"{value / whole:.0%}"


def micro(seconds: float | str | None) -> str:
    """Microseconds with three digits or a decimal; empty where there is no figure."""
    if not isinstance(seconds, (int, float)):
        return ""
    return f"{1e6 * seconds:,.2f}" if seconds < 1e-5 else f"{1e6 * seconds:,.1f}"


def size(tokens: int) -> str:
    return f"{tokens >> 10}k" if tokens % 1024 == 0 else f"{tokens:,}"


def title(row: Row) -> str:
    """``llama-3-8b 8 x 32k``."""
    ragged = " ragged" if row.get("ragged") else ""
    return f"{row['model']} {row['batch_size']} x {size(row['num_tokens'])}{ragged}"


def name(row: Row) -> str:
    extra = ["portable kernel"] * bool(row.get("portable")) + [row["dtype"]] * (row["dtype"] != "float16")
    return row["method"] + (f" ({', '.join(extra)})" if extra else "")


def line(row: Row, rows: Sequence[Row]) -> str:
    """One finished row as it comes."""
    if row["kind"] == "ceiling":
        return f"    {row['what']}: {row['bandwidth'] / 1e9:,.0f} GB/s"
    if row["kind"] == "append":
        parts = [f"{what.removesuffix('_seconds')} {micro(row[what])} us" for what in APPENDED if micro(row[what])]
        return "    " + ", ".join(parts)
    cells = [f"{micro(row['seconds'][0])} us", f"{row['bandwidth'] / 1e9:,.0f} GB/s"]
    if row["kind"] == "pack":
        cells += [f"eager {micro(row.get('eager_seconds'))} us", f"compiled {micro(row.get('compiled_seconds'))} us"]
        return "    " + ", ".join(cells)
    cells.append(f"{share(row['bandwidth'], ceiling(rows, 'read'))} of reading")
    if row["kind"] == "attend":
        cells += [f"{ratio(speedup(row, rows))} against fp16", f"error {row['relative_error']:.1e}", row["kernel"]]
    return "    " + ", ".join(cells)


APPENDED = ("append_seconds", "flush_seconds", "step_append_seconds", "step_flush_seconds")


def tables(rows: Sequence[Row]) -> str:
    """Ceilings, attention, packing, appending, and what failed."""
    blocks = [ceilings(rows)]
    for table in (attention_table, pack_table, append_table):
        text = table(rows)
        if text:
            blocks.append(text)
    failed = [row for row in rows if "failed" in row and "model" in row]
    blocks += [f"failed: {row['kind']} {name(row)} {title(row)}: {row['failed']}" for row in failed]
    return "\n\n".join(block for block in blocks if block)


def ceilings(rows: Sequence[Row]) -> str:
    found = {row["what"]: row["bandwidth"] for row in done(rows, "ceiling")}
    shown = ", ".join(f"{what} {value / 1e9:,.0f} GB/s" for what, value in found.items())
    return f"measured ceilings: {shown}" if found else ""


def attention_body(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Head and lines of the attention table, shape by shape: the baselines, the engine's 16-bit kernel, the rest."""
    read = ceiling(rows, "read")
    found = done(rows, "sdpa") + done(rows, "full") + done(rows, "attend")
    body = []
    for shape in dict.fromkeys(title(row) for row in found):
        for row in (row for row in found if title(row) == shape):
            middle, low, high = row["seconds"]
            wanted = asked(row) if row["kind"] == "attend" else None
            cells = [shape, name(row), micro(middle), f"{micro(low)} to {micro(high)}"]
            cells += [
                f"{row['bandwidth'] / 1e9:,.0f}",
                share(row["bandwidth"], read),
                ratio(speedup(row, rows)),
                ratio(wanted),
            ]
            cells += [f"{row['relative_error']:.1e}" if "relative_error" in row else "", splits_cell(row)]
            body.append(cells)
    head = ["layer", "cache", "us", "p10 to p90", "GB/s", "of reading", "against fp16", "asked", "error", "splits"]
    return head, body


def splits_cell(row: Row) -> str:
    """The plan's number of splits, and the best of those tried where it is faster."""
    if not row.get("splits"):
        return ""
    tried = {number: seconds for number, seconds in row.get("sweep", {}).items() if isinstance(seconds, float)}
    best = min(tried, key=lambda number: tried[number], default=None)
    if best is None or tried[best] >= row["seconds"][0]:
        return f"{row['splits']}"
    return f"{row['splits']} (best {best}: {micro(tried[best])} us)"


def attention_table(rows: Sequence[Row]) -> str:
    head, body = attention_body(rows)
    return "decode attention, one layer, one new token a row\n" + plain(head, body) if body else ""


def pack_body(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    copy = ceiling(rows, "copy")
    body = []
    for row in done(rows, "pack"):
        seconds = row["seconds"][0]
        cells = [title(row), name(row), micro(seconds), f"{row['bandwidth'] / 1e9:,.0f}", share(row["bandwidth"], copy)]
        body.append(cells + [ratio(quotient(row.get(f"{way}_seconds"), seconds)) for way in ("eager", "compiled")])
    return ["prompt", "cache", "us", "GB/s", "of copying", "against eager PyTorch", "against compiled"], body


def quotient(a: Any, b: Any) -> float | None:
    return a / b if isinstance(a, float) and isinstance(b, float) and b > 0 else None


def pack_table(rows: Sequence[Row]) -> str:
    head, body = pack_body(rows)
    return "storing a prompt, one layer, keys and values\n" + plain(head, body) if body else ""


def append_body(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    body = []
    for row in done(rows, "append"):
        counts = [str(row.get(f"{what}_launches") or "") for what in ("append", "flush")]
        batched = row["batch_size"] > 1  # putting the lengths back costs as much: the difference says nothing
        times = ["not resolved" if batched else micro(row[what]) for what in APPENDED]
        body.append([title(row), name(row), *times, *counts])
    head = ["layer", "cache", "append us", "flush us", "engine append us", "engine flush us", "launches", "of a flush"]
    return head, body


def append_table(rows: Sequence[Row]) -> str:
    head, body = append_body(rows)
    return "storing one token a row, one layer\n" + plain(head, body) if body else ""
