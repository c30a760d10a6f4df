"""Pictures of speed: attention under the roof that the memory sets, its gain over length, a step over context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from kvruntime.bench.engine import report as engine_report
from kvruntime.bench.harness.results import Row
from kvruntime.bench.harness.tables import BASE
from kvruntime.bench.kernels import report as kernel_report

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plain(rows: Sequence[Row]) -> list[Row]:
    """Attention rows that belong into one picture: even lengths, the kernel that a user gets, float16."""
    found = kernel_report.done(rows, "attend")
    return [row for row in found if not row["ragged"] and not row["portable"] and row["dtype"] == "float16"]


def roofline(axes: Axes, rows: Sequence[Row]) -> None:
    """Operations a second over operations a byte: the slope is the measured read bandwidth."""
    own, base = plain(rows), [row for row in kernel_report.done(rows, "sdpa") if row["dtype"] == "float16"]
    best = [row for row in base if row is kernel_report.baseline(row, base)]
    groups: dict[str, list[Row]] = {"fp16, best of cuDNN and flash": best}
    for row in own:
        groups.setdefault(row["method"], []).append(row)
    places = {}
    for name, members in groups.items():
        points = [(row["flops"] / row["nbytes_read"], row["flops"] / row["seconds"][0] / 1e12) for row in members]
        if points:
            axes.scatter([x for x, _ in points], [y for _, y in points], s=22, label=name, zorder=3)
            places[name] = points
    reach = [x for points in places.values() for x, _ in points]
    read = kernel_report.ceiling(rows, "read")
    if read is not None and reach:
        ends = [min(reach) / 1.5, max(reach) * 1.5]
        axes.plot(ends, [x * read / 1e12 for x in ends], color="black", label=f"reads {read / 1e9:,.0f} GB/s, measured")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlabel("floating-point operations a byte of cache")
    axes.set_ylabel("tera-operations a second")
    axes.set_title("Decode attention under the roof of the memory", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def speedup(axes: Axes, rows: Sequence[Row]) -> None:
    """Times faster than float16 attention over the tokens of a row, batch 1 in full lines, larger batches dashed."""
    own = plain(rows)
    model = max({row["model"] for row in own}, key=lambda name: sum(row["model"] == name for row in own))
    points: dict[tuple[str, bool], list[tuple[int, float]]] = {}
    for row in own:
        gain = kernel_report.speedup(row, rows)
        if row["model"] == model and gain is not None:
            points.setdefault((row["method"], row["batch_size"] == 1), []).append((row["num_tokens"], gain))
    methods = list(dict.fromkeys(method for method, _ in points))
    for (method, single), values in sorted(points.items()):
        places = sorted(values)
        axes.plot(
            *zip(*places, strict=True),
            marker="o" if single else "s",
            markersize=4,
            linestyle="-" if single else "none",
            color=f"C{methods.index(method) % 10}",
            label=f"{method}, batch {'1' if single else 'above 1'}",
        )
    axes.axhline(1, color="black", linewidth=0.8)
    tokens = sorted({x for values in points.values() for x, _ in values})
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens, [kernel_report.size(count) for count in tokens])
    axes.set_xlabel("tokens a row")
    axes.set_ylabel("times faster than the best float16 attention")
    axes.set_ylim(bottom=0)
    axes.set_title(f"Decode attention against float16, {model}", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=6)


def latency(axes: Axes, rows: Sequence[Row]) -> None:
    """Milliseconds a token over context in batch 1, break-even marked."""
    group = max(engine_report.groups(rows, "step"), key=lambda rows: len({row["num_tokens"] for row in rows}))
    methods = list(dict.fromkeys(row["method"] for row in group if row["package"] == "kvruntime"))
    base = next((engine_report.curve(group, method) for method in methods if method in BASE), [])
    tokens = sorted({context for method in methods for context, _ in engine_report.curve(group, method)})
    for index, method in enumerate(methods):
        points = engine_report.curve(group, method)
        if not points:
            continue
        color = f"C{index % 10}"
        axes.plot(
            [x for x, _ in points], [1e3 * y for _, y in points], marker="o", markersize=4, color=color, label=method
        )
        even = engine_report.break_even(points, base) if method not in BASE else None
        if even is not None and even > points[0][0]:
            axes.axvline(even, color=color, linestyle=":", linewidth=1, label=f"faster from {even:,.0f} tokens on")
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens, [kernel_report.size(count) for count in tokens])
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("ms a token, batch 1")
    axes.set_ylim(bottom=0)
    first = group[0]
    axes.set_title(f"Latency over context\n{first['model']}, weights: {first['weights']}, {first['dtype']}", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def speed_panels(rows: Sequence[Row]) -> dict[str, Callable[[Axes, Sequence[Row]], None]]:
    """The pictures that the rows allow, by name."""
    out: dict[str, Callable[[Axes, Sequence[Row]], None]] = {}
    if plain(rows):
        out |= {"roofline": roofline, "speedup": speedup}
    if any(row["batch_size"] == 1 and row["package"] == "kvruntime" for row in kernel_report.done(rows, "step")):
        out["latency"] = latency
    return out
