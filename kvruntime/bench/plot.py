"""Pictures of a results file: memory over length, compression, speed, quality; kernels and steps; all on one page."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvruntime.bench.harness.results import Row
from kvruntime.bench.harness.tables import baseline, groups
from kvruntime.bench.model.report import MIB, compression
from kvruntime.bench.quality.pictures import quality_panels
from kvruntime.bench.speed_plot import speed_panels
from kvsim.atomic import replace_file
from kvsim.install import install_hint
from kvsim.output.plot import COLOURS, label_ends

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_all(results: dict[str, Any], folder: Path, suffix: str) -> list[Path]:
    """Writes ``memory``, ``compression``, ``speed``, ``quality``, or of ``bench kernels`` and ``bench engine``
    ``roofline``, ``speedup`` and ``latency``, of ``eval`` and ``compare`` ``bits``, ``positions``, grids,
    ``comparison`` and ``ablation``; and ``summary``; as ``.png`` or ``.svg``.

    A kind without rows is left out, of the summary too.  Raises ``ValueError`` when there is nothing to draw, for a
    folder that cannot be written, or without matplotlib.
    """
    drawings = _drawings(results["rows"])
    if not drawings:
        raise ValueError(
            "these results hold no finished memory, speed, quality, attention, step, window or answer rows to draw"
        )
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.rcsetup import cycler
    except ImportError:
        raise ValueError(f"plot needs matplotlib: {install_hint('plot')}") from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write {folder}: {error.strerror}") from None
    with rc_context({"axes.prop_cycle": cycler(color=COLOURS)}):
        return _draw(results, drawings, folder, suffix, Figure, FigureCanvasAgg)


def _draw(
    results: dict[str, Any],
    drawings: dict[str, Callable[[Axes], None]],
    folder: Path,
    suffix: str,
    make_figure: Callable[..., Figure],
    make_canvas: Callable[[Figure], object],
) -> list[Path]:
    paths = []
    for name, panels in [*((name, [draw]) for name, draw in drawings.items()), ("summary", list(drawings.values()))]:
        columns = min(2, len(panels))
        lines = -(-len(panels) // columns)
        figure = make_figure(figsize=(7.5 * columns, 4.6 * lines), layout="constrained")
        make_canvas(figure)
        places = figure.subplots(lines, columns, squeeze=False).flat
        for draw, place in zip(panels, places, strict=False):
            draw(place)
        for place in list(places):
            place.set_axis_off()
        figure.suptitle(_circumstances(results), fontsize=9)
        path = folder / f"{name}.{suffix}"
        picture = BytesIO()
        figure.savefig(picture, format=suffix, dpi=130, metadata={"Date": None} if suffix == "svg" else None)
        replace_file(path, picture.getvalue(), regular=True)
        paths.append(path)
    return paths


def _circumstances(results: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items() if number)
    return f"{results['device']['name']}; {versions}"


def _drawings(rows: list[Row]) -> dict[str, Callable[[Axes], None]]:
    """Of each kind the largest group of rows that belong together."""
    out: dict[str, Callable[[Axes], None]] = {}
    for kind, names in (("memory", ("memory", "compression")), ("speed", ("speed",)), ("quality", ("quality",))):
        found = max(groups(rows, kind), key=len, default=[])
        for name in names if found else ():
            draw = PICTURES[name]
            out[name] = lambda axes, draw=draw, found=found: draw(axes, found)  # type: ignore[misc]
    for name, panel in speed_panels(rows).items():
        out[name] = lambda axes, panel=panel: panel(axes, rows)  # type: ignore[misc]
    return out | quality_panels(rows)


def _title(axes: Axes, what: str, row: Row) -> None:
    axes.set_title(f"{what}\n{row['model']}, weights: {row['weights']}, {row['dtype']}", fontsize=9)
    axes.grid(alpha=0.3)


def _lines(axes: Axes, group: list[Row], height: Callable[[Row], float | None]) -> None:
    tokens = sorted({row["num_tokens"] for row in group})
    ends = []
    for method in dict.fromkeys(row["method"] for row in group):
        own = sorted((row for row in group if row["method"] == method), key=lambda row: row["num_tokens"])
        points = [(row["num_tokens"], height(row)) for row in own]
        known = [(x, y) for x, y in points if y is not None]
        if known:
            (line,) = axes.plot(*zip(*known, strict=True), marker="o", markersize=4, label=method)
            ends.append((known[-1], method, line.get_color()))
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens, [f"{count:,}" for count in tokens])
    axes.set_xlabel("tokens a sequence")
    axes.set_ylim(bottom=0)
    label_ends(axes, ends)


def _memory(axes: Axes, group: list[Row]) -> None:
    _lines(axes, group, lambda row: row["nbytes"] / MIB)
    axes.set_ylabel("cache, measured (MiB)")
    _title(axes, "Memory over length", group[0])


def _compression(axes: Axes, group: list[Row]) -> None:
    _lines(axes, group, lambda row: compression(row, group))
    axes.set_ylabel("times smaller than the uncompressed cache")
    _title(axes, "Compression, measured", group[0])


def _speed(axes: Axes, group: list[Row]) -> None:
    batches = sorted({row["batch_size"] for row in group})
    methods = list(dict.fromkeys(row["method"] for row in group))
    width = 0.8 / len(methods)
    for index, method in enumerate(methods):
        own = {row["batch_size"]: row["tokens_per_second"] for row in group if row["method"] == method}
        there = [batch for batch in batches if batch in own]
        middle = [own[batch][0] for batch in there]
        error = [[own[batch][0] - own[batch][1] for batch in there], [own[batch][2] - own[batch][0] for batch in there]]
        places = [batches.index(batch) + (index - (len(methods) - 1) / 2) * width for batch in there]
        bars = axes.bar(places, middle, width, yerr=error, capsize=3, label=method)
        axes.bar_label(bars, [f"{value:,.1f}" for value in middle], fontsize=7, padding=2)
    axes.set_xticks(range(len(batches)), [f"batch {batch}" for batch in batches])
    axes.set_ylabel("decoded tokens a second (median, min to max)")
    axes.legend(fontsize=8)
    first = group[0]
    _title(axes, f"Decode speed after a prompt of {first['prompt_tokens']} tokens", first)


def _quality(axes: Axes, group: list[Row]) -> None:
    bars = axes.barh([row["method"] for row in group], [row["ppl"] for row in group], color="C0")
    labels = []
    for row in group:
        base = baseline(row, group)
        labels.append(
            f"{row['ppl']:.3f}"  # and how far from the baseline's
            + ("" if base in (None, row) else f" ({row['ppl'] / base['ppl'] - 1:+.2%})")  # type: ignore[index]
        )
    axes.bar_label(bars, labels, fontsize=8, padding=3)
    axes.margins(x=0.25)
    axes.invert_yaxis()
    axes.set_xlabel("perplexity through the cache (lower is better)")
    _title(axes, f"Quality on {group[0]['text']}, {group[0]['num_tokens']:,} tokens", group[0])


PICTURES = {"memory": _memory, "compression": _compression, "speed": _speed, "quality": _quality}
