"""Two pictures of the same rows: bytes over context, and compression over context."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kvsim.atomic import replace_file
from kvsim.install import install_hint
from kvsim.memory.estimate import Estimate
from kvsim.output.text import unit

FORMATS = (".png", ".svg")


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
    for method in dict.fromkeys(row.method.name for row in rows):
        own = [row for row in rows if row.method.name == method]
        contexts = [row.num_tokens for row in own]
        sizes.plot(contexts, [row.nbytes / scale for row in own], marker="o", markersize=3, label=method)
        ratios.plot(contexts, [row.compression for row in own], marker="o", markersize=3, label=method)
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
    sizes.legend()
    figure.suptitle(title)
    kind = path.suffix.lower().lstrip(".")
    metadata = {"Date": None} if kind == "svg" else None
    with rc_context({"svg.hashsalt": "kvsim"}):  # the same rows are the same bytes
        replace_file(path, lambda file: figure.savefig(file, format=kind, dpi=150, metadata=metadata))


def _tokens(ctx: int) -> str:
    for factor, suffix in ((1 << 20, "M"), (1 << 10, "k")):
        if ctx % factor == 0:
            return f"{ctx // factor}{suffix}"
    return str(ctx)
