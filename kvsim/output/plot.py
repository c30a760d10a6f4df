"""Two pictures of the same rows: bytes over context, and compression over context."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvsim.atomic import replace_file
from kvsim.install import install_hint
from kvsim.memory.estimate import Estimate
from kvsim.output.text import unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (".png", ".svg")
COLOURS = ("#0072b2", "#c8500a", "#00805f", "#a8457f", "#8a6d00", "#5b4bb5", "#3d7f91", "#6b6b6b")
"""Of lines and bars in order, those of the page: apart for the colour-blind, legible on white."""
Ends = Sequence[tuple[tuple[float, float], str, Any]]
"""Of lines: the last point, the name and the colour."""
NAME_ROOM = 0.42
"""Share of the width, in the logarithm, that names take beside a line's end."""
NAME_STEP = 0.042
"""Share of the height between two names."""


def draw(rows: Sequence[Estimate], title: str, path: Path) -> None:
    """Writes the picture to ``path`` (``.png`` or ``.svg``).

    Raises ``ValueError`` for another suffix, for a path that cannot be written, or without matplotlib.
    """
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"output {str(path)!r}: allowed are names that end in {' or '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise ValueError(f"output {str(path)!r}: no directory {str(path.parent)!r}")
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, NullFormatter
    except ImportError:
        raise ValueError(f"plot needs matplotlib: {install_hint('plot')}") from None

    name, scale = unit(max(row.nbytes for row in rows))
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    sizes, ratios = figure.subplots(1, 2)
    ends: dict[Any, list[tuple[tuple[float, float], str, Any]]] = {sizes: [], ratios: []}
    for place, method in enumerate(dict.fromkeys(row.method.name for row in rows)):
        own = [row for row in rows if row.method.name == method]
        contexts, colour = [row.num_tokens for row in own], COLOURS[place % len(COLOURS)]
        for axes, heights in ((sizes, [row.nbytes / scale for row in own]), (ratios, [row.compression for row in own])):
            axes.plot(contexts, heights, marker="o", markersize=3, color=colour)
            ends[axes].append(((contexts[-1], heights[-1]), method, colour))
    contexts = sorted({row.num_tokens for row in rows})
    for axes in (sizes, ratios):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("context (tokens)")
        axes.set_xticks(contexts, [_tokens(ctx) for ctx in contexts], rotation=45)
        axes.grid(alpha=0.3)
    sizes.set_yscale("log")
    sizes.yaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:,g}"))
    sizes.yaxis.set_minor_formatter(NullFormatter())
    sizes.set_ylabel(f"cache ({name})")
    ratios.set_ylabel("times smaller than fp16")
    ratios.set_ylim(bottom=0)
    for axes in (sizes, ratios):
        label_ends(axes, ends[axes])
    figure.suptitle(title)
    kind = path.suffix.lower().lstrip(".")
    metadata = {"Date": None} if kind == "svg" else None
    with rc_context({"svg.hashsalt": "kvsim"}):  # the same rows are the same bytes
        replace_file(path, lambda file: figure.savefig(file, format=kind, dpi=150, metadata=metadata))


def label_ends(axes: Axes, ends: Ends) -> None:
    """Each line's name at its last point, those too near one another moved up; room for them on the right.

    The x axis is logarithmic; the y axis has its limits.
    """
    low, high = axes.get_xlim()
    axes.set_xlim(low, high * (high / low) ** NAME_ROOM)
    heights = [axes.transAxes.inverted().transform(axes.transData.transform(end))[1] for end, _, _ in ends]
    last = -NAME_STEP
    for height, ((x, _), name, colour) in sorted(zip(heights, ends, strict=True), key=lambda each: float(each[0])):
        last = max(height, last + NAME_STEP)
        where = axes.get_xaxis_transform()  # x as the data has it, y a share of the height
        axes.text(x * (high / low) ** 0.02, last, name, color=colour, fontsize=8, va="center", transform=where)


def _tokens(ctx: int) -> str:
    for factor, suffix in ((1 << 20, "M"), (1 << 10, "k")):
        if ctx % factor == 0:
            return f"{ctx // factor}{suffix}"
    return str(ctx)
